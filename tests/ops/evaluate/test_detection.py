"""COCO's format and its faults, feature pyramids, and a detector that learns a few drawn shapes."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gristmill.ops.evaluate import detection
from gristmill.ops.evaluate.coco import Coco, CocoError, open_coco
from gristmill.ops.evaluate.detection import (
    DENSECL,
    MUGS,
    DetectionError,
    DetectionOptions,
    build_detector,
    example,
    learn,
    rate_factor,
    run_detection,
    score,
    seeded,
)
from gristmill.ops.evaluate.masks import open_masks
from gristmill.ops.evaluate.precision import average_precision, results
from gristmill.ops.evaluate.pyramid import Pyramid
from gristmill.ops.evaluate.subject import SubjectError, open_subject
from gristmill.shards.errors import GristmillError
from PIL import Image, ImageDraw
from torch import nn

TINY = DetectionOptions(
    trainable=True, short=(64,), long=64, steps=40, batch=4, rate=3e-3, warmup=5, channels=32, hidden=64, anchor=5.0,
    proposals=100, regions=32,
)  # fmt: skip
SIDE, KINDS = 64, {3: "box", 7: "tent"}


def draw_coco(root: Path, images: int = 8, seed: int = 0) -> Path:
    """Two shapes on noise in each of 64 x 64 pictures: red boxes and blue tents, with their polygons."""
    draws = np.random.default_rng(seed)
    (root / "annotations").mkdir(parents=True)
    (root / "train").mkdir()
    told: dict[str, list[dict[str, Any]]] = {"images": [], "annotations": []}
    for number in range(1, images + 1):
        picture = Image.fromarray(draws.normal(110, 12, (SIDE, SIDE, 3)).clip(0, 255).astype(np.uint8))
        for place in range(2):
            kind = int(draws.choice(list(KINDS)))
            w, h = (int(side) for side in draws.integers(18, 30, 2))
            x, y = int(draws.integers(0, 33 - w)) + 32 * place, int(draws.integers(0, SIDE - h))
            square = [(x, y), (x + w, y), (x + w, y + h), (x, y + h)]
            shape = square if kind == 3 else [(x + w / 2, y), (x + w, y + h), (x, y + h)]
            ImageDraw.Draw(picture).polygon(shape, fill=(220, 40, 30) if kind == 3 else (30, 60, 220))
            told["annotations"].append(
                {
                    "id": 2 * number + place,
                    "image_id": number,
                    "category_id": kind,
                    "bbox": [x, y, w, h],
                    "area": w * h if kind == 3 else w * h / 2,
                    "iscrowd": 0,
                    "segmentation": [[float(c) for point in shape for c in point]],
                }
            )
        picture.save(root / f"train/{number:03}.png")
        told["images"].append({"id": number, "file_name": f"{number:03}.png", "width": SIDE, "height": SIDE})
    told["categories"] = [{"id": number, "name": name} for number, name in KINDS.items()]
    (root / "annotations/instances_train.json").write_text(json.dumps(told))
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_coco(tmp_path_factory.mktemp("coco") / "set")


@pytest.fixture(scope="module")
def shapes(folder: Path) -> Coco:
    return open_coco(folder)


def test_coco_is_read(folder: Path, shapes: Coco):
    assert (len(shapes), shapes.classes, shapes.categories) == (8, ["box", "tent"], [3, 7])
    assert shapes.keys[0] == "001.png"
    assert shapes.outlined
    assert open_coco(folder / "annotations/instances_train.json").keys == shapes.keys
    assert len(open_coco(folder, "train", limit=3)) == 3
    for row in range(len(shapes)):
        mask, pixels = shapes.mask(row), np.asarray(shapes.load(row)).astype(int)
        red, blue = pixels[..., 0] > 200, pixels[..., 2] > 200
        for kind, colour in ((1, red), (2, blue)):
            if colour.any():
                assert (colour & (mask == kind)).sum() / (
                    colour | (mask == kind)
                ).sum() > 0.8  # the drawn ones hold their right and lower edges
        largest = max(shapes.objects[row], key=lambda one: one.area)
        assert shapes.labels()[row] == largest.label
    masked = open_masks(folder)
    assert list(masked.classes) == ["background", "box", "tent"]
    assert (masked.mask(2) == shapes.mask(2)).all()


def edited(folder: Path, out: Path, edit: Callable[[dict], Any]) -> Path:
    """The set's JSON with one thing changed, beside links to its pictures."""
    told = json.loads((folder / "annotations/instances_train.json").read_text())
    edit(told)
    (out / "annotations").mkdir(parents=True, exist_ok=True)
    if not (out / "train").exists():
        (out / "train").symlink_to(folder / "train")
    (out / "annotations/instances_train.json").write_text(json.dumps(told))
    return out


FAULTS: dict[str, tuple[Callable[[dict], Any], str]] = {
    "no list": (lambda d: d.pop("images"), "no list 'images'"),
    "no objects": (lambda d: d["annotations"].clear(), "no annotations"),
    "no images": (lambda d: d["images"].clear(), "lists no images"),
    "odd entry": (lambda d: d["annotations"].append(5), "something else than objects"),
    "missing image": (lambda d: d["images"][2].update(file_name="else.png"), "else.png, which is not there"),
    "no size": (lambda d: d["images"][2].pop("width"), "lacks its file_name, width or height"),
    "twice": (lambda d: d["images"][2].update(id=1), "two images one id"),
    "unknown image": (lambda d: d["annotations"][0].update(image_id=99), "image 99, which is not listed"),
    "odd image": (lambda d: d["annotations"][0].update(image_id=[1]), "which is not listed"),
    "odd category": (lambda d: d["annotations"][0].update(category_id="3"), "category 3, which is not declared"),
    "unknown category": (lambda d: d["annotations"][0].update(category_id=4), "category 4, which is not declared"),
    "same category": (lambda d: d["categories"].append({"id": 3, "name": "again"}), "two with one id"),
    "polygon outside": (lambda d: d["annotations"][0].update(segmentation=[[0, 0, 70, 0, 5, 5]]), "outside its 64 x 64"),
    "box outside": (lambda d: d["annotations"][0].update(bbox=[50, 2, 30, 5]), "outside its 64 x 64"),
    "empty box": (lambda d: d["annotations"][0].update(bbox=[5, 5, 0, 5]), "with an area"),
    "odd box": (lambda d: d["annotations"][0].update(bbox=[5, 5, "3", 5]), "with an area"),
    "two points": (lambda d: d["annotations"][0].update(segmentation=[[0, 0, 5, 5]]), "less than three points"),
    "half a point": (lambda d: d["annotations"][0].update(segmentation=[[0, 0, 5, 5, 7, 8, 1]]), "half a point"),
    "short runs": (
        lambda d: d["annotations"][0].update(segmentation={"size": [64, 64], "counts": [5, 5]}),
        "do not add up",
    ),
    "wrong runs": (
        lambda d: d["annotations"][0].update(segmentation={"size": [60, 64], "counts": [3840]}),
        "neither polygons nor run lengths",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_broken_set_is_refused(folder: Path, tmp_path: Path, name: str):
    edit, message = FAULTS[name]
    with pytest.raises(CocoError, match=message):
        open_coco(edited(folder, tmp_path, edit))


def test_what_is_not_a_set_is_refused(folder: Path, tmp_path: Path):
    with pytest.raises(CocoError, match="is not there"):
        open_coco(tmp_path / "nowhere")
    with pytest.raises(CocoError, match="no annotations/instances_"):
        open_coco(tmp_path)
    (tmp_path / "half.json").write_text('{"images": [')
    with pytest.raises(CocoError, match="cannot be read as JSON"):
        open_coco(tmp_path / "half.json")
    narrow = edited(
        folder, tmp_path, lambda d: (d["images"][0].update(width=60), d["annotations"].__delitem__(slice(0, 2)))
    )
    with pytest.raises(CocoError, match=r"64 x 64 pixels, its annotations say 60 x 64"):
        open_coco(narrow).load(0)


def test_runs_crowds_and_nesting(folder: Path, tmp_path: Path):
    """A small object lies on a large one, and what is a crowd is not asked."""

    def edit(d: dict) -> None:
        runs = {"size": [64, 64], "counts": [0, 64 * 64]}
        large = {"id": 900, "image_id": 1, "category_id": 3, "bbox": [0, 0, 64, 64], "area": 4096, "segmentation": runs}
        d["annotations"][0]["iscrowd"] = 1
        d["annotations"].append(large)

    source = open_coco(edited(folder, tmp_path, edit))
    mask, crowd = source.mask(0), next(one for one in source.objects[0] if one.crowd)
    small = next(one for one in source.objects[0] if one.area < 4096 and not one.crowd)
    assert (mask[source.instance_mask(0, small) > 0] == 1 + small.label).all()
    assert (mask == 255).sum() == 0  # the picture-wide object lies on the crowd
    assert crowd.crowd
    assert set(np.unique(mask)) == {1, 1 + small.label}


@pytest.mark.parametrize("name", ["timm:test_vit", "timm:resnet18"])
@pytest.mark.parametrize("trainable", [False, True])
def test_a_pyramid_has_its_strides(name: str, trainable: bool):
    subject = open_subject(name, size=64)
    pyramid = Pyramid(subject.backbone(), 16, trainable=trainable).train()
    maps = pyramid(torch.randn(2, 3, 64, 128))
    assert {key: tuple(each.shape) for key, each in maps.items()} == {
        level: (2, 16, 64 // stride, 128 // stride)
        for level, stride in zip(("0", "1", "2", "3", "pool"), (4, 8, 16, 32, 64), strict=True)
    }
    sum(each.square().mean() for each in maps.values()).backward()
    touched = [p.grad is not None for p in pyramid.eye.parameters()]
    assert (sum(touched) > 0.8 * len(touched)) if trainable else not any(touched)
    assert not any(part.training for part in pyramid.eye.modules())
    with pytest.raises(ValueError, match="no multiples of 64"):
        pyramid(torch.zeros(1, 3, 64, 96))


def test_odd_patches_are_resampled_in_place():
    """A network of 14-pixel patches whose token is the mean place of its patch: maps at 16 pixels must say theirs."""

    class Where(nn.Module):
        stride = 14

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            tokens = F.avg_pool2d(images, 14).flatten(2).mT
            return torch.cat([tokens[:, :1], tokens], 1) * self.weight

    side = 192
    y, x = torch.meshgrid(torch.arange(side) + 0.5, torch.arange(side) + 0.5, indexing="ij")
    places = torch.stack([x, y, torch.zeros_like(x)])[None]
    last = Pyramid(Where(), 8)._last_map(places)[0]
    assert last.shape == (3, side // 16, side // 16)
    centres = 16 * torch.arange(side // 16) + 8.0
    inner = slice(1, -2)  # the border is padded or clamped
    torch.testing.assert_close(last[0, inner, inner], centres[None, inner].expand(len(centres[inner]), -1))
    torch.testing.assert_close(last[1, inner, inner], centres[inner, None].expand(-1, len(centres[inner])))


def test_perfect_answers_score_one(shapes: Coco):
    found = []
    for row in range(len(shapes)):
        _, target = example(shapes, row, False)
        answer = {**target, "scores": torch.ones(len(target["labels"])), "masks": target["masks"][:, None].float()}
        found += results(shapes, row, answer)
    for kind in ("bbox", "segm"):
        assert average_precision(shapes, found, kind) == {"ap": 1.0, "ap50": 1.0, "ap75": 1.0}
    wrong = [{**one, "category_id": 10 - one["category_id"]} for one in found]
    assert average_precision(shapes, wrong, "bbox")["ap50"] < 0.01
    assert average_precision(shapes, [], "bbox") == {"ap": 0.0, "ap50": 0.0, "ap75": 0.0}


def test_a_mirrored_example_is_the_mirror(shapes: Coco):
    image, target = example(shapes, 1, False)
    mirrored, other = example(shapes, 1, True)
    torch.testing.assert_close(mirrored.flip(2), image)
    torch.testing.assert_close(other["masks"].flip(2), target["masks"])
    for box, mask in zip(other["boxes"], other["masks"], strict=True):
        columns = mask.any(0).nonzero()
        assert abs(float(box[0]) - int(columns[0])) <= 1
        assert abs(float(box[2]) - int(columns[-1]) - 1) <= 1


def test_a_detector_learns_its_shapes(shapes: Coco):
    subject = open_subject("timm:test_vit", size=64)
    with seeded(0):
        detector = build_detector(subject, shapes, TINY)
        before = score(detector, shapes, TINY)
        losses = learn(detector, subject, shapes, TINY, 0)
        after = score(detector, shapes, TINY)
    assert sum(losses[-5:]) < 0.75 * sum(losses[:5])
    assert after["detection_box_ap50"] > 0.4
    assert after["detection_mask_ap50"] > 0.4
    assert max(before.values()) < 0.1


def test_one_seed_gives_one_table(folder: Path):
    options = dataclasses.replace(TINY, trainable=False, steps=2, batch=2)
    subject = open_subject("timm:test_vit", size=64)
    outside = torch.get_rng_state()
    first, again = (run_detection(subject, folder, folder, options, seed=5) for _ in range(2))
    assert first == again
    assert set(first) == {f"detection_{kind}_{what}" for kind in ("box", "mask") for what in ("ap", "ap50", "ap75")}
    assert torch.equal(outside, torch.get_rng_state())
    losses = []
    for seed in (5, 5, 6):
        with seeded(seed):
            source = open_coco(folder)
            losses.append(learn(build_detector(subject, source, options), subject, source, options, seed))
    assert losses[0] == losses[1] != losses[2]


def test_boxes_alone_for_a_frozen_resnet(folder: Path, tmp_path: Path):
    source = open_coco(edited(folder, tmp_path, lambda d: d["annotations"][0].pop("segmentation")))
    subject = open_subject("timm:resnet18", size=64)
    options = dataclasses.replace(TINY, trainable=False, optimizer="sgd", rate=0.01, steps=2, batch=2)
    with pytest.raises(DetectionError, match="no outline"):
        build_detector(subject, source, dataclasses.replace(options, masks=True))
    with seeded(0):
        detector = build_detector(subject, source, options)
        kept = {name: value.clone() for name, value in detector.backbone.eye.state_dict().items()}  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
        losses = learn(detector, subject, source, options, 0)
    assert len(losses) == 2
    assert all(torch.equal(kept[name], value) for name, value in detector.backbone.eye.state_dict().items())  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
    assert set(score(detector, source, options)) == {"detection_box_ap", "detection_box_ap50", "detection_box_ap75"}


def test_rates_by_depth_and_step(shapes: Coco):
    subject = open_subject("timm:test_vit", size=64)
    options = dataclasses.replace(TINY, layer_decay=0.5, rate=1.0)
    detector = build_detector(subject, shapes, options)
    groups = detection._groups(detector, subject, options)
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    layers = subject.layers(detector.backbone.eye)  # pyright: ignore[reportArgumentType]
    assert len(rates) == sum(1 for p in detector.parameters())
    for depth, layer in enumerate(layers):
        assert {rates[id(p)] for p in layer} == {0.5 ** (len(layers) - depth)}
    assert rates[id(next(detector.rpn.parameters()))] == 1.0
    assert all(group.get("weight_decay") == 0.0 for group in groups if all(p.ndim < 2 for p in group["params"]))
    assert rate_factor(0, DENSECL) == pytest.approx(1 / 1001)
    assert [rate_factor(step, DENSECL) for step in (59_999, 60_000, 80_000)] == pytest.approx([1, 0.1, 0.01])
    assert (MUGS.layer_decay, MUGS.rate, MUGS.weight_decay) == (0.8, 2e-4, 0.05)


def test_what_cannot_be_detected_is_refused(folder: Path, shapes: Coco, tmp_path: Path):
    with pytest.raises(SubjectError, match="no weights to train"):
        run_detection(open_subject("pixels", size=64), shapes, shapes, TINY, seed=0)
    subject = open_subject("timm:test_vit", size=64)
    renamed = open_coco(edited(folder, tmp_path, lambda d: d["categories"][0].update(name="crate")))
    with pytest.raises(CocoError, match="different categories"):
        run_detection(subject, shapes, renamed, TINY, seed=0)
    with pytest.raises(GristmillError, match="lower the rate"):
        run_detection(subject, shapes, shapes, dataclasses.replace(TINY, rate=1e12, clip=1e12, steps=12), seed=0)
