"""Batches of augmented views, prefetched: the pipeline's outer face, and an iterator from a position on.

One thread draws and augments, and is the only one that ever touches the executor; encoded batches are read ahead of it.
A batch is begun as soon as there is room for one more (a credit a batch, not a window at a time), so that a burst does
not drain the buffer at its end. What goes wrong on the way comes out of `next()` at the batch at which it happened, and
a batch that does not come within the deadline is an error that names the stage at fault. What is prefetched is not
decided: the state of the stream is the training loop's cursor, and the loader keeps none.
"""

from __future__ import annotations

import atexit
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from ..shards.errors import GristmillError
from ..shards.manifest import Manifest
from ..shards.quarantine import Quarantine
from .augment import DecodeError
from .draws import Draws, Plan, draw
from .order import Locator, Order, Sequential
from .reader import Reader, ReadResult, decodes
from .views import StreamConfig, View

_READ_AHEAD = 2  # encoded batches; they are small beside augmented ones
_TICK = 1.0  # seconds after which a waiting side books its wait, so that the metrics show a stall while it lasts
_JOIN = 30.0  # seconds to finish the batch under way when closing


class LoaderError(GristmillError, ValueError):
    """A batch, position or world size that cannot be served, or an executor that breaks its contract."""


class StallError(GristmillError):
    """No batch within the deadline. The message names the stage that has not delivered."""


class Executor(Protocol):
    """Carries draws out: uint8 arrays of B encoded images -> float32 [B, n, 3, H, W] a view.

    Where images do not decode it raises DecodeError with their slots, and can be run again.
    """

    def run(self, data: list[np.ndarray], draws: Draws) -> dict[str, Tensor]: ...


@dataclass
class Batch:
    """Views of B samples. `position` is that of the global batch, which takes positions from there on."""

    position: int
    ids: np.ndarray  # int64 [B, 2]: shard, row; a substitute's own
    keys: list[str]
    views: dict[str, Tensor]  # float32 [B, n, 3, H, W] a view
    geometry: dict[str, Tensor]  # float32 [B, n, 2, 3] a view: crop pixel (x, y, 1) -> upright source pixel


@dataclass
class Stats:
    """Counters since the loader was made. Depth and capacity are in batches."""

    samples: int = 0  # delivered
    bytes: int = 0  # encoded, of delivered samples
    substituted: int = 0  # delivered in place of damaged ones
    quarantined: int = 0  # in the quarantine now, from earlier runs too
    ready_depth: int = 0
    ready_capacity: int = 0
    dwell_seconds: float = 0.0  # delivered batches had lain ready, together
    starved_seconds: float = 0.0  # the consumer waited for a batch
    hungry_seconds: float = 0.0  # the augmenting thread waited for encoded samples
    blocked_seconds: float = 0.0  # the augmenting thread waited for room
    read_seconds: float = 0.0
    augment_seconds: float = 0.0


@dataclass
class _Item:
    """A place in the ready queue: a batch with what it was read from, or the error or end that stands in its place."""

    position: int
    read: ReadResult | None = None
    batch: Batch | None = None
    error: BaseException | None = None  # StopIteration at the end
    since: float = 0.0


class Loader:
    """Endless iterator of `Batch` from position `start` on (or up to `stop`, the last batch shorter).

    `batch` is the global batch; this process delivers the slice of `rank` out of `world`. `plan` says which crops,
    `config` which order and draws, `order` overrides the order. With `executor` None the DALI one is built, inside the
    thread that runs it. `stall` is the deadline of one batch in seconds. Close it, or use it in a `with`.
    """

    def __init__(
        self,
        manifest: Manifest,
        plan: Plan | Sequence[View],
        config: StreamConfig,
        *,
        batch: int,
        quarantine: Quarantine,
        order: Locator | None = None,
        start: int = 0,
        stop: int | None = None,
        executor: Executor | None = None,
        device: Literal["cpu", "gpu"] = "cpu",
        device_id: int | None = None,
        rank: int = 0,
        world: int = 1,
        stall: float = 600.0,
    ) -> None:
        if batch < 1 or world < 1 or batch % world or not 0 <= rank < world:
            raise LoaderError(f"batch {batch} does not divide among {world} ranks: choose a multiple of the world size")
        if stop is not None and world > 1:
            raise LoaderError("a stream with an end gives ranks unequal numbers of batches: read it on one rank")
        self.plan = plan if isinstance(plan, Plan) else Plan(plan)
        self.config, self.batch, self.stall = config, batch, stall
        self.stats = Stats(ready_capacity=config.prefetch, quarantined=quarantine.count)
        self._local, self._rank, self._stop = batch // world, rank, stop
        self._executor, self._device_id = executor, device_id
        self._device: Literal["cpu", "gpu"] = device
        # One condition guards everything below; at a few batches a second nothing finer is worth its races.
        self._changed = threading.Condition()
        self._ready: deque[_Item] = deque()
        self._generation = 0  # a seek begins a new one; what is under way for an older one is dropped
        self._closed = False
        self._doing = ("augment", "starting", time.monotonic())
        self._restart(start)
        self._reader = Reader(
            manifest,
            quarantine,
            order=order or Order(manifest.counts, config.seed, config.lanes, config.window),
            seed=config.seed,
            threads=config.reader_threads,
            damage_bound=config.damage_bound,
        )
        self._thread = threading.Thread(target=self._produce, name="gristmill-augment", daemon=True)
        self._thread.start()
        # A daemon thread that is inside DALI while the interpreter is torn down crashes at exit.
        atexit.register(self.close)

    @property
    def position(self) -> int:
        """Where the next batch begins. Prefetched batches do not count."""
        return self._position

    def seek(self, position: int) -> None:
        """Go on from this position. What was prefetched is dropped, an error that ended the stream is forgotten."""
        with self._changed:
            self._check_open()
            self._restart(position)
            self._changed.notify_all()

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> Batch:
        begin = time.monotonic()
        with self._changed:
            self._check_open()
            while not self._ready:
                left = self.stall - (time.monotonic() - begin)
                if left <= 0 or not self._thread.is_alive():
                    raise StallError(self._diagnosis())
                self.stats.starved_seconds += self._wait(left)
                self._check_open()
            item = self._ready[0]
            if item.error is not None:
                raise item.error  # and again at the next call, until a seek
            assert item.batch is not None
            self._ready.popleft()
            self._position = item.position + (self.batch if self._stop is None else len(item.batch.keys))
            self._book(item)
            self._changed.notify_all()
            return item.batch

    def close(self) -> None:
        """Stop and join the threads, close the shards. StallError if the thread does not come back in time."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            self._changed.notify_all()
        atexit.unregister(self.close)
        self._thread.join(_JOIN)
        if self._thread.is_alive():
            raise StallError(f"the loader does not stop: {self._diagnosis()}")
        self._reader.close()
        self._ready.clear()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _restart(self, position: int) -> None:
        if position < 0:
            raise LoaderError(f"cannot start at position {position}: positions count samples from 0")
        self._generation += 1
        self._position = position
        self._ready.clear()
        self.stats.ready_depth = 0

    def _check_open(self) -> None:
        if self._closed:
            raise LoaderError("the loader is closed: make a new one")

    def _wait(self, at_most: float = _TICK) -> float:
        """Wait for a change, a tick at most; returns the seconds that it took."""
        begin = time.monotonic()
        self._changed.wait(min(at_most, _TICK))
        return time.monotonic() - begin

    def _book(self, item: _Item) -> None:
        assert item.read is not None
        self.stats.samples += len(item.read.data)
        self.stats.bytes += sum(map(len, item.read.data))
        self.stats.substituted += int(item.read.substituted.sum())
        self.stats.quarantined = self._reader.quarantine.count
        self.stats.dwell_seconds += time.monotonic() - item.since
        self.stats.ready_depth = len(self._ready)

    def _diagnosis(self) -> str:
        stage, doing, since = self._doing
        remedy = {
            "read": "the storage is slow or hangs: look at its mount and at the disk of the shards",
            "augment": "the augmentation is slow or hangs: give it more threads or smaller batches, or a longer deadline",
        }[stage]
        died = "" if self._thread.is_alive() else " (its thread has died)"
        where = f" ({', '.join(sorted(self._reader.busy.values()))})" if stage == "read" else ""
        return (
            f"no batch within {self.stall:g} s at position {self._position}: stage '{stage}' has been {doing}{where} for "
            f"{time.monotonic() - since:.1f} s{died}. Probably {remedy}"
        )

    def _produce(self) -> None:
        """The thread: keep reads under way, take the oldest, augment it, put it where the consumer finds it."""
        generation, position = 0, 0
        ahead: deque[tuple[int, Future[ReadResult]]] = deque()
        with ThreadPoolExecutor(1, thread_name_prefix="gristmill-ahead") as reading:
            while (turn := self._await_turn()) is not None:
                if turn[0] != generation:
                    generation, position = turn
                    for _, future in ahead:
                        future.cancel()
                    ahead.clear()
                item = _Item(position)
                try:
                    while len(ahead) <= _READ_AHEAD and (self._stop is None or position < self._stop):
                        ahead.append((position, reading.submit(self._timed_read, position)))
                        position += self.batch
                    if ahead:
                        item.position, future = ahead.popleft()
                        self._fill(item, future)
                    else:
                        item.error = StopIteration()
                except BaseException as error:
                    item.error = error
                with self._changed:
                    item.since = time.monotonic()
                    if generation == self._generation:
                        self._ready.append(item)
                        self.stats.ready_depth = len(self._ready)
                    self._changed.notify_all()
            for _, future in ahead:
                future.cancel()
        self._executor = None  # taken down in the thread that ran it

    def _await_turn(self) -> tuple[int, int] | None:
        """Wait for room behind the last batch, if nothing went wrong with it: (generation, its start), None if closed."""
        with self._changed:
            while not self._closed:
                ended = bool(self._ready) and self._ready[-1].error is not None
                full = len(self._ready) >= self.config.prefetch
                if not ended and not full:
                    return self._generation, self._position
                waited = self._wait()
                self.stats.blocked_seconds += waited if full else 0.0
        return None

    def _timed_read(self, position: int) -> ReadResult:
        begin = time.monotonic()
        try:
            return self._reader.read(self._positions(position))
        finally:
            with self._changed:
                self.stats.read_seconds += time.monotonic() - begin

    def _positions(self, position: int) -> np.ndarray:
        first = position + self._rank * self._local
        return np.arange(first, first + self._local if self._stop is None else min(first + self._local, self._stop))

    def _fill(self, item: _Item, future: Future[ReadResult]) -> None:
        begin = time.monotonic()
        self._doing = ("read", f"reading the batch at position {item.position}", begin)
        item.read = future.result()
        there = time.monotonic()
        self._doing = ("augment", f"augmenting the batch at position {item.position}", there)
        try:
            item.batch = self._augment(item.position, item.read)
        finally:
            with self._changed:
                self.stats.hungry_seconds += there - begin
                self.stats.augment_seconds += time.monotonic() - there

    def _augment(self, position: int, read: ReadResult) -> Batch:
        """Draw and augment; as long as images do not decode, put substitutes into their slots and run again."""
        positions = self._positions(position)
        if self._executor is None:
            self._executor = self._dali()
        while True:
            draws = draw(self.plan, self.config.seed, positions, read.sizes)
            try:
                views = self._executor.run(read.data, draws)
                break
            except DecodeError as error:
                # Without a culprit, or with every image of the batch at once, it is the decoder that broke: say so,
                # rather than put good images into a quarantine that lasts.
                if not error.bad or (len(error.bad) == len(positions) > 1 and any(map(decodes, read.data))):
                    raise
                for slot in error.bad:
                    shard, row = read.ids[slot].tolist()
                    read.put(slot, self._reader.replace(int(positions[slot]), (shard, row), "does not decode"))
        geometry = {}
        for view in self.plan.views:
            shape = (len(positions), view.count, 3, view.size, view.size)
            if view.name not in views or views[view.name].shape != shape:
                raise LoaderError(f"view {view.name}: the executor did not give a tensor of {shape}")
            geometry[view.name] = torch.from_numpy(draws.geometry[:, self.plan.columns[view.name]].copy())
        return Batch(position, read.ids, read.keys, views, geometry)

    def _dali(self) -> Executor:
        from .augment.dali import DaliExecutor  # only here: whoever brings an executor needs no DALI

        threads = self.config.dali_threads
        return DaliExecutor(
            self.plan, device=self._device, device_id=self._device_id, threads=threads, batch=self._local
        )


def probe_batches(
    manifest: Manifest,
    size: int,
    batch: int,
    *,
    limit: int | None = None,
    quarantine: Quarantine | None = None,
    config: StreamConfig | None = None,
    executor: Executor | None = None,
    device: Literal["cpu", "gpu"] = "cpu",
    device_id: int | None = None,
) -> Iterator[tuple[list[str], Tensor]]:
    """Every healthy image once, in the manifest's order: (keys, images float32 [b, 3, size, size]), b <= batch.

    Of a data set larger than `limit`, that many images, the same ones every time, from all over it. The middle square
    of each image, unaltered but for resizing and normalisation. Unlike training, a probe leaves damaged images out: a
    substitute would be in it twice, and be its own nearest neighbour.
    """
    samples = manifest.samples if limit is None else min(limit, manifest.samples)
    order = Sequential(manifest.counts) if samples == manifest.samples else Order(manifest.counts, seed=0)
    view = View.model_validate({"name": "probe", "size": size, "augment": "none"})
    with tempfile.TemporaryDirectory(prefix="gristmill-") as scratch:
        loader = Loader(
            manifest,
            [view],
            config or StreamConfig.model_validate({}),
            order=order,
            stop=samples,
            batch=min(batch, samples),
            quarantine=Quarantine(Path(scratch) / "quarantine.jsonl") if quarantine is None else quarantine,
            executor=executor,
            device=device,
            device_id=device_id,
        )
        with loader:
            for got in loader:
                meant = np.stack(order.locate(np.arange(got.position, got.position + len(got.keys))), axis=1)
                whole = (got.ids == meant).all(axis=1)
                if whole.any():
                    keys = [key for key, good in zip(got.keys, whole, strict=True) if good]
                    images = got.views["probe"][:, 0]
                    yield keys, images if whole.all() else images[torch.from_numpy(whole).to(images.device)]
