"""The data sets of `gristmill bench learning`: drawn cloths, Fashion-MNIST, tiles of wallpapers, each as `train` and `probe` shards.

None is downloaded. Cloths come from shards/demo.py and know the dye under every pixel; Fashion-MNIST (Xiao et al., arXiv
1708.07747) is Debian's package dataset-fashion-mnist, with its official split; tiles are cut from Debian's wallpapers,
those of one picture apart from another but overlapping those of half its size, so that they show how a way of learning
fares on real pictures, not how well it generalises to new ones. A set is complete or absent.
"""

from __future__ import annotations

import gzip
import shutil
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ...shards.demo import MASKS, make_demo_images
from ...shards.errors import GristmillError
from ...shards.ingest import ingest_folder
from ...shards.labels import LABELS
from .photographs import SOURCES, cut_pictures

PACKAGE = Path("/usr/share/datasets/fashion-mnist")
CLASSES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle-boot")
HOLDOUT = 0.2
TILE, TILES = (192, 144), 150  # pixels of a tile, and how many of one picture at most


class LearningSetError(GristmillError):
    """A data set cannot be made on this machine."""


def make_set(name: str, folder: Path, seed: int, *, images: int | None = None) -> Path:
    """`folder/name-seed` (or `folder/name`, where no seed has a say) with `train` and `probe`; made unless it is there.

    images: about so many, of all, for a short run. Raises LearningSetError when a package is missing.
    """
    place = folder / (f"{name}-{seed}" if name == "procedural" else name)
    if (place / "probe" / "dataset.json").is_file():
        return place
    draft = place.with_name(place.name + ".draft")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    SETS[name](draft, seed, images)
    shutil.rmtree(draft / "images", ignore_errors=True)
    draft.rename(place)
    return place


def _procedural(place: Path, seed: int, images: int | None) -> None:
    make_demo_images(place / "images", images=images or 4608, seed=seed)
    ingest_folder(place / "images", place / "data", holdout=HOLDOUT)
    _bring(place / "data", place, "train", "probe", LABELS)
    (place / "images" / MASKS).rename(place / "parts.npz")


def _fashion(place: Path, seed: int, images: int | None) -> None:
    del seed
    for part, file, share in (("train", "train", 1.0), ("probe", "t10k", 1 / 6)):
        pictures, labels = (_idx(PACKAGE / f"{file}-{kind}-ubyte.gz") for kind in ("images-idx3", "labels-idx1"))
        for number in range(min(len(labels), round(share * images)) if images else len(labels)):
            home = place / "images" / part / CLASSES[labels[number]]
            home.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(home / f"{number:05}.png"), pictures[number])
        ingest_folder(place / "images" / part, place / f"{part}.data")
    # One side file, so that a class has one code in both parts.
    both = pa.concat_tables([pq.read_table(place / f"{part}.data" / LABELS) for part in ("train", "probe")])
    pq.write_table(both, place / LABELS)
    for part in ("train", "probe"):
        (place / f"{part}.data" / "train").rename(place / part)
        shutil.rmtree(place / f"{part}.data")


def _photographs(place: Path, seed: int, images: int | None) -> None:
    del seed
    most = TILES if images is None else max(2, images // 30)
    cut_pictures(
        place / "images",
        [source for source in SOURCES if source.is_dir()],
        tile=TILE,
        max_per_picture=most,
        overlap=0.0,
    )
    ingest_folder(place / "images", place / "data", holdout=HOLDOUT)
    _bring(place / "data", place, "train", "probe", LABELS)


def _bring(source: Path, place: Path, *names: str) -> None:
    for name in names:
        (source / name).rename(place / name)
    shutil.rmtree(source)


def _idx(file: Path) -> np.ndarray:
    """An IDX file of bytes, [n] or [n, height, width]."""
    if not file.is_file():
        raise LearningSetError(
            f"{file} is missing: `apt-get install dataset-fashion-mnist`, or leave fashion out (--set)"
        )
    with gzip.open(file) as stream:
        data = stream.read()
    axes = data[3]
    if data[:3] != b"\0\0\x08" or axes not in (1, 3):
        raise LearningSetError(f"{file} is no IDX file of bytes: install dataset-fashion-mnist anew")
    shape = np.frombuffer(data, ">u4", axes, 4).astype(int)
    if len(data) != 4 + 4 * axes + int(np.prod(shape)):
        raise LearningSetError(f"{file} is cut short: install dataset-fashion-mnist anew")
    return np.frombuffer(data, np.uint8, offset=4 + 4 * axes).reshape(shape)


SETS: dict[str, Callable[[Path, int, int | None], None]] = {
    "procedural": _procedural,
    "fashion": _fashion,
    "photographs": _photographs,
}
