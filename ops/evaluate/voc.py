"""PASCAL VOC's folders: pictures, palette masks, lists of names, and boxes.

`JPEGImages/NAME.jpg`, `SegmentationClass/NAME.png` whose palette index is the class (0 background, 255 the undecided
border), `ImageSets/Segmentation/SPLIT.txt` (Everingham et al., IJCV 2010; the development kit's document, section 2).
The classes are VOC's twenty, unless a file `classes.txt` beside them names others, one a line, the background first.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from ...shards.errors import GristmillError
from .coco import IGNORE, read_rgb

CLASSES: tuple[str, ...] = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
    "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip


class VocError(GristmillError):
    """A folder in VOC's layout that cannot be used as it is."""


class Voc:
    """Pictures and their masks by name. keys: names without suffix; classes: the background first."""

    ignore = IGNORE

    def __init__(self, root: Path, names: list[str], classes: list[str]) -> None:
        self.root, self.keys, self.classes = root, names, classes
        for name in names:
            for path in (self._image(name), self._mask(name)):
                if not path.is_file():
                    raise VocError(f"{path} is not there, though the split names {name!r}")
        listed = "\n".join([str(len(classes)), *names]).encode()
        sizes = b"".join(self._mask(name).stat().st_size.to_bytes(8, "little") for name in names)
        self.identity = hashlib.blake2b(listed + sizes, digest_size=16).hexdigest()

    def __len__(self) -> int:
        return len(self.keys)

    def load(self, row: int) -> Image.Image:
        """The picture as RGB, as stored."""
        return read_rgb(self._image(self.keys[row]), VocError)

    def mask(self, row: int) -> NDArray[np.uint8]:
        """The class of each pixel, uint8 [H, W], 255 where nobody is asked.

        VocError for a mask that is no palette picture, shows a class that is not listed, or is not as large as its picture.
        """
        path = self._mask(self.keys[row])
        try:
            with Image.open(path) as image:
                if image.mode not in ("P", "L"):
                    raise VocError(f"{path} has mode {image.mode}; a mask holds one class number a pixel (mode P or L)")
                mask = np.array(image)
        except (OSError, UnidentifiedImageError) as fault:
            raise VocError(f"{path} cannot be read as a mask ({fault}); repair it or leave it out") from fault
        odd = sorted({int(number) for number in np.unique(mask)} - set(range(len(self.classes))) - {IGNORE})
        if odd:
            raise VocError(
                f"{path} shows class {odd[0]}; known are 0 to {len(self.classes) - 1}, and {IGNORE} to ignore"
            )
        size = self._size(self._image(self.keys[row]))
        if mask.shape != size[::-1]:
            raise VocError(f"{path} has {mask.shape[1]} x {mask.shape[0]} pixels, its picture {size[0]} x {size[1]}")
        return mask

    def labels(self) -> NDArray[np.int64]:
        """The class, but for background, of most pixels of each image, int64 [n], an index to `classes`; -1: there is none."""
        labels = []
        for row in range(len(self)):
            counts = np.bincount(self.mask(row).ravel(), minlength=IGNORE + 1)[1 : len(self.classes)]
            labels.append(1 + int(counts.argmax()) if counts.any() else -1)
        return np.array(labels, np.int64)

    @staticmethod
    def _size(path: Path) -> tuple[int, int]:
        try:
            with Image.open(path) as image:
                return image.size
        except (OSError, UnidentifiedImageError) as fault:
            raise VocError(f"{path} cannot be read as a picture ({fault}); repair it or leave it out") from fault

    def _image(self, name: str) -> Path:
        return self.root / "JPEGImages" / f"{name}.jpg"

    def _mask(self, name: str) -> Path:
        return self.root / "SegmentationClass" / f"{name}.png"


def open_voc(root: str | Path, split: str | None = None, limit: int | None = None) -> Voc:
    """The split of a VOC folder (`VOC2012`, or one above it: `VOCdevkit/VOC2012`); the first `limit` names.

    Without a split the only one there is. Raises VocError, naming the fault.
    """
    root = Path(root)
    depths = ("ImageSets/Segmentation", "*/ImageSets/Segmentation", "*/*/ImageSets/Segmentation")
    places = next((places for depth in depths if (places := sorted(root.glob(depth)))), [])
    if len(places) != 1:
        what = f"{len(places)} folders ImageSets/Segmentation: name one of their sets" if places else ""
        raise VocError(f"{root} has {what or 'no ImageSets/Segmentation: it is not a VOC folder with masks'}")
    lists = places[0]
    found = {path.stem: path for path in sorted(lists.glob("*.txt"))}
    if split is None and len(found) == 1:
        split = next(iter(found))
    if split not in found:
        known = ", ".join(found) or "none"
        raise VocError(f"{lists} has {'several splits, name one' if split is None else f'no split {split!r}'}: {known}")
    names = found[split].read_text().split()
    if not names or len(set(names)) != len(names):
        raise VocError(f"{found[split]} names no picture, or one of them twice")
    top = lists.parent.parent
    listed = top / "classes.txt"
    classes: list[str] = listed.read_text().split() if listed.is_file() else [*CLASSES]
    return Voc(top, names[:limit], classes)
