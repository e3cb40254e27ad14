"""Labelled pictures as training batches, altered by torchvision's and timm's transforms, the same ones every time.

These libraries draw from the process's global generators. Here each picture is altered with those generators set from
(seed, epoch, row) by the data path's Philox, and set back afterwards: what a picture becomes depends neither on the
number of worker processes nor on what was drawn before, and nobody else's draws move.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, Protocol

import numpy as np
import torch
from PIL import Image
from timm.data.transforms_factory import create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import InterpolationMode, v2

from ...pipeline.philox import words
from ...shards.errors import GristmillError

Augment = Literal["crop", "strong"]
# Streams of the seed, as in pipeline/philox.py: no two purposes share one.
PICTURE, SHUFFLE, MIX = 6000, 6001, 6002


class Labelled(Protocol):
    """What is needed of ops/evaluate/pictures.py's Pictures."""

    @property
    def labels(self) -> Any: ...

    @property
    def classes(self) -> list[str]: ...

    def load(self, row: int) -> Image.Image: ...

    def batches(self, size: int, batch: int = 128, rows: Any = None) -> Iterator[tuple[Any, Tensor]]: ...


@contextmanager
def drawn(seed: int, stream: int, epoch: int, row: int) -> Iterator[None]:
    """Python's, NumPy's and torch's (CPU) global generators as (seed, stream, epoch, row) sets them; set back on leaving."""
    kept = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    a, b, c, d = words(seed, (epoch << 32) | row, stream, 4).tolist()
    try:
        random.seed(a << 32 | b)
        np.random.seed(c)  # noqa: NPY002 (timm draws from it)
        torch.default_generator.manual_seed(d << 32 | c)
        yield
    finally:
        random.setstate(kept[0])
        np.random.set_state(kept[1])  # noqa: NPY002
        torch.set_rng_state(kept[2])


def shuffled(rows: Tensor, seed: int, epoch: int) -> Tensor:
    """The rows, int64 [n], in the order of this epoch."""
    drawn = words(seed, np.arange(len(rows), dtype=np.int64) | (epoch << 32), SHUFFLE, 1)[:, 0]
    return rows[torch.from_numpy(np.argsort(drawn, kind="stable"))]


def transform(
    augment: Augment,
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    policy: str = "rand-m9-mstd0.5-inc1",
    erase: float = 0.25,
) -> Any:
    """PIL picture to float32 [3, size, size], normalised.

    "crop": a random crop of 8 % to 100 % and a flip, as DINO's and MoCo's linear probes train. "strong": besides,
    RandAugment and erasing, as BEiT fine-tunes and Mugs trains all its probes.
    """
    if augment == "crop":
        return v2.Compose(
            [
                v2.RandomResizedCrop(size, interpolation=InterpolationMode.BILINEAR, antialias=True),
                v2.RandomHorizontalFlip(),
                v2.PILToTensor(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(list(mean), list(std)),
            ]
        )
    made: Any = create_transform(
        size,
        is_training=True,
        auto_augment=policy or None,
        color_jitter=0.0 if policy else 0.4,
        interpolation="bicubic",
        re_prob=erase,
        re_mode="pixel",
        mean=tuple(mean),
        std=tuple(std),
    )
    for step in made.transforms:
        for operation in getattr(step, "ops", ()):
            if operation.name.startswith("Posterize"):
                operation.level_fn = _at_least_one_bit(operation.level_fn)
    return made


def _at_least_one_bit(level: Any) -> Any:
    """At its highest magnitude timm posterises to 0 bits, which Pillow refuses since 13 (before, it gave a black picture)."""
    return lambda magnitude, settings: (max(1, level(magnitude, settings)[0]),)


class _Altered(Dataset[tuple[int, Tensor | None]]):
    """Of (epoch, row), the row and the picture as it is then; None where it does not decode."""

    def __init__(self, pictures: Labelled, change: Any, seed: int) -> None:
        self.pictures, self.change, self.seed = pictures, change, seed

    def __getitem__(self, index: Any) -> tuple[int, Tensor | None]:
        epoch, row = index
        try:
            picture = self.pictures.load(row).convert("RGB")
        except GristmillError:
            return row, None
        with drawn(self.seed, PICTURE, epoch, row):
            return row, self.change(picture)


def _stacked(items: list[tuple[int, Tensor | None]]) -> tuple[Tensor, Tensor]:
    found = [(row, picture) for row, picture in items if picture is not None]
    rows = torch.tensor([row for row, _ in found], dtype=torch.int64)
    return rows, torch.stack([picture for _, picture in found]) if found else torch.empty(0, 3, 0, 0)


def augmented_batches(
    pictures: Labelled, batches: Iterable[tuple[int, Tensor]], change: Any, *, seed: int, workers: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """(rows int64 [b], altered pictures float32 [b, 3, S, S]) for each of `batches`, (epoch, rows int64 [b]).

    change: of `transform`. A picture that does not decode is missing from its batch, which may leave none.
    workers: processes that read and alter pictures; 0 does it here. They live until the last batch, so a run of many
    epochs asks once.
    """
    loader = DataLoader(
        _Altered(pictures, change, seed),
        batch_sampler=([(epoch, row) for row in rows.tolist()] for epoch, rows in batches),  # pyright: ignore[reportArgumentType]
        collate_fn=_stacked,
        num_workers=workers,
        # Its own, or the loader would take a number of the global one for its workers' seeds.
        generator=torch.Generator(),
    )
    yield from loader
