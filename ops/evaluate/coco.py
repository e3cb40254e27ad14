"""Images with boxes and outlines in COCO's format, read with the suspicion that files made by many hands deserve.

One JSON (`images`, `annotations`, `categories`; cocodataset.org, "Data format") beside a folder of images. pycocotools decodes
polygons and run lengths, so that a mask here is the mask that COCOeval scores. It trusts its input, hence what is
broken is refused when the set is opened: an image that is not there, a category that nobody declared, an outline that leaves
its picture. Pictures are read as stored, since that is the raster in which people drew.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from ...shards.errors import GristmillError

OUTSIDE = 1.0  # pixels by which an outline may leave its picture: rounding, not error
IGNORE = 255  # the class of pixels that nobody is asked about


class CocoError(GristmillError):
    """A set in COCO's format that cannot be used as it is."""


@dataclass(frozen=True)
class Instance:
    """One object: its place among `Coco.classes`, box (left, top, right, bottom) in pixels, area, and the raw outline."""

    label: int
    box: tuple[float, float, float, float]
    area: float
    crowd: bool
    outline: Any  # list of polygons, or run lengths; None where there is no more than the box


@dataclass(frozen=True)
class Picture:
    """One image: its number in the file, path, and size in pixels."""

    number: int
    path: Path
    width: int
    height: int


def coco_masks() -> Any:
    """pycocotools.mask, or CocoError that says how to get it."""
    try:
        from pycocotools import mask
    except ImportError as error:
        raise CocoError("COCO's format wants pycocotools: `pip install 'gristmill[eval]'`") from error
    return mask


class Coco:
    """Images [n] in the order of their numbers, with their objects. Opened by `open_coco`.

    keys: file names; classes: names of the categories, in the order of their ids; categories: those ids.
    """

    ignore = IGNORE

    def __init__(self, file: Path, folder: Path, limit: int | None = None) -> None:
        told = _read(file)
        self.categories = sorted(_number(entry, "categories", file) for entry in told["categories"])
        names = {entry["id"]: str(entry.get("name", entry["id"])) for entry in told["categories"]}
        if len(names) != len(told["categories"]) or not names:
            raise CocoError(f"{file} declares no categories, or two with one id; each needs its own")
        self.classes = [names[number] for number in self.categories]
        self.pictures = [_picture(entry, file, folder) for entry in told["images"]]
        self.pictures.sort(key=lambda picture: picture.number)
        numbers = [picture.number for picture in self.pictures]
        if not numbers:
            raise CocoError(f"{file} lists no images")
        if len(set(numbers)) != len(numbers):
            raise CocoError(f"{file} gives two images one id; ids must differ")
        sizes = {picture.number: picture for picture in self.pictures}
        places = {number: place for place, number in enumerate(self.categories)}
        objects: dict[int, list[Instance]] = {number: [] for number in numbers}
        for entry in told["annotations"]:
            where = f"annotation {entry.get('id', '?')} of {file}"
            number, kind = entry.get("image_id"), entry.get("category_id")
            picture = sizes.get(number) if isinstance(number, int) else None
            if picture is None:
                raise CocoError(f"{where} belongs to image {number}, which is not listed there")
            if not isinstance(kind, int) or kind not in places:
                raise CocoError(f"{where} has category {kind}, which is not declared there")
            objects[picture.number].append(_instance(entry, picture, places[kind], where))
        if not any(objects.values()):
            raise CocoError(f"{file} has no annotations: there is nothing to learn or to score")
        self.pictures = self.pictures[:limit]
        self.objects = [objects[picture.number] for picture in self.pictures]
        self.keys = [picture.path.name for picture in self.pictures]
        self.outlined = all(one.outline is not None for row in self.objects for one in row)
        self.identity = hashlib.blake2b(file.read_bytes() + f"/{limit}".encode(), digest_size=16).hexdigest()

    def __len__(self) -> int:
        return len(self.pictures)

    def load(self, row: int) -> Image.Image:
        """The picture as RGB. CocoError if it cannot be read or has another size than the file says."""
        picture = self.pictures[row]
        image = read_rgb(picture.path, CocoError)
        if image.size != (picture.width, picture.height):
            raise CocoError(
                f"{picture.path} has {image.width} x {image.height} pixels, its annotations say "
                f"{picture.width} x {picture.height}; use the images that were annotated"
            )
        return image

    def instance_mask(self, row: int, one: Instance) -> NDArray[np.uint8]:
        """Pixels of an object, uint8 [H, W] of 0 and 1; its box where nothing finer is known."""
        picture = self.pictures[row]
        if one.outline is None:
            mask = np.zeros((picture.height, picture.width), np.uint8)
            left, top, right, bottom = (round(side) for side in one.box)
            mask[max(0, top) : bottom, max(0, left) : right] = 1
            return mask
        return coco_masks().decode(run_lengths(one.outline, picture.height, picture.width))

    def mask(self, row: int) -> NDArray[np.uint8]:
        """The class of each pixel, uint8 [H, W]: 0 is background, 1 the first of `classes`, 255 crowds.

        A smaller object lies on a larger one. CocoError for more classes than a byte holds.
        """
        if len(self.classes) >= IGNORE:
            raise CocoError(f"{len(self.classes)} categories do not fit a mask of bytes; choose fewer than {IGNORE}")
        picture = self.pictures[row]
        mask = np.zeros((picture.height, picture.width), np.uint8)
        for one in sorted(self.objects[row], key=lambda one: (not one.crowd, -one.area)):
            mask[self.instance_mask(row, one) > 0] = IGNORE if one.crowd else 1 + one.label
        return mask

    def labels(self) -> NDArray[np.int64]:
        """The class of each image's largest object, int64 [n], an index to `classes`; -1 where there is none."""
        largest = [
            max((one for one in row if not one.crowd), key=lambda one: one.area, default=None) for row in self.objects
        ]
        return np.array([-1 if one is None else one.label for one in largest], np.int64)


def open_coco(where: str | Path, split: str | None = None, limit: int | None = None) -> Coco:
    """A set by its JSON file, or by a folder with `annotations/instances_<split>.json`.

    Images lie in a folder of the split's name, in `images` (or `images/<split>`), or beside the JSON file. limit: the first
    so many images. Raises CocoError, naming the fault, for a set that is not there, ambiguous or broken.
    """
    where = Path(where)
    if where.is_dir():
        found = sorted((where / "annotations").glob(f"instances_{split or '*'}.json"))
        if len(found) != 1:
            names = ", ".join(path.stem.removeprefix("instances_") for path in found)
            what = f"several splits ({names}): name one" if found else f"no annotations/instances_{split or '*'}.json"
            raise CocoError(f"{where} has {what}")
        file, root, name = found[0], where, found[0].stem.removeprefix("instances_")
    elif where.is_file():
        file, root, name = where, where.parent, split or where.stem.removeprefix("instances_")
    else:
        raise CocoError(f"{where} is not there; name a COCO folder or its JSON file")
    roots = [root, root.parent] if root.name == "annotations" else [root]
    folders = [base / part for base in roots for part in (name, f"images/{name}", "images")]
    return Coco(file, next((folder for folder in folders if folder.is_dir()), root), limit)


def run_lengths(outline: Any, height: int, width: int) -> Any:
    """Polygons or uncompressed run lengths as pycocotools wants them: one compressed run-length code."""
    masks = coco_masks()
    if isinstance(outline, list):
        return masks.merge(masks.frPyObjects(outline, height, width))
    return masks.frPyObjects(outline, height, width) if isinstance(outline["counts"], list) else outline


def silent(function: Any, *arguments: Any) -> Any:
    """Call what prints: pycocotools talks to standard output, which belongs to whoever asked for JSON."""
    with redirect_stdout(StringIO()):
        return function(*arguments)


def read_rgb(path: Path, error: type[GristmillError]) -> Image.Image:
    """A picture as stored, in RGB; `error` names the file if it cannot be read."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as fault:
        raise error(f"{path} cannot be read as a picture ({fault}); repair it or leave it out of the set") from fault


def _read(file: Path) -> dict[str, list[dict[str, Any]]]:
    try:
        told = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise CocoError(f"{file} cannot be read as JSON: {error}") from error
    for part in ("images", "annotations", "categories"):
        if not isinstance(told, dict) or not isinstance(told.get(part), list):
            raise CocoError(f"{file} has no list {part!r}, so it is not in COCO's format")
        if not all(isinstance(entry, dict) for entry in told[part]):
            raise CocoError(f"{file}: the list {part!r} holds something else than objects")
    return told


def _number(entry: dict[str, Any], part: str, file: Path) -> int:
    if not isinstance(entry.get("id"), int):
        raise CocoError(f"{file}: an entry of {part!r} has no whole number as id")
    return entry["id"]


def _picture(entry: dict[str, Any], file: Path, folder: Path) -> Picture:
    number = _number(entry, "images", file)
    name, width, height = entry.get("file_name"), entry.get("width"), entry.get("height")
    if not name or not isinstance(width, int) or not isinstance(height, int) or min(width, height) < 1:
        raise CocoError(f"image {number} of {file} lacks its file_name, width or height")
    path = folder / name
    if not path.is_file():
        raise CocoError(f"image {number} of {file} should be {path}, which is not there")
    return Picture(number, path, width, height)


def _numbers(value: Any) -> TypeGuard[list[float]]:
    return isinstance(value, list) and all(isinstance(one, int | float) for one in value)


def _instance(entry: dict[str, Any], picture: Picture, label: int, where: str) -> Instance:
    box = entry.get("bbox")
    if not _numbers(box) or len(box) != 4 or min(box[2:]) <= 0:
        raise CocoError(f"{where} has no box [left, top, width, height] with an area: {box}")
    left, top, right, bottom = (float(side) for side in (box[0], box[1], box[0] + box[2], box[1] + box[3]))
    outline = entry.get("segmentation") or None
    corners = [(left, top), (right, bottom)]
    if isinstance(outline, list):
        for polygon in outline:
            if not _numbers(polygon) or len(polygon) < 6 or len(polygon) % 2:
                raise CocoError(f"{where} has a polygon of less than three points, or half a point")
            corners += zip(polygon[::2], polygon[1::2], strict=True)
    elif outline is not None:
        size, counts = [picture.height, picture.width], outline.get("counts") if isinstance(outline, dict) else None
        if counts is None or list(outline.get("size", [])) != size:
            raise CocoError(f"{where} has an outline that is neither polygons nor run lengths for {size} pixels")
        if isinstance(counts, list) and (not _numbers(counts) or sum(counts) != size[0] * size[1]):
            raise CocoError(f"{where} has run lengths that do not add up to its image's {size[0]} x {size[1]} pixels")
    for x, y in corners:
        if not (-OUTSIDE <= x <= picture.width + OUTSIDE and -OUTSIDE <= y <= picture.height + OUTSIDE):
            raise CocoError(f"{where} reaches ({x}, {y}), outside its {picture.width} x {picture.height} image")
    area = float(entry.get("area", box[2] * box[3]))
    return Instance(label, (left, top, right, bottom), area, bool(entry.get("iscrowd", 0)), outline)


def labels_of(sets: Sequence[Coco]) -> list[str]:
    """The classes that several sets share. CocoError if they differ, since a number would mean two things."""
    for other in sets[1:]:
        if (other.categories, other.classes) != (sets[0].categories, sets[0].classes):
            raise CocoError("the sets to learn from and to score declare different categories; use one list for both")
    return sets[0].classes
