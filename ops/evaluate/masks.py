"""Pictures whose every pixel has a class, from whichever layout they lie in: VOC, COCO, or the demo's shards.

What segmentation reads is the same of all: a name, the picture, and a mask of class numbers as large as the picture, with 255
for pixels that nobody is asked about. The demo's masks lie beside its shards (`parts.npz`), by the images' keys; each
pixel is of the cloth or of the patch sewn upon it, eight dyes in all.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ...shards.demo import CLOTHS
from ...shards.demo import PATCHES as DYES
from ...shards.errors import GristmillError
from .coco import IGNORE, open_coco
from .voc import open_voc

PARTS = "parts.npz"


class MaskError(GristmillError):
    """Pictures without the masks that segmentation wants."""


class Masked(Protocol):
    """Pictures and the classes of their pixels, by row."""

    @property
    def keys(self) -> Sequence[str]: ...

    @property
    def classes(self) -> Sequence[str]: ...

    @property
    def identity(self) -> str: ...

    def load(self, row: int) -> Image.Image:
        """The picture, RGB."""
        ...

    def mask(self, row: int) -> NDArray[np.uint8]:
        """The class of each pixel, uint8 [H, W], of the picture's size; 255 is ignored."""
        ...


class Loadable(Protocol):
    """What the demo's shards are read by: `Pictures` is such."""

    keys: list[str]
    identity: str

    def load(self, row: int) -> Image.Image: ...


class CocoMasks:
    """COCO's outlines as classes of pixels: what no object covers is class 0."""

    def __init__(self, where: Path, split: str | None, limit: int | None) -> None:
        self._coco = open_coco(where, split, limit)
        self.keys, self.identity = self._coco.keys, self._coco.identity
        self.classes = ["background", *self._coco.classes]
        self.load, self.mask = self._coco.load, self._coco.mask


class PartMasks:
    """The demo's pictures and the dye of each of their pixels. MaskError for a picture that the masks do not know."""

    def __init__(self, pictures: Loadable, file: Path, limit: int | None = None) -> None:
        self.classes = [*CLOTHS, *DYES]
        with np.load(file, allow_pickle=False) as side:
            rows = {key: row for row, key in enumerate(side["key"].tolist())}
            self._names = [Path(path).parts[:2] for path in side["path"].tolist()]
            self._masks = side["mask"]
        self.keys = list(pictures.keys[:limit])
        lost = [key for key in self.keys if key not in rows]
        if lost:
            raise MaskError(
                f"{file} has no mask of {len(lost)} of {len(self.keys)} pictures ({lost[0]} ...): it is another set's"
            )
        self._rows, self._pictures = [rows[key] for key in self.keys], pictures
        self.identity = hashlib.blake2b(f"{pictures.identity}/{limit}".encode() + file.read_bytes()).hexdigest()[:32]

    def load(self, row: int) -> Image.Image:
        return self._pictures.load(row)

    def mask(self, row: int) -> NDArray[np.uint8]:
        cloth, patch = self._names[self._rows[row]]
        sewn = len(CLOTHS) + DYES.index(patch)
        return np.where(self._masks[self._rows[row]] == 0, CLOTHS.index(cloth), sewn).astype(np.uint8)


def open_masks(where: str | Path, split: str | None = None, limit: int | None = None) -> Masked:
    """Pictures with masks: a VOC folder, a COCO folder or its JSON, or the demo's shards with `parts.npz` beside them.

    Raises a GristmillError that says what is missing or broken; MaskError where the layout has no masks at all.
    """
    where = Path(where)
    if where.suffix == ".json" or (where / "annotations").is_dir():
        return CocoMasks(where, split, limit)
    for file in (where / PARTS, where.parent / PARTS):
        if file.is_file() and where.is_dir():
            from .pictures import open_pictures

            return PartMasks(open_pictures(where), file, limit)
    if not where.is_dir() or not any(any(where.glob(f"{depth}ImageSets")) for depth in ("", "*/", "*/*/")):
        raise MaskError(
            f"{where} has no masks of pixels: segmentation reads VOC's layout (JPEGImages, SegmentationClass, ImageSets), "
            f"COCO's (annotations/instances_*.json), or the demo's shards with {PARTS}"
        )
    return open_voc(where, split, limit)


def under_patches(mask: NDArray[np.uint8], rows: int, columns: int, classes: int) -> NDArray[np.int64]:
    """The class of most pixels under each of rows x columns cells, int64 [rows, columns]; 255 where half are ignored.

    mask uint8 [H, W]; a pixel belongs to the cell that its centre lies in. Of equally many the lower class.
    """
    height, width = mask.shape
    y = ((np.arange(height) + 0.5) * rows / height).astype(np.int64)
    x = ((np.arange(width) + 0.5) * columns / width).astype(np.int64)
    cell = y[:, None] * columns + x
    kind = np.where(mask == IGNORE, classes, mask).astype(np.int64)
    counts = np.bincount((cell * (classes + 1) + kind).ravel(), minlength=rows * columns * (classes + 1))
    counts = counts.reshape(rows, columns, classes + 1)
    best = counts[..., :classes].argmax(-1)
    return np.where(counts[..., classes] >= counts[..., :classes].sum(-1), IGNORE, best)
