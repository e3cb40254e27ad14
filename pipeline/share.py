"""One thread's share of a batch: its samples looked up, read out of their shards, and checked.

Beside the copy and the checksum a sample costs what Python does for it, so that is little: a shard's samples of this
batch come out of one table in one call, and those on a disk are read by a loop in machine code (native.py) into the
share's slab, each with its checksum right behind it, while the bytes are still in the core's cache. `read_samples` is
the same loop in Python, for where there is no other. Only over a network are neighbours put together and asked for at
once; on a disk the kernel reads ahead by itself.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import lru_cache
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from ..shards.manifest import Rows
from ..shards.texts import Texts
from .checks import BLOCK, Damage, crc32, decodes, header_size, member_size
from .fetch import Fetcher, Opened
from .order import Ints
from .slabs import Slabs

KNOWN, REMOVED = object(), object()  # problems that need no entry in the quarantine
_ALIGN = 64  # of samples in a slab: a line of the cache


@lru_cache(maxsize=1)
def native_loop() -> Callable[..., int] | None:
    """The compiled loop, or None where it cannot be had."""
    try:
        from .native import read_all
    except ImportError:
        return None
    return read_all


class Found:
    """What became of n slots. A slot has either data or a problem: a text, or a mark from above."""

    def __init__(self, slots: int) -> None:
        self.data: list[Any] = [None] * slots
        self.keys: list[str] = [""] * slots
        self.sizes = np.zeros((slots, 2), np.int32)  # width, height
        self.problems: list[Any] = [None] * slots


class _Part(NamedTuple):
    """What is read of one shard. `places` int64 [n, 4] as Rows has them, of n slots."""

    shard: Opened
    table: Rows
    slots: list[int]
    places: Ints


class _Plan(NamedTuple):
    """Where n samples on a disk lie and go: int64 [n] each."""

    offsets: Ints  # in their shards, lead included
    places: Ints  # in the slab, lead included
    leads: Ints  # bytes before the data that are read too
    lengths: Ints  # of the data


class _Read(NamedTuple):
    """What came of them: int64 [n] each."""

    got: Ints  # bytes, lead included
    crcs: Ints  # of the data, where all came and there is no lead
    sizes: Ints  # width | height << 32, where there is a lead and both headers are sound at sight; else 0


class Share:
    """Samples of a few shards: `add` each shard, then `read`, once. `waited` are seconds in calls to storage."""

    def __init__(
        self, fetcher: Fetcher, slabs: Slabs, found: Found, decode_check: bool, loop: Callable[..., int] | None = None
    ) -> None:
        self.waited = 0.0
        self._fetcher, self._slabs, self._found, self._decode_check = fetcher, slabs, found, decode_check
        self._loop = loop
        self._parts: list[_Part] = []

    def add(self, shard: int, slots: list[int], rows: Ints, bad: set[int] | None) -> None:
        """The rows int64 [n] of a shard, ascending, go to these n slots; those in `bad` are known to be damaged."""
        self._fetcher.begin(shard)
        table, found = self._fetcher.library.rows(shard), self._found
        places = table.places[rows]
        wrong: dict[int, Any] = {i: KNOWN for i, row in enumerate(rows.tolist()) if row in bad} if bad else {}
        if table.deep and table.undecoded:
            lacking = np.flatnonzero(table.width[rows] == 0).tolist()
            wrong = dict.fromkeys(lacking, "did not decode when it was indexed") | wrong
        if wrong:
            for i, problem in wrong.items():
                found.problems[slots[i]] = problem
            kept = [i for i in range(len(slots)) if i not in wrong]
            slots, rows, places = [slots[i] for i in kept], rows[kept], places[kept]
        if slots:
            keys: Any = table.keys
            picked = keys.pick(rows) if isinstance(keys, Texts) else [keys[row] for row in rows.tolist()]
            for slot, key in zip(slots, picked, strict=True):
                found.keys[slot] = key
            self._parts.append(_Part(self._fetcher.open(shard), table, slots, places))

    def read(self) -> None:
        """Fill the slots, or say what is wrong with them. Raises what the fetcher raises."""
        local = [part for part in self._parts if part.shard.handle is not None]
        remote = [part for part in self._parts if part.shard.handle is None]
        if local:
            self._read_local(local)
        if remote:
            self._read_remote(remote)

    def _read_local(self, parts: list[_Part]) -> None:
        several = len(parts) > 1
        slots = [slot for part in parts for slot in part.slots] if several else parts[0].slots
        places = np.concatenate([part.places for part in parts]) if several else parts[0].places
        offsets, lengths, checksums = places[:, 0], places[:, 1], places[:, 2]
        counts = [len(part.slots) for part in parts]
        deep = np.repeat([part.table.deep for part in parts], counts)
        # Without a checksum the tar's own header, just before the data, tells whether this still is the same.
        leads = np.where(deep, 0, np.minimum(offsets, BLOCK))
        room = (leads + lengths + _ALIGN - 1) // _ALIGN * _ALIGN
        ends = np.cumsum(room)
        slab = self._slabs.take(int(ends[-1]))
        plan = _Plan(offsets - leads, ends - room, leads, np.ascontiguousarray(lengths))
        read = self.read_samples if self._loop is None else self._read_natively
        got, crcs, found_sizes = read(parts, counts, slab, plan)
        stats = self._fetcher.stats
        for part, count in zip(parts, np.add.reduceat(got, np.cumsum([0, *counts[:-1]])).tolist(), strict=True):
            if part.shard.lease is None:
                stats.local_bytes += count
            else:
                stats.cached_bytes += count
        data, starts = self._found.data, plan.places + leads
        right = np.where(deep, (got == leads + lengths) & (crcs == checksums), found_sizes > 0)
        good = right & (not self._decode_check)
        self._found.sizes[slots] = np.where(deep, places[:, 3], found_sizes).view("<i4").reshape(-1, 2)
        if good.all():
            for slot, start, stop in zip(slots, starts.tolist(), (starts + lengths).tolist(), strict=True):
                data[slot] = slab[start:stop]
            return
        stops = (plan.places + got).tolist()
        owner = [part for part in parts for _ in part.slots]
        for i, (slot, start, ok) in enumerate(zip(slots, starts.tolist(), good.tolist(), strict=True)):
            if ok:
                data[slot] = slab[start : start + int(lengths[i])]
            else:
                self._judge(slot, slab, start, places[i, :3].tolist(), stops[i], owner[i].table.deep)

    def read_samples(self, parts: list[_Part], counts: list[int], slab: np.ndarray, plan: _Plan) -> _Read:
        fetcher, view, me = self._fetcher, slab.data, threading.get_ident()
        got, crcs, sizes = np.zeros((3, len(plan.places)), np.int64)
        samples = enumerate(zip(*(column.tolist() for column in plan), strict=True))
        for part, count in zip(parts, counts, strict=True):
            fetcher.busy[me] = ("read", part.shard.shard, time.monotonic())
            for i, (offset, place, lead, length) in islice(samples, count):
                piece = view[place : place + lead + length]
                begin = time.perf_counter()
                got[i] = fetcher.read_local(part.shard, offset, piece)
                self.waited += time.perf_counter() - begin
                if got[i] == len(piece):
                    crcs[i] = crc32(piece[lead:])
        return _Read(got, crcs, sizes)

    def _read_natively(self, parts: list[_Part], counts: list[int], slab: np.ndarray, plan: _Plan) -> _Read:
        """The same at once. What it could not read whole is asked for again, by who knows what an error means."""
        assert self._loop is not None
        handles = np.repeat(np.array([part.shard.handle for part in parts], np.int64), counts)
        shards = np.repeat([part.shard.shard for part in parts], counts)
        got, crcs, sizes = np.zeros((3, len(handles)), np.int64)
        with self._fetcher.activity.looping(shards) as frame:
            self._loop(slab, handles, *plan, got, crcs, sizes, frame, Image.MAX_IMAGE_PIXELS or 0)
            self.waited += frame[2] / 1e9
        short = np.flatnonzero(got < plan.leads + plan.lengths).tolist()
        if short:
            ends, view = np.cumsum(counts), slab.data
            for i in short:
                part, begin, done = parts[int(np.searchsorted(ends, i, side="right"))], int(plan.places[i]), int(got[i])
                piece = view[begin + done : begin + int(plan.leads[i] + plan.lengths[i])]
                got[i] += self._fetcher.read_local(part.shard, int(plan.offsets[i]) + done, piece)
                if len(piece) == got[i] - done:
                    crcs[i] = crc32(view[begin + int(plan.leads[i]) : begin + int(got[i])])
        return _Read(got, crcs, sizes)

    def _read_remote(self, parts: list[_Part]) -> None:
        """Neighbours in one request, all requests at once, then the checks."""
        runs: list[list[int]] = []  # offset in the shard, end there, place in the slab
        owners: list[_Part] = []
        pieces: list[tuple[int, int, list[int]]] = []  # run, slot, offset and length and checksum
        for part in parts:
            fresh = True
            for slot, place in zip(part.slots, part.places[:, :3].tolist(), strict=True):
                begin = place[0] if part.table.deep else max(0, place[0] - BLOCK)
                if fresh or not runs[-1][0] <= begin <= runs[-1][1] + part.shard.gap:
                    base = runs[-1][2] + runs[-1][1] - runs[-1][0] if runs else 0
                    runs.append([begin, begin, base])
                    owners.append(part)
                    fresh = False
                runs[-1][1] = max(runs[-1][1], place[0] + place[1])
                pieces.append((len(runs) - 1, slot, place))
        slab = self._slabs.take(runs[-1][2] + runs[-1][1] - runs[-1][0])
        view = slab.data
        begun = time.perf_counter()
        got = self._fetcher.read_remote(
            [
                (part.shard, begin, view[base : base + end - begin])
                for part, (begin, end, base) in zip(owners, runs, strict=True)
            ]
        )
        self.waited += time.perf_counter() - begun
        for part in parts:
            if part.table.deep:
                self._found.sizes[part.slots] = _sizes(part.places)
        for number, slot, place in pieces:
            begin, _, base = runs[number]
            self._judge(slot, slab, base + place[0] - begin, place, base + got[number], owners[number].table.deep)

    def _judge(self, slot: int, slab: np.ndarray, start: int, place: list[int], stop: int, deep: bool) -> None:
        """Whether the sample whose data begin at `start` is the one that was indexed; bytes were read up to `stop`."""
        offset, length, checksum = place
        data, found = slab[start : start + length], self._found
        problem: str | None = None
        if start + length > stop:
            problem = f"truncated: {max(0, stop - start)} of {length} bytes at offset {offset}"
        elif deep:
            if (crc := crc32(data.data)) != checksum:
                problem = f"checksum {crc:08x} instead of {checksum:08x} at offset {offset}"
        elif offset >= BLOCK and member_size(slab[start - BLOCK : start].data) != length:
            problem = f"no tar member of {length} bytes at offset {offset}"
        else:
            try:
                found.sizes[slot] = header_size(data)
            except Damage as damage:
                problem = str(damage)
        if problem is None and self._decode_check and not decodes(data):
            problem = "does not decode"
        if problem is None:
            found.data[slot] = data
        else:
            found.problems[slot] = problem


def _sizes(places: Ints) -> np.ndarray:
    """int32 [n, 2], width and height, of places int64 [n, 4]."""
    return np.ascontiguousarray(places[:, 3]).view("<i4").reshape(-1, 2)
