"""Labelled pictures from whichever layout they lie in, one row each, for evaluators: whole middle squares, or as they are.

Gristmill's shards, folders of folders (ImageFolder), WebDataset tars with `.cls`, VOC and COCO (layouts.py) become one
thing: keys, labels by level, and bytes to read. Squares are cut by the executor that cuts the crops of training, so that
a probe sees the very pixels that `pipeline.probing` gives. A picture that does not decode is left out of the batches
and noted in `damaged`: a substitute would be its own nearest neighbour.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ...pipeline.augment import DecodeError
from ...pipeline.augment.colour import MEAN, STD
from ...pipeline.checks import Damage, header_size
from ...pipeline.draws import Plan, draw
from ...pipeline.views import View
from ...shards.blob import Blob, LocalBlob
from ...shards.errors import GristmillError
from ...shards.foreign import open_place
from ...shards.images import in_rgb, turned
from ...shards.places import is_remote

ORIENTATION = 0x112
INSTANCE = "instance"  # the level whose classes are single things: to be found, not to be classified

Ints = NDArray[np.int64]


class PicturesError(GristmillError):
    """Pictures that cannot be opened or read, or labels that they do not have."""


@dataclass(frozen=True)
class Spot:
    """Where a picture's bytes lie: in a file or at a url, from `offset`; all of it where the length is -1."""

    place: str
    offset: int = 0
    length: int = -1


class Pictures:
    """n pictures. keys: their names; levels: classes int64 [n] by level, coarse first, -1 unknown; names: what they mean.

    labels int64 [n] and classes are those of `level`, the finest that classifies; empty levels: nothing is labelled.
    identity: of the pictures, in their order. damaged: row -> why, of those that batches left out so far.
    """

    def __init__(
        self,
        keys: Sequence[str],
        spots: Sequence[Spot],
        identity: str,
        levels: Mapping[str, Ints | Tensor] | None = None,
        names: Mapping[str, Sequence[str]] | None = None,
        *,
        level: str | None = None,
        kind: str = "pictures",
        where: str = "",
    ) -> None:
        if not keys:
            raise PicturesError(f"{where or 'the data'} has no pictures; name a folder, shards, VOC or COCO")
        self.keys, self.spots, self.identity, self.kind, self.where = list(keys), list(spots), identity, kind, where
        self.levels = {name: torch.as_tensor(codes, dtype=torch.int64) for name, codes in (levels or {}).items()}
        self.names = {name: list(known) for name, known in (names or {}).items()}
        if level is not None and level not in self.levels:
            have = ", ".join(self.levels) or "none: its pictures are unlabelled"
            raise PicturesError(f"{where} has no labels of level {level!r}; it has {have}")
        classifying = [name for name in self.levels if name != INSTANCE or len(self.levels) == 1]
        self.level = level or (classifying[-1] if classifying else None)
        self.labels: Tensor = self.levels[self.level] if self.level else torch.full((len(self.keys),), -1)
        self.classes: list[str] = self.names[self.level] if self.level else []
        self.damaged: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self.keys)

    def read(self, row: int) -> bytes:
        """The encoded picture. PicturesError where its file cannot be read."""
        spot = self.spots[row]
        try:
            if spot.length < 0:
                return Path(spot.place).read_bytes()
            if is_remote(spot.place):
                data = _remote(spot.place).read(spot.offset, spot.length)
            else:
                with LocalBlob(spot.place) as blob:
                    data = blob.read(spot.offset, spot.length)
        except (OSError, GristmillError) as error:
            raise PicturesError(f"{self.keys[row]} cannot be read from {spot.place} ({error}); restore it") from error
        if len(data) != spot.length:
            raise PicturesError(f"{spot.place} ends before {self.keys[row]}; restore it, and index it again")
        return data

    def load(self, row: int) -> Image.Image:
        """The picture, RGB and upright. PicturesError, naming it, where it does not decode."""
        try:
            with Image.open(io.BytesIO(self.read(row))) as image:
                return turned(in_rgb(image), image.getexif().get(ORIENTATION, 1)).copy()
        except PicturesError:
            raise
        except Exception as error:  # Pillow's decoders raise nearly anything on broken input
            why = " ".join(str(error).split()) or type(error).__name__
            raise PicturesError(f"{self.keys[row]} of {self.where} does not decode ({why}); take it out") from error

    def batches(
        self, size: int, batch: int = 128, rows: Sequence[int] | Ints | Tensor | None = None, *, threads: int = 1
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """(rows int64 [b], images fp32 [b, 3, size, size]) of `rows` (default: all), in order, by batches of `batch`.

        The middle square, normalised by ImageNet's mean and spread. A batch lacks what does not decode (`damaged`), and its
        other pictures are those that it would have had; one without any is left out. The next batch is decoded meanwhile.
        """
        asked = np.arange(len(self)) if rows is None else np.asarray(rows, np.int64)
        squares = Squares(size, threads)
        parts = [asked[start : start + batch] for start in range(0, len(asked), batch)]
        with ThreadPoolExecutor(1, "gristmill-pictures") as ahead:
            waiting = ahead.submit(self._cut, parts[0], lambda data, _: squares.cut(data)) if parts else None
            for after in [*parts[1:], None]:
                if waiting is None:
                    return
                found = waiting.result()
                waiting = None if after is None else ahead.submit(self._cut, after, lambda data, _: squares.cut(data))
                if found is not None:
                    yield found

    def take(self, rows: Sequence[int] | Ints | Tensor) -> Pictures:
        """These rows alone, in this order, as pictures of their own."""
        rows = np.asarray(rows, np.int64)
        kept = torch.from_numpy(rows)
        mark = hashlib.blake2b(self.identity.encode() + rows.astype("<i8").tobytes(), digest_size=16).hexdigest()
        return Pictures(
            [self.keys[row] for row in rows],
            [self.spots[row] for row in rows],
            mark,
            {name: codes[kept] for name, codes in self.levels.items()},
            self.names,
            level=self.level,
            kind=self.kind,
            where=self.where,
        )

    def like(self, other: Pictures) -> Pictures:
        """The same pictures with the classes numbered as `other` numbers them, further ones behind; shared levels only."""
        levels, names = {}, {}
        for name, codes in self.levels.items():
            if name not in other.names:
                continue
            further = [known for known in self.names[name] if known not in set(other.names[name])]
            names[name] = [*other.names[name], *further]
            place = {known: number for number, known in enumerate(names[name])}
            moved = torch.tensor([*(place[known] for known in self.names[name]), -1])
            levels[name] = moved[codes]
        level = other.level if other.level in levels else None
        return Pictures(
            self.keys, self.spots, self.identity, levels, names, level=level, kind=self.kind, where=self.where
        )

    def crops(
        self, view: View, seed: int, batch: int = 128, rows: Sequence[int] | Ints | Tensor | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """(rows int64 [b], crops fp32 [b, view.count, 3, S, S]) as training would cut them, drawn for (seed, row)."""
        asked = np.arange(len(self)) if rows is None else np.asarray(rows, np.int64)
        squares = Squares(view.size, 1, view)
        for start in range(0, len(asked), batch):
            found = self._cut(asked[start : start + batch], lambda data, kept: squares.crops(data, kept, seed))
            if found is not None:
                yield found

    def _cut(self, rows: Ints, cut: Callable[[list[NDArray[np.uint8]], Ints], Tensor]) -> tuple[Tensor, Tensor] | None:
        """What is cut of these rows, without those that do not decode; None where none does."""
        kept, data = [], []
        for row in rows.tolist():
            try:
                data.append(self._decodable(row))
                kept.append(row)
            except Damage as error:
                self.damaged[row] = str(error)
        while kept:
            try:
                return torch.tensor(kept), cut(data, np.array(kept, np.int64))
            except DecodeError as error:
                bad = set(error.bad)
                for slot in bad:
                    self.damaged[kept[slot]] = "does not decode"
                data = [each for slot, each in enumerate(data) if slot not in bad]
                kept = [row for slot, row in enumerate(kept) if slot not in bad]
        return None

    def _decodable(self, row: int) -> NDArray[np.uint8]:
        """The picture's bytes, or those of a PNG of it where the executor does not know its format."""
        data = self.read(row)
        if Path(self.spots[row].place).suffix.lower() in (".gif", ".tif", ".tiff", ".bmp", ".ppm"):
            try:
                image = self.load(row)
            except PicturesError as error:
                raise Damage(str(error)) from error
            out = io.BytesIO()
            image.save(out, "PNG", compress_level=1)
            data = out.getvalue()
        return np.frombuffer(data, np.uint8)


class Squares:
    """Cuts the middle square of encoded pictures by the executor of training; the bits of one depend on it alone.

    view: other crops of each picture than that square.
    """

    def __init__(self, size: int, threads: int = 1, view: View | None = None) -> None:
        from ...pipeline.augment.cpu import CpuExecutor

        self.size = size
        self._view = view or View.model_validate({"name": "image", "size": size, "augment": "none"})
        self._plan = Plan([self._view])
        self._executor = CpuExecutor(self._plan, threads=threads)

    def cut(self, data: Sequence[NDArray[np.uint8]]) -> Tensor:
        """Encoded pictures -> fp32 [b, 3, size, size]. DecodeError names the slots of those that do not decode."""
        return self.crops(data, np.arange(len(data)), 0)[:, 0]

    def crops(self, data: Sequence[NDArray[np.uint8]], positions: Ints, seed: int) -> Tensor:
        """Encoded pictures -> fp32 [b, n, 3, size, size], crop i as drawn for (seed, position, i). DecodeError."""
        bad, sizes = [], []
        for slot, each in enumerate(data):
            try:
                sizes.append(header_size(each))
            except Damage:
                bad.append(slot)
        if bad:
            raise DecodeError(bad)
        draws = draw(self._plan, seed, positions, np.array(sizes))
        return self._executor.run(data, draws)[self._view.name].clone()


def open_pictures(
    path: str | Path, split: str | None = None, level: str | None = None, limit: int | None = None
) -> Pictures:
    """The labelled pictures at `path`: Gristmill shards, WebDataset tars, VOC, COCO, or folders of folders, told apart by
    what lies there. level: of the labels that classify (default: the finest but instances). limit: so many pictures from all
    over it, the same ones every time. Raises PicturesError, ManifestError, LabelsError, VocError, CocoError.
    """
    from . import layouts

    found = layouts.find(path, split, limit)
    return Pictures(
        found.keys, found.spots, found.identity, found.levels, found.names,
        level=level, kind=found.kind, where=str(path),
    )  # fmt: skip


def normalised(image: Image.Image) -> Tensor:
    """A picture as fp32 [3, H, W], normalised as the batches are."""
    values = torch.from_numpy(np.asarray(image, np.float32).copy()).permute(2, 0, 1) / 255
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (MEAN, STD))
    return (values - mean) / std


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0))


@lru_cache(64)
def _remote(place: str) -> Blob:
    return open_place(place)
