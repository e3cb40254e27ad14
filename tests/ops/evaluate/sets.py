"""The same few drawn pictures in each layout that evaluation reads."""

import json
import tarfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("amber", "blue", "plum")
COLOURS = {"amber": (230, 150, 30), "blue": (30, 60, 220), "plum": (130, 20, 120)}


def drawn(kind: str, number: int, side: int = 40, seed: int = 0) -> Image.Image:
    """A picture of its class's colour with noise, a little wider than high."""
    noise = np.random.default_rng([seed, CLASSES.index(kind), number]).normal(0, 40, (side, side + 8, 3))
    return Image.fromarray((np.array(COLOURS[kind]) + noise).clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image) -> bytes:
    out = BytesIO()
    image.save(out, "JPEG", quality=95, subsampling=0)
    return out.getvalue()


def folders(root: Path, each: int = 6, seed: int = 0) -> Path:
    for kind in CLASSES:
        (root / kind).mkdir(parents=True)
        for number in range(each):
            (root / kind / f"{number:02d}.jpg").write_bytes(encoded(drawn(kind, number, seed=seed)))
    return root


def tars(root: Path, each: int = 6) -> Path:
    """Two WebDataset shards; the last sample has no class."""
    root.mkdir(parents=True)
    samples = [(kind, number) for kind in CLASSES for number in range(each)]
    for shard in range(2):
        with tarfile.open(root / f"{shard:03d}.tar", "w") as file:
            for at in range(shard, len(samples), 2):
                kind, number = samples[at]
                members = [("jpg", encoded(drawn(kind, number)))]
                if at != len(samples) - 1:
                    members.append(("cls", str(CLASSES.index(kind)).encode()))
                for suffix, data in members:
                    entry = tarfile.TarInfo(f"{kind}-{number:02d}.{suffix}")
                    entry.size = len(data)
                    file.addfile(entry, BytesIO(data))
    return root


def coco(root: Path, each: int = 6) -> Path:
    """Boxes: a large one of the class, and a small one of the next class."""
    (root / "train").mkdir(parents=True)
    (root / "annotations").mkdir()
    told: dict[str, list] = {"images": [], "annotations": [], "categories": []}
    told["categories"] = [{"id": 10 * (i + 1), "name": name} for i, name in enumerate(CLASSES)]
    for i, kind in enumerate(CLASSES):
        for number in range(each):
            image, name = drawn(kind, number), f"{kind}-{number:02d}.jpg"
            (root / "train" / name).write_bytes(encoded(image))
            key = len(told["images"])
            told["images"].append({"id": key, "file_name": name, "width": image.width, "height": image.height})
            for label, box in ((i, [2, 2, 30, 30]), ((i + 1) % 3, [0, 0, 5, 5])):
                told["annotations"].append(
                    {"id": len(told["annotations"]), "image_id": key, "category_id": 10 * (label + 1), "bbox": box}
                )
    (root / "annotations" / "instances_train.json").write_text(json.dumps(told))
    return root


def voc(root: Path, each: int = 6, masks: bool = True) -> Path:
    """VOC's folders with the classes bicycle, bird and boat in place of ours."""
    names = {"amber": "bicycle", "blue": "bird", "plum": "boat"}
    for part in ("JPEGImages", "Annotations", "SegmentationClass", "ImageSets/Segmentation", "ImageSets/Main"):
        if masks or part not in ("SegmentationClass", "ImageSets/Segmentation"):
            (root / part).mkdir(parents=True)
    listed = []
    for kind in CLASSES:
        for number in range(each):
            image, name = drawn(kind, number), f"{kind}_{number:02d}"
            listed.append(name)
            (root / "JPEGImages" / f"{name}.jpg").write_bytes(encoded(image))
            boxes = [(names[kind], 1, 1, 38, 38), ("person", 0, 0, 5, 6)]
            (root / "Annotations" / f"{name}.xml").write_text(
                "<annotation>" + "".join(
                    f"<object><name>{n}</name><bndbox><xmin>{a}</xmin><ymin>{b}</ymin><xmax>{c}</xmax><ymax>{d}</ymax></bndbox></object>"
                    for n, a, b, c, d in boxes
                ) + "</annotation>"
            )  # fmt: skip
            if masks:
                mask = np.zeros((image.height, image.width), np.uint8)
                mask[2:30, 2:30] = 2 + CLASSES.index(kind)  # bicycle is VOC's second class
                mask[:3, :3] = 15
                Image.fromarray(mask, "L").save(root / "SegmentationClass" / f"{name}.png")
    for part in ("Segmentation", "Main") if masks else ("Main",):
        (root / "ImageSets" / part / "train.txt").write_text("\n".join(listed))
    return root


LAYOUTS: dict[str, Callable[[Path], Path]] = {"folders": folders, "tars": tars, "coco": coco, "voc": voc}
