"""One small data set, the stream that nothing disturbs, and what must hold of any other stream read from it.

A slot is compared by sample, draws and pixels. Where its own sample is damaged, what stands there is computed apart from
the reader: the first healthy sample of the sequence that (seed, position) decides, cut by the position's own draws.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from gristmill.pipeline.batch import Batch, Executor
from gristmill.pipeline.draws import Draws, Plan, draw
from gristmill.pipeline.loader import Loader
from gristmill.pipeline.philox import SUBSTITUTE, integers
from gristmill.pipeline.source import Source
from gristmill.pipeline.stream import Stream
from gristmill.pipeline.views import StreamConfig
from gristmill.shards.foreign import index_dataset
from gristmill.shards.manifest import Manifest
from gristmill.shards.quarantine import Quarantine
from PIL import Image

from ..pipeline.pictures import VIEWS, PlainExecutor, picture

SHARDS, PER_SHARD, BATCH = 8, 12, 8
N = SHARDS * PER_SHARD
SLOTS = 2 * N  # two epochs
CONFIG = StreamConfig(seed=11, lanes=3, window=16, reader_threads=2, prefetch=2, damage_bound=0.25, deadline=120.0)
PLAN = Plan(VIEWS)
IMAGES = [picture(index) for index in range(N)]

Place = tuple[int, int]  # shard, row


class Slot(NamedTuple):
    """What one slot held: the sample, and sha256 of its draws with their geometry, and of its pixels."""

    place: Place
    key: str
    draws: str
    pixels: str


class Noting:
    """An executor that gives the draws along with the views, as one more tensor of the batch. Made where it runs."""

    def __init__(self, make: Callable[[], Executor]) -> None:
        self._make, self._inner = make, None

    def run(self, data: list[np.ndarray], draws: Draws) -> dict[str, torch.Tensor]:
        self._inner = self._inner or self._make()
        return {**self._inner.run(data, draws), "draws": torch.from_numpy(draws.params.copy())}


def plain() -> Executor:
    return Noting(PlainExecutor)


def dali() -> Executor:
    from gristmill.pipeline.augment.dali import DaliExecutor

    return Noting(lambda: DaliExecutor(PLAN, batch=BATCH))


def place_of(index: int) -> Place:
    return index // PER_SHARD, index % PER_SHARD


def sample_name(index: int) -> str:
    return f"k{index:03d}.jpg"


def write_set(
    root: Path, *, deep: bool = True, images: Sequence[bytes] = IMAGES, name: Callable[[int], str] = sample_name
) -> Manifest:
    """Eight tars of twelve images, and their manifest as `gristmill index` makes it."""
    root.mkdir(parents=True)
    for shard in range(SHARDS):
        with tarfile.open(root / f"{shard:06d}.tar", "w") as tar:
            for index in range(shard * PER_SHARD, (shard + 1) * PER_SHARD):
                info = tarfile.TarInfo(name(index))
                info.size = len(images[index])
                tar.addfile(info, io.BytesIO(images[index]))
    index_dataset([str(path.absolute()) for path in sorted(root.glob("*.tar"))], root, deep=deep)
    return Manifest.open(root)


def offset_of(manifest: Manifest, index: int) -> int:
    """Where a sample's bytes begin in its tar; its header is the block before."""
    shard, row = place_of(index)
    return int(manifest.rows(shard).offset[row])


def load(manifest: Manifest, quarantine: Quarantine, executor: Executor | None = None, **options: Any) -> Loader:
    config = options.pop("config", CONFIG)
    stream = Stream([Source.of(manifest)], config.seed, config.lanes, config.window)
    options = {"batch": BATCH, "order": stream, "stall": 120.0} | options
    return Loader(manifest, VIEWS, config, quarantine=quarantine, executor=executor or plain(), **options)


def slots_of(batch: Batch, size: int = BATCH) -> list[Slot]:
    """The slots of a batch, which must be full."""
    assert len(batch.keys) == len(batch.ids) == size
    assert {len(tensor) for kind in (batch.views, batch.geometry) for tensor in kind.values()} == {size}
    noted = {"draws": batch.views["draws"], **batch.geometry}
    pixels = {view.name: batch.views[view.name] for view in VIEWS}
    places = [(int(shard), int(row)) for shard, row in batch.ids]
    return [
        Slot(place, key, _sha(noted, at), _sha(pixels, at))
        for at, (place, key) in enumerate(zip(places, batch.keys, strict=True))
    ]


def take(loader: Loader, slots: int) -> list[Slot]:
    """So many slots from where the loader stands."""
    got: list[Slot] = []
    while len(got) < slots:
        got += slots_of(next(loader))
    return got


def until_it_stops(loader: Loader, error: type[Exception], match: str) -> list[Slot]:
    """All slots before the error, which comes out again until a seek."""
    got: list[Slot] = []
    begin = loader.position

    def read() -> None:
        while len(got) < SLOTS:
            got.extend(slots_of(next(loader)))

    for _ in range(2):
        with pytest.raises(error, match=match):
            read()
        assert loader.position == begin + len(got) < SLOTS
    return got


def _sha(tensors: dict[str, torch.Tensor], at: int) -> str:
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(np.ascontiguousarray(tensors[name][at].numpy()).tobytes())
    return found.hexdigest()


def substitute(position: int, bad: Collection[Place]) -> Place:
    """The sample that (seed, position) decides on where the own one is damaged."""
    numbers = integers(CONFIG.seed, [position], SUBSTITUTE, 1000, N)[0].tolist()
    return next(place for place in map(place_of, numbers) if place not in bad)


class Oracle:
    """Cuts any sample for any position, without reader and loader."""

    def __init__(self, executor: Executor, images: Sequence[bytes] = IMAGES) -> None:
        self.executor, self.images = executor, images

    def slot(self, position: int, place: Place) -> Slot:
        data = self.images[place[0] * PER_SHARD + place[1]]
        with Image.open(io.BytesIO(data)) as image:
            size = np.array([image.size], np.int32)
        draws = draw(PLAN, CONFIG.seed, np.array([position]), size)
        views = self.executor.run([np.frombuffer(data, np.uint8)], draws)
        geometry = {view.name: torch.from_numpy(draws.geometry[:, PLAN.columns[view.name]].copy()) for view in VIEWS}
        key = sample_name(place[0] * PER_SHARD + place[1]).partition(".")[0]
        batch = Batch(position, np.array([place]), [key], views, geometry)
        return slots_of(batch, 1)[0]


@dataclass
class Found:
    """A stream held against the undisturbed one, from position `start` on."""

    slots: int = 0
    damaged: int = 0  # slots whose own sample is damaged
    substituted: int = 0  # of those, by the sample that was expected
    astray: int = 0  # other slots with another sample, or other draws or pixels
    repeats: int = 0  # healthy samples given more than once in an epoch, in slots of their own
    skips: int = 0  # healthy samples not given in a whole epoch


def hold(
    got: Sequence[Slot], whole: Sequence[Slot], oracle: Oracle, bad: Collection[Place] = (), start: int = 0
) -> Found:
    """Compare; `whole` begins at position 0 and `got` at `start`. Asserts everything, and counts it."""
    found, own = Found(slots=len(got)), [Counter[Place](), Counter[Place]()]
    for at, slot in enumerate(got):
        position, expected = start + at, whole[start + at]
        if expected.place in bad:
            found.damaged += 1
            place = substitute(position, bad)
            found.substituted += slot == oracle.slot(position, place)._replace(key=whole_key(whole, place))
        else:
            found.astray += slot != expected
            if position < 2 * N:
                own[position // N][slot.place] += 1
    for epoch in range(2):
        found.repeats += sum(count - 1 for count in own[epoch].values())
        if start <= epoch * N and start + len(got) >= (epoch + 1) * N:
            found.skips += N - len(set(bad)) - len(own[epoch])
    assert (found.astray, found.repeats, found.skips) == (0, 0, 0), found
    assert found.substituted == found.damaged, found
    return found


def whole_key(whole: Sequence[Slot], place: Place) -> str:
    return next(slot.key for slot in whole if slot.place == place)


def booked(
    quarantine: Quarantine, manifest: Manifest, bad: Collection[Place], reason: str = "", once: bool = True
) -> None:
    """The quarantine's file holds these samples and no others, each with its url, key and a reason.

    `once`: in one line each; processes that read at the same time may find the same damage.
    """
    lines = quarantine.path.read_text().splitlines() if quarantine.path.exists() else []
    assert len(lines) == len(bad) if once else len(lines) >= len(bad)
    entries = list(Quarantine(quarantine.path))
    expected = [(manifest.urls[shard], row, manifest.rows(shard).keys[row]) for shard, row in sorted(bad)]
    assert [(entry.shard, entry.row, entry.key) for entry in entries] == sorted(expected)
    assert all(reason in entry.reason for entry in entries), entries
