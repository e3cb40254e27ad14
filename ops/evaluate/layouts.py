"""Which pictures lie somewhere, and what their labels are: the five layouts that evaluation reads.

Told apart by what is there: `dataset.json` (Gristmill's shards, labels in `labels.parquet`), tars (WebDataset, the class
a number in `.cls`), `annotations/instances_*.json` (COCO), `ImageSets` or `Annotations` beside `JPEGImages` (VOC), else
folders of pictures whose names are the classes, up to three levels of them. An image with several objects is of the
class of its largest one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from ...pipeline.order import Order
from ...shards.blob import LocalBlob
from ...shards.foreign import close_blob, open_place
from ...shards.index import sample_shard, split_name
from ...shards.labels import Labels
from ...shards.manifest import DATASET
from ...shards.mirror import open_manifest
from ...shards.places import find_shards, is_remote
from ...shards.tombstones import Tombstones
from .pictures import Ints, PicturesError, Spot

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
LEVELS: tuple[tuple[str, ...], ...] = ((), ("class",), ("coarse", "fine"), ("coarse", "fine", "instance"))
SPLITS = {"train", "val", "valid", "validation", "test", "probe"}


@dataclass(frozen=True)
class Layout:
    """What was found: keys and spots [n], codes int64 [n] and names of the classes by level, a digest of the pictures."""

    kind: str
    keys: Sequence[str]
    spots: Sequence[Spot]
    identity: str
    levels: Mapping[str, Ints] = field(default_factory=dict)
    names: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def limited(self, limit: int | None) -> Layout:
        """So many of them, drawn from all over, in their order."""
        if limit is None or limit >= len(self.keys):
            return self
        rows = np.sort(np.random.default_rng(0).permutation(len(self.keys))[:limit])
        return replace(
            self,
            keys=[self.keys[row] for row in rows],
            spots=[self.spots[row] for row in rows],
            identity=_digest([self.identity, str(limit)]),
            levels={name: codes[rows] for name, codes in self.levels.items()},
        )


def find(path: str | Path, split: str | None, limit: int | None) -> Layout:
    """What lies at `path`; of several splits the one that is asked for. PicturesError says what else could be named."""
    if is_remote(str(path)):
        return _shards(f"{path}/{split}" if split else str(path), limit)
    root = Path(str(path).removeprefix("file://"))
    if not root.exists() and "{" not in str(path):
        raise PicturesError(f"{path}: there is no such folder; name pictures, shards, a VOC or a COCO folder")
    for known, reader in READERS.items():
        if known(root):
            return reader(root, split).limited(limit)
    inside = root / split if split else root
    if not inside.exists():
        parts = ", ".join(sorted(each.name for each in root.iterdir() if each.is_dir())) or "no folders"
        raise PicturesError(f"{root} has no split {split!r}; it holds {parts}")
    parts = [inside] if (inside / DATASET).is_file() else sorted(each.parent for each in inside.glob(f"*/{DATASET}"))
    if len(parts) > 1:
        raise PicturesError(f"{inside} holds the splits {', '.join(each.name for each in parts)}; name one of them")
    if parts:
        return _shards(parts[0], limit)
    if _has_tars(inside):
        return _tars(inside).limited(limit)
    return _folders(inside).limited(limit)


def splits(path: str | Path) -> tuple[str, str] | None:
    """Names of the parts to learn from and to ask, where a folder holds both."""
    root = Path(str(path))
    for first in ("train", "trainset"):
        for second in ("val", "validation", "valid", "test", "probe"):
            if (root / first).is_dir() and (root / second).is_dir():
                return first, second
    return None


def _shards(root: Path | str, limit: int | None) -> Layout:
    """Gristmill's, in the order and choice of `pipeline.probing`, without what was removed."""
    manifest = open_manifest(root)
    if limit is None or limit >= manifest.samples:
        shards = np.repeat(np.arange(len(manifest.counts)), manifest.counts)
        rows = np.concatenate([np.arange(count) for count in manifest.counts])
    else:
        shards, rows = Order(manifest.counts, seed=0).locate(np.arange(limit))
    removed = {tuple(place) for place in Tombstones.of(manifest).places(manifest.urls).tolist()}
    keys, spots = [], []
    for shard, row in zip(shards.tolist(), rows.tolist(), strict=True):
        if (shard, row) in removed:
            continue
        known = manifest.rows(shard)
        keys.append(known.keys[row])
        spots.append(Spot(manifest.place(shard), int(known.offset[row]), int(known.length[row])))
    identity = _digest(["shards", manifest.digest, str(limit), *(f"{s}/{r}" for s, r in sorted(removed))])
    labels = Labels.open(manifest.root)
    found = labels.names if labels else []
    levels = {name: labels.codes(keys, name) for name in found} if labels else {}
    return Layout(
        "Gristmill shards", keys, spots, identity, levels, {n: labels.classes(n) for n in found} if labels else {}
    )


def _tars(root: Path) -> Layout:
    """WebDataset: the class of a sample is the number in its `.cls`; what a class is called, a line of `classes.txt`."""
    keys: list[str] = []
    spots: list[Spot] = []
    told: list[str] = []
    marks = ["tars"]
    for place in find_shards([str(root)]):
        blob = open_place(place)
        try:
            found = sample_shard(blob)
            rows, members = found.rows, found.members
            sides = {}
            for at, name in enumerate(members.names):
                key, suffix = split_name(name)
                if suffix.lower() == "cls":
                    sides[key] = blob.read(int(members.offsets[at]), int(members.lengths[at])).decode(
                        "utf-8", "replace"
                    )
            marks += [Path(place).name, rows.digest(), blob.identity()]
        finally:
            close_blob(blob)
        keys += rows.keys
        spots += [Spot(place, int(o), int(n)) for o, n in zip(rows.offset, rows.length, strict=True)]
        told += [sides.get(key, "").strip() for key in rows.keys]
    if not keys:
        raise PicturesError(f"{root} holds tars without a picture in them; name WebDataset shards of images")
    if odd := next((key for key, text in zip(keys, told, strict=True) if text and not text.isdecimal()), None):
        raise PicturesError(f"{root}: the .cls of sample {odd} is no number; a class is a whole number from 0")
    if not any(told):
        return Layout("WebDataset", keys, spots, _digest(marks))
    folder = root if root.is_dir() else root.parent
    listed = folder / "classes.txt"
    numbers = sorted({int(text) for text in told if text})
    lines = listed.read_text(encoding="utf-8").splitlines() if listed.is_file() else []
    if lines and numbers[-1] >= len(lines):
        raise PicturesError(f"{listed} names {len(lines)} classes, but there is a sample of class {numbers[-1]}")
    names = [f"{number}: {lines[number]}" if lines else str(number) for number in numbers]
    place_of = {number: code for code, number in enumerate(numbers)}
    codes = np.array([place_of[int(text)] if text else -1 for text in told], np.int64)
    return Layout("WebDataset", keys, spots, _digest(marks), {"class": codes}, {"class": names})


def _coco(root: Path, split: str | None) -> Layout:
    from .coco import open_coco

    found = open_coco(root, split)
    spots = [Spot(str(picture.path)) for picture in found.pictures]
    identity = _digest(["coco", *_stamps(spots)])
    return Layout("COCO", found.keys, spots, identity, {"class": found.labels()}, {"class": found.classes})


def _voc(root: Path, split: str | None) -> Layout:
    """By the masks where the split is one of segmentation, else by the boxes."""
    from .voc import CLASSES, open_voc

    top = next((each for each in (root, *sorted(root.glob("*")), *sorted(root.glob("*/*"))) if _is_voc(each)), root)
    masked = top / "ImageSets" / "Segmentation"
    if masked.is_dir() and (split is None or (masked / f"{split}.txt").is_file()):
        found = open_voc(root, split)
        spots = [Spot(str(found.root / "JPEGImages" / f"{name}.jpg")) for name in found.keys]
        identity = _digest(["voc", *_stamps(spots)])
        return Layout("VOC", found.keys, spots, identity, {"class": found.labels()}, {"class": found.classes})
    listed = top / "ImageSets" / "Main" / f"{split}.txt"
    if split is not None and not listed.is_file():
        known = sorted({each.stem for each in top.glob("ImageSets/*/*.txt")})
        raise PicturesError(f"{top} has no split {split!r}; it has {', '.join(known) or 'no ImageSets'}")
    names = listed.read_text().split() if split else sorted(each.stem for each in (top / "JPEGImages").glob("*.jpg"))
    spots = [Spot(str(top / "JPEGImages" / f"{name}.jpg")) for name in names]
    told = [_largest(top / "Annotations" / f"{name}.xml") for name in names]
    classes = [*CLASSES[1:], *sorted({each for each in told if each is not None} - {*CLASSES})]
    codes = np.array([-1 if each is None else classes.index(each) for each in told], np.int64)
    return Layout("VOC", names, spots, _digest(["voc", *_stamps(spots)]), {"class": codes}, {"class": classes})


def _largest(path: Path) -> str | None:
    """The class of the largest box in one of VOC's annotations."""
    try:
        boxes = []
        for one in ElementTree.parse(path).getroot().iter("object"):
            left, top, right, bottom = (
                float(one.findtext(f"bndbox/{side}") or "nan") for side in ("xmin", "ymin", "xmax", "ymax")
            )
            boxes.append(((right - left) * (bottom - top), (one.findtext("name") or "").strip()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, ElementTree.ParseError) as error:
        raise PicturesError(f"{path} cannot be read ({error}); mend it, or leave its picture out") from error
    return max(boxes)[1] if boxes else None


def _folders(root: Path) -> Layout:
    paths = sorted(each for each in root.rglob("*") if each.suffix.lower() in SUFFIXES and each.is_file())
    paths = [each for each in paths if not any(part.startswith(".") for part in each.relative_to(root).parts)]
    if not paths:
        raise PicturesError(f"{root} holds no pictures ({', '.join(SUFFIXES)}), shards, VOC or COCO; name what does")
    parts = [each.relative_to(root).parts[:-1] for each in paths]
    tops = {each[0] for each in parts if each}
    if len(tops) > 1 and tops <= SPLITS:
        raise PicturesError(f"{root} holds the splits {', '.join(sorted(tops))}; name one of them, not all together")
    levels, names = {}, {}
    depth = min(3, max(map(len, parts)))
    for level, name in enumerate(LEVELS[depth], 1):
        told = ["/".join(each[:level]) if len(each) >= level else None for each in parts]
        known = sorted({each for each in told if each is not None})
        place = {each: code for code, each in enumerate(known)}
        levels[name] = np.array([-1 if each is None else place[each] for each in told], np.int64)
        names[name] = known
    keys = [each.relative_to(root).as_posix() for each in paths]
    spots = [Spot(str(each)) for each in paths]
    return Layout("folders", keys, spots, _digest(["folders", *keys, *_stamps(spots)]), levels, names)


def _stamps(spots: Iterable[Spot]) -> list[str]:
    """Names, sizes and times of change: what tells files apart without reading them."""
    stamps = []
    for spot in spots:
        try:
            with LocalBlob(spot.place) as blob:
                stamps.append(f"{Path(spot.place).name} {blob.identity()}")
        except OSError as error:
            raise PicturesError(f"{spot.place} cannot be read ({error.strerror}); restore it, or unlist it") from error
    return stamps


def _digest(parts: Iterable[str]) -> str:
    state = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = part.encode("utf-8", "surrogateescape")
        state.update(len(data).to_bytes(8, "little") + data)
    return state.hexdigest()


def _has_tars(root: Path) -> bool:
    return root.suffix == ".tar" or "{" in root.name or (root.is_dir() and any(root.glob("*.tar")))


def _is_voc(root: Path) -> bool:
    return (root / "JPEGImages").is_dir()


def _is_coco(root: Path) -> bool:
    return root.suffix == ".json" or (root.is_dir() and any((root / "annotations").glob("instances_*.json")))


def _any_voc(root: Path) -> bool:
    return any(_is_voc(each) for each in (root, root / "VOCdevkit", *root.glob("VOC*"), *root.glob("VOCdevkit/*")))


READERS: dict[Callable[[Path], bool], Callable[[Path, str | None], Layout]] = {_is_coco: _coco, _any_voc: _voc}
