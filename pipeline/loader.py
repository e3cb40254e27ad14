"""Batches of augmented views, prefetched: the pipeline's outer face, and an iterator from a position on.

One thread reads encoded batches ahead, another draws and augments, the only one that ever touches the executor; between
them, and before the consumer, lies a bounded buffer that is refilled batch by batch (buffer.py). What goes wrong on the
way comes out of `next()` at the batch at which it happened, and a batch that does not come within the deadline is an
error that names the stage at fault. What is prefetched is not decided: the state of the stream is the training loop's
cursor, and the loader keeps none.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from ..shards.manifest import Manifest
from ..shards.quarantine import Quarantine
from ..shards.retry import RetryPolicy, Stopped
from .augment import DecodeError, chosen
from .batch import Batch, Executor, LoaderError, StallError
from .buffer import Buffer
from .draws import Plan, draw
from .handover import Handover
from .order import Ints, Order, Readable
from .reader import Reader, ReadResult, decodes
from .stats import Stage, Stats, bottleneck
from .views import StreamConfig, View

__all__ = ["Batch", "Executor", "Loader", "LoaderError", "StallError", "Stats"]

_READ_AHEAD = 2  # encoded batches; they are small beside augmented ones
_JOIN = 30.0  # seconds to finish the batch under way when closing
_TICK = 1.0  # seconds after which a waiting consumer looks whether the threads are alive
_REMEDY = {
    "read": "the storage is slow or hangs: look at its mount and at the disk of the shards",
    "cache": "the cache's disk is slow or hangs: look at the disk of stream.cache.folder",
    "storage": "the server is slow or hangs: look at it and at the network",
    "augment": "the augmentation is slow or hangs: give it more threads or smaller batches, or a longer deadline",
}


@dataclass
class _Item:
    """A place in a buffer: a batch, encoded or augmented, or the error or end that stands in its place."""

    generation: int
    position: int
    read: ReadResult | None = None
    batch: Batch | None = None
    error: BaseException | None = None  # StopIteration at the end


class Loader:
    """Endless iterator of `Batch` from position `start` on (or up to `stop`, the last batch shorter).

    `batch` is the global batch; this process delivers the slice of `rank` out of `world`. `plan` says which crops,
    `config` which order and draws, `order` overrides the order; several manifests are read through a `Stream` of them.
    With `executor` None the one that the config's `augment` says is built, inside the thread that runs it. `stall` is
    the deadline of one batch in seconds (default: the config's). `lanes`: those that this node reads, for its cache.
    `device` "gpu": views come on the GPU `device_id` (default: the current one), for the current stream of the thread
    that calls `next`; who uses them on another one says so by `record_stream`.
    Close it, or use it in a `with`.
    """

    def __init__(
        self,
        manifest: Manifest | Sequence[Manifest],
        plan: Plan | Sequence[View],
        config: StreamConfig,
        *,
        batch: int,
        quarantine: Quarantine,
        order: Readable | None = None,
        start: int = 0,
        stop: int | None = None,
        executor: Executor | None = None,
        device: Literal["cpu", "gpu"] = "cpu",
        device_id: int | None = None,
        rank: int = 0,
        world: int = 1,
        stall: float | None = None,
        lanes: Ints | None = None,
    ) -> None:
        if batch < 1 or world < 1 or batch % world or not 0 <= rank < world:
            raise LoaderError(f"batch {batch} does not divide among {world} ranks: choose a multiple of the world size")
        if stop is not None and world > 1:
            raise LoaderError("a stream with an end gives ranks unequal numbers of batches: read it on one rank")
        if device == "gpu" and not torch.cuda.is_available():
            raise LoaderError("device gpu: torch sees no GPU here")
        if order is None:
            if not isinstance(manifest, Manifest):
                raise LoaderError("several data sets are read in the order of a Stream: give one as `order`")
            order = Order(manifest.counts, config.seed, config.lanes, config.window)
        self.plan = plan if isinstance(plan, Plan) else Plan(plan)
        self.config, self.batch = config, batch
        self.stall = config.stall if stall is None else stall
        self.stats = Stats(ready_capacity=config.prefetch, encoded_capacity=_READ_AHEAD, quarantined=quarantine.count)
        self._local, self._rank, self._stop = batch // world, rank, stop
        self._executor = executor
        self._handover = Handover(device_id) if device == "gpu" else None
        self._take_down: Callable[[], object] = lambda: None
        self._device: Literal["cpu", "gpu"] = device
        self._encoded: Buffer[_Item] = Buffer(_READ_AHEAD)
        self._ready: Buffer[_Item] = Buffer(config.prefetch)
        self._generation = 0  # a seek begins a new one; what is under way for an older one is dropped
        self._closed, self._pid = False, os.getpid()
        self._augmenting: tuple[str, str, float] | None = None  # stage, what, since when
        self._reading: tuple[str, float] | None = None
        self._restart(start)
        self._reader = Reader(
            manifest,
            quarantine,
            order=order,
            seed=config.seed,
            threads=config.reader_threads,
            damage_bound=config.damage_bound,
            cache=config.cache,
            policy=RetryPolicy(deadline=config.deadline),
            lanes=lanes,
        )
        self._threads = [
            threading.Thread(target=self._read_ahead, name="gristmill-ahead", daemon=True),
            threading.Thread(target=self._augment_all, name="gristmill-augment", daemon=True),
        ]
        for thread in self._threads:
            thread.start()
        # A daemon thread that is inside DALI while the interpreter is torn down crashes at exit.
        atexit.register(self.close)

    @property
    def position(self) -> int:
        """Where the next batch begins. Prefetched batches do not count."""
        return self._position

    @property
    def reader(self) -> Reader:
        """Where the encoded images come from, for its counters."""
        return self._reader

    def bottleneck(self, before: Stats | None = None) -> Stage:
        """The stage that limits the stream since `before` (a copy of `stats`), or since the loader was made."""
        return bottleneck(self.stats if before is None else self.stats.since(before))

    def seek(self, position: int) -> None:
        """Go on from this position. What was prefetched is dropped, an error that ended the stream is forgotten."""
        self._check_open()
        self._restart(position)

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> Batch:
        self._check_open()
        begin = time.monotonic()
        while (item := self._ready.first(min(_TICK, self._left(begin)))) is None:
            self._book_waits()
            self._check_open()
            if self._left(begin) <= 0 or not all(thread.is_alive() for thread in self._threads):
                raise StallError(self._diagnosis())
        if item.error is not None:
            self._book_waits()
            raise item.error  # and again at the next call, until a seek
        assert item.batch is not None
        assert item.read is not None
        self._ready.pop()
        self._position = item.position + (self.batch if self._stop is None else len(item.batch.keys))
        self._book(item.read)
        if self._handover:
            self._handover.received(item.batch.views)
        return item.batch

    def close(self) -> None:
        """Stop and join the threads, close the shards. StallError if the executor does not come back in time.

        A read that hangs in the storage is left behind: its thread is a daemon, and ends with the process.
        """
        if os.getpid() != self._pid or self._closed:
            return
        self._closed = True
        self._encoded.close()
        self._ready.close()
        atexit.unregister(self.close)
        self._reader.close()
        until = time.monotonic() + _JOIN
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))
            if thread.is_alive():
                raise StallError(f"the loader does not stop: {self._diagnosis()}")

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _left(self, begin: float) -> float:
        return self.stall - (time.monotonic() - begin)

    def _restart(self, position: int) -> None:
        if position < 0:
            raise LoaderError(f"cannot start at position {position}: positions count samples from 0")
        self._generation += 1
        self._position = position
        self._ready.restart(self._generation)
        self._encoded.restart(self._generation)
        self._book_waits()

    def _check_open(self) -> None:
        if os.getpid() != self._pid:
            raise LoaderError(
                "this loader belongs to the process that made it, and its threads did not come along in the fork: make a "
                "loader in this process, at the position that it is to read from"
            )
        if self._closed:
            raise LoaderError("the loader is closed: make a new one")

    def _book(self, read: ReadResult) -> None:
        stats = self.stats
        stats.samples += len(read.data)
        stats.bytes += sum(map(len, read.data))
        removed = int(read.removed.sum())
        stats.removed += removed
        stats.substituted += int(read.substituted.sum()) - removed
        stats.quarantined = self._reader.quarantine.count
        self._book_waits()

    def _book_waits(self) -> None:
        stats, encoded, ready = self.stats, self._encoded, self._ready
        stats.ready_depth, stats.encoded_depth = ready.depth, encoded.depth
        stats.dwell_seconds, stats.encoded_dwell_seconds = ready.dwell, encoded.dwell
        stats.starved_seconds, stats.hungry_seconds = ready.starved, encoded.starved
        stats.blocked_seconds, stats.encoded_blocked_seconds = ready.blocked, encoded.blocked

    def _diagnosis(self) -> str:
        now, augmenting, reading = time.monotonic(), self._augmenting, self._reading
        stage, doing, since = augmenting or (("read", *reading) if reading else ("augment", "starting", now))
        where = ""
        if stage == "read":
            busy = self._reader.doing()
            # Of threads in several stages the one at the network is the last that others wait for.
            stage = max((stage for stage, _, _ in busy), key=["read", "cache", "storage"].index, default="read")
            names = sorted({shard for its, shard, _ in busy if its == stage})
            where = f" ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})" if names else ""
        dead = [thread.name for thread in self._threads if not thread.is_alive()]
        died = f" (its thread {dead[0]} has died)" if dead else ""
        return (
            f"no batch within {self.stall:g} s at position {self._position}: stage '{stage}' has been {doing}{where} for "
            f"{now - since:.1f} s{died}. Probably {_REMEDY[stage]}"
        )

    def _read_ahead(self) -> None:
        """The first thread: encoded batches, as long as there is room."""
        generation, position = 0, 0
        while (turn := self._encoded.turn()) is not None:
            if turn != generation:
                generation, position = turn, self._position
            item = _Item(generation, position)
            if self._stop is not None and position >= self._stop:
                item.error = StopIteration()
            else:
                begin = time.monotonic()
                self._reading = f"reading the batch at position {position}", begin
                try:
                    before = self._reader.stats.seconds
                    item.read = self._reader.read(self._positions(position))
                    self.stats.storage_seconds += self._reader.stats.seconds - before
                except Stopped:
                    return
                except BaseException as error:
                    item.error = error
                self._reading = None
                self.stats.read_seconds += time.monotonic() - begin
                position += self.batch
            self._encoded.put(generation, item, last=item.error is not None)

    def _augment_all(self) -> None:
        """The second thread: take the oldest encoded batch, augment it, put it where the consumer finds it."""
        with self._handover.sending() if self._handover else nullcontext():
            self._augment_each()
            self._executor = None  # taken down in the thread that ran it
            self._take_down()

    def _augment_each(self) -> None:
        while self._ready.turn() is not None:
            while (item := self._encoded.first(_TICK)) is None and not self._encoded.closed:
                continue
            if item is None:
                break
            self._encoded.pop()
            if item.error is None:
                assert item.read is not None
                begin = time.monotonic()
                self._augmenting = "augment", f"augmenting the batch at position {item.position}", begin
                try:
                    item.batch = self._augment(item.position, item.read)
                except Stopped:
                    break
                except BaseException as error:
                    item.error = error
                self._augmenting = None
                self.stats.augment_seconds += time.monotonic() - begin
            self._ready.put(item.generation, item, last=item.error is not None)

    def _positions(self, position: int) -> np.ndarray:
        first = position + self._rank * self._local
        return np.arange(first, first + self._local if self._stop is None else min(first + self._local, self._stop))

    def _augment(self, position: int, read: ReadResult) -> Batch:
        """Draw and augment; as long as images do not decode, put substitutes into their slots and run again."""
        positions = self._positions(position)
        if self._executor is None:
            self._executor = self._build()
        while True:
            draws = draw(self.plan, self.config.seed, positions, read.sizes)
            try:
                views = self._executor.run(read.data, draws)
                views = self._handover.send(views) if self._handover else views
                break
            except DecodeError as error:
                # Without a culprit, or with every image of the batch at once, it is the decoder that broke: say so,
                # rather than put good images into a quarantine that lasts.
                if not error.bad or (len(error.bad) == len(positions) > 1 and any(map(decodes, read.data))):
                    raise
                doing, self._augmenting = (
                    self._augmenting,
                    ("read", f"replacing images at {position}", time.monotonic()),
                )
                for slot in error.bad:
                    shard, row = read.ids[slot].tolist()
                    read.put(slot, self._reader.replace(int(positions[slot]), (shard, row), "does not decode"))
                self._augmenting = doing
        geometry = {}
        for view in self.plan.views:
            shape = (len(positions), view.count, 3, view.size, view.size)
            if view.name not in views or views[view.name].shape != shape:
                raise LoaderError(f"view {view.name}: the executor did not give a tensor of {shape}")
            geometry[view.name] = torch.from_numpy(draws.geometry[:, self.plan.columns[view.name]].copy())
        return Batch(position, read.ids, read.keys, views, geometry)

    def _build(self) -> Executor:
        threads = self.config.augment_threads
        # Only here: whoever brings an executor needs neither DALI nor compiled loops.
        if chosen(self.config.augment, self._device) == "cpu":
            from .augment.cpu import CpuExecutor

            executor = CpuExecutor(self.plan, threads=threads)
            self._take_down = executor.close
            return executor
        from .augment.dali import DaliExecutor

        # Without an id it is the current GPU, which the handover has made its own in this thread.
        return DaliExecutor(self.plan, device=self._device, threads=threads, batch=self._local)
