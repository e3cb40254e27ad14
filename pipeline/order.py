"""Which sample a position of the stream reads: a keyed permutation that is never written down.

`Order.locate` is a pure function of (counts, seed, lanes, window, position), so any rank, at any batch size, after any
number of restarts, computes the same stream from nothing but the position; only the table of shards is ever in memory.
In every epoch the shards are permuted and laid end to end. That axis is cut into `lanes` (unequal by at most one
sample), which are read in turn: neighbours in the stream come from far apart in the data. Each lane is cut into windows
of at most `window` samples (again unequal by at most one), and each window is permuted on its own: a reader keeps
`lanes` windows open, not the data set. Both permutations are Feistel networks with cycle walking: Black and Rogaway,
"Ciphers with arbitrary finite domains", CT-RSA 2002, section 5; round keys are Philox words of (seed, epoch, ...).
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..shards.errors import GristmillError
from .philox import MIXTURE, ORDER_SHARDS, ORDER_WINDOWS, key_from, paired, philox4x32

# Six rounds suffice against statistics, and a domain of 2 to 16 elements needs more to reach its permutations evenly.
_ROUNDS = 10
_GOLDEN = 0x9E3779B97F4A7C15

Ints = NDArray[np.int64]


class OrderError(GristmillError, ValueError):
    """Counts, lanes or a window of which no order can be made, or a position before the first."""


class Locator(Protocol):
    """Samples by number: (shard int64 [n], row int64 [n]) of each number int64 [n]."""

    @property
    def samples(self) -> int: ...

    def locate(self, positions: ArrayLike, /) -> tuple[Ints, Ints]: ...


class Readable(Locator, Protocol):
    """What a reader needs of an order: also what substitutes are drawn from, and which samples nobody may read."""

    def pool(self, position: int, /) -> Locator: ...

    def removed(self, shard: Ints, row: Ints, /) -> NDArray[np.bool_]: ...


def mix64(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Stafford's thirteenth finaliser (that of SplitMix64): every bit of the answer depends on every bit of x."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permute(x: Ints, size: Ints, keys: NDArray[np.uint64], bits: int, *, inverse: bool = False) -> Ints:
    """Image of each x in a keyed permutation of 0 ... size - 1, or its preimage: int64 [n].

    x, size int64 [n] with 0 <= x < size <= 2**bits; keys uint64 [n, 2]. `bits` is part of the permutation: give the
    same one for equal results. Walks the cycle of a permutation of 2**bits until it comes back below `size`.
    """
    y = x.astype(np.uint64)
    todo = np.arange(len(y))
    while len(todo):
        y[todo] = _feistel(y[todo], keys[todo], bits, inverse)
        todo = todo[y[todo] >= size[todo].astype(np.uint64)]
    return y.astype(np.int64)


def _feistel(x: NDArray[np.uint64], keys: NDArray[np.uint64], bits: int, inverse: bool) -> NDArray[np.uint64]:
    """One pass over halves of `bits` // 2 and the rest; unequal halves keep the domain under twice what is needed."""
    low = np.uint64(bits // 2)
    masks = np.uint64((1 << (bits - bits // 2)) - 1), np.uint64((1 << (bits // 2)) - 1)
    halves = [x >> low, x & masks[1]]
    for r in reversed(range(_ROUNDS)) if inverse else range(_ROUNDS):
        changed, read = r % 2, 1 - r % 2
        salt = np.uint64((r + 1) * _GOLDEN % 2**64)
        halves[changed] = halves[changed] ^ (mix64((halves[read] ^ keys[:, r % 2]) + salt) & masks[changed])
    return (halves[0] << low) | halves[1]


def _keys(seed: int, a: ArrayLike, b: ArrayLike, stream: int, c: ArrayLike) -> NDArray[np.uint64]:
    """Two 64-bit keys of each counter (a, b, stream, c): uint64 [n, 2]."""
    parts = np.broadcast_arrays(np.asarray(a), np.asarray(b), np.asarray(stream), np.asarray(c))
    return paired(philox4x32(np.stack([part & 0xFFFFFFFF for part in parts], axis=-1), key_from(seed)))


def derived(seed: int, number: int, purpose: int) -> int:
    """A seed of its own for part `number` of something; purposes are 1 (data sets of a mixture), 2 (appended shards)."""
    return int(_keys(seed, number, 0, MIXTURE, purpose)[0])


def share(n: Ints, part: int, whole: int) -> Ints:
    """floor(n * part / whole), exactly: how many of the first n slots belong to one who gets `part` in `whole`.

    n int64 [m] from 0 on, 0 <= part <= whole < 2**40. Long division in digits of 20 bits: the product itself would not
    fit into 64. Evenly spread, so that no stretch of slots is more than one off its share.
    """
    turns, rest = n // whole, n % whole
    high = (rest >> 20) * part  # < 2**60
    low = ((high % whole) << 20) + (rest & 0xFFFFF) * part  # < 2**61
    return turns * part + ((high // whole) << 20) + low // whole


class _Cut(NamedTuple):
    """A line of `total` cut into `parts` pieces, the first ones longer by one where it does not divide."""

    total: Ints
    parts: Ints

    def length(self, part: Ints) -> Ints:
        return self.total // self.parts + (part < self.total % self.parts)

    def start(self, part: Ints) -> Ints:
        return part * (self.total // self.parts) + np.minimum(part, self.total % self.parts)

    def part(self, x: Ints) -> Ints:
        short, long = self.total // self.parts, self.total % self.parts
        # A short length of zero leaves every x among the long pieces; the maximum only keeps the division quiet.
        return np.where(x < long * (short + 1), x // (short + 1), (x - long) // np.maximum(short, 1))


class _Axis(NamedTuple):
    """The shards of one epoch end to end."""

    shards: Ints  # [S] which shard lies at each place
    places: Ints  # [S] at which place each shard lies
    ends: Ints  # [S] where the shard at each place ends


class Order:
    """The shuffled stream over shards of `counts` samples: every sample exactly once an epoch, epoch after epoch.

    counts int64 [S]. Small data sets want one lane and a window of all samples, which is a full permutation. Costs 50
    bytes a shard for each of the last two epochs, and nothing a sample. OrderError for an empty data set and the like.
    """

    def __init__(self, counts: ArrayLike, seed: int, lanes: int = 64, window: int = 65536) -> None:
        self.counts = _checked(counts)
        if lanes < 1 or window < 1:
            raise OrderError(f"lanes ({lanes}) and window ({window}) must be at least 1")
        key_from(seed)
        self.seed, self.lanes, self.window = int(seed), int(lanes), int(window)
        self.samples = int(self.counts.sum())
        # One width that fits every window: lanes that differ by one sample may be cut into different windows.
        self._bits = (min(self.window, -(-self.samples // self.lanes)) - 1).bit_length()
        self._axis = lru_cache(maxsize=2)(self._lay_out)

    def epoch(self, position: int) -> int:
        """How often the whole data set was read before this position."""
        return position // self.samples

    def locate(self, positions: ArrayLike) -> tuple[Ints, Ints]:
        """(shard int64 [n], row int64 [n]) of each position int64 [n]; rows count from 0 inside their shard."""
        positions = _positions(positions)
        shard, row = np.empty_like(positions), np.empty_like(positions)
        epochs = positions // self.samples
        for epoch in np.unique(epochs):
            here = epochs == epoch
            q = positions[here] % self.samples
            place = self._permuted(int(epoch), q % self.lanes, q // self.lanes, inverse=False)
            axis = self._axis(int(epoch))
            at = np.searchsorted(axis.ends, place, side="right")
            shard[here] = axis.shards[at]
            row[here] = place - (axis.ends[at] - self.counts[axis.shards[at]])
        return shard, row

    def pool(self, position: int) -> Sequential:
        """What a substitute at this position is drawn from: all samples in the manifest's order."""
        return Sequential(self.counts)

    def removed(self, shard: Ints, row: Ints) -> NDArray[np.bool_]:
        """Whether each sample is removed, so that a substitute takes its slot: none is."""
        return np.zeros(len(shard), bool)

    def find(self, shard: ArrayLike, row: ArrayLike, epoch: int) -> Ints:
        """The inverse of `locate`: at which positions int64 [n] of this epoch the samples are read."""
        shard, row = np.asarray(shard, np.int64), np.asarray(row, np.int64)
        if ((row < 0) | (row >= self.counts[shard])).any():
            raise OrderError("a row lies outside its shard: rows count from 0 to the shard's samples - 1")
        axis = self._axis(epoch)
        place = axis.ends[axis.places[shard]] - self.counts[shard] + row
        lane = self._lanes().part(place)
        off = self._permuted(epoch, lane, place - self._lanes().start(lane), inverse=True) - self._lanes().start(lane)
        return epoch * self.samples + off * self.lanes + lane

    def open_windows(self, epoch: int, lanes: Ints, most: int = 1 << 22) -> tuple[Ints, Ints, Ints]:
        """Which stretch of the epoch's shards is open in each of these lanes, whenever a lane opens a window.

        (first place, last place int64 [T, len(lanes)], both inclusive; shard at each place int64 [S]). Lanes advance
        together, so that row t is one moment. Of more than `most` stretches, evenly spread moments are given.
        """
        lengths = self._lanes().length(lanes)
        moments = []
        for total in np.unique(lengths[lengths > 0]):  # at most two, which differ by one
            parts = -(-int(total) // self.window)
            step = max(1, parts * len(lanes) * 2 // most)
            moments.append(_Cut(total, np.asarray(parts)).start(np.arange(0, parts, step)))
        off = np.unique(np.concatenate(moments))[:, None]
        lane = lanes[lengths > 0]
        total = np.broadcast_to(lengths[lengths > 0], (len(off), len(lane)))
        windows = _Cut(total, -(-total // self.window))
        window = windows.part(np.minimum(off, total - 1))
        start = self._lanes().start(lane) + windows.start(window)
        ends = self._axis(epoch).ends
        first = np.searchsorted(ends, start, side="right")
        last = np.searchsorted(ends, start + windows.length(window) - 1, side="right")
        return first, last, self._axis(epoch).shards

    def open_spans(self, epoch: int) -> tuple[Ints, Ints, Ints, Ints]:
        """From which position to which one an epoch keeps each shard open: (shard, lane, first, last) int64 [n] each.

        Both positions inclusive, of the windows that the shard lies in. One entry for each lane that a shard reaches
        into; of one that reaches into more than two, a single entry (lane -1) stands for those in the middle.
        """
        axis, cut = self._axis(epoch), self._lanes()
        full = self.counts[axis.shards] > 0
        shards, stops = axis.shards[full], axis.ends[full]
        starts = stops - self.counts[shards]
        low, high = cut.part(starts), cut.part(stops - 1)
        several = high > low

        def window(place: Ints, lane: Ints) -> tuple[Ints, Ints]:
            total = cut.length(lane)
            windows = _Cut(total, -(-total // self.window))
            part = windows.part(place - cut.start(lane))
            begin = windows.start(part)
            return begin, begin + windows.length(part) - 1

        begin, _ = window(starts, low)
        until = np.where(several, cut.start(low) + cut.length(low), stops) - 1
        entries = [(shards, low, begin, window(until, low)[1])]
        if several.any():
            end = window((stops - 1)[several], high[several])[1]
            entries.append((shards[several], high[several], np.zeros_like(end), end))
        wide = high - low > 1
        if wide.any():
            whole = cut.length(low[wide] + 1)
            entries.append((shards[wide], np.full(len(whole), -1), np.zeros_like(whole), whole - 1))
        shard, lane, first, last = (np.concatenate(columns) for columns in zip(*entries, strict=True))
        base = epoch * self.samples
        middle = lane < 0  # from the first of all lanes to the last of them: a little too long, never too short
        first = base + first * self.lanes + np.where(middle, 0, lane)
        return shard, lane, first, base + last * self.lanes + np.where(middle, self.lanes - 1, lane)

    def _lanes(self) -> _Cut:
        return _Cut(np.asarray(self.samples), np.asarray(self.lanes))

    def _permuted(self, epoch: int, lane: Ints, off: Ints, *, inverse: bool) -> Ints:
        """Place on the epoch's axis of offset `off` in its lane, permuted inside the window that it lies in."""
        total = self._lanes().length(lane)
        windows = _Cut(total, -(-total // self.window))
        window = windows.part(off)
        start = windows.start(window)
        inside = permute(
            off - start, windows.length(window), self._window_keys(epoch, lane, window), self._bits, inverse=inverse
        )
        return self._lanes().start(lane) + start + inside

    def _window_keys(self, epoch: int, lane: Ints, window: Ints) -> NDArray[np.uint64]:
        """Keys uint64 [n, 2] of the window that each position lies in; of positions in a row only a few are open."""
        first, last = (int(window.min()), int(window.max())) if len(window) else (0, 0)
        if (last - first + 1) * self.lanes > len(window):
            return _keys(self.seed, epoch, lane, ORDER_WINDOWS, window)
        table = _keys(self.seed, epoch, np.arange(self.lanes), ORDER_WINDOWS, np.arange(first, last + 1)[:, None])
        return table[window - first, lane]

    def _lay_out(self, epoch: int) -> _Axis:
        count = len(self.counts)
        keys = np.broadcast_to(_keys(self.seed, epoch, 0, ORDER_SHARDS, 0), (count, 2))
        shards = permute(np.arange(count), np.full(count, count), keys, (count - 1).bit_length())
        places = np.empty_like(shards)
        places[shards] = np.arange(count)
        return _Axis(shards, places, np.cumsum(self.counts[shards]))


class Sequential:
    """The manifest's own order, again and again: for probes and for looking at data. counts int64 [S]."""

    def __init__(self, counts: ArrayLike) -> None:
        self.counts = _checked(counts)
        self.samples = int(self.counts.sum())
        self._ends = np.cumsum(self.counts)

    def epoch(self, position: int) -> int:
        """How often the whole data set was read before this position."""
        return position // self.samples

    def locate(self, positions: ArrayLike) -> tuple[Ints, Ints]:
        """(shard int64 [n], row int64 [n]) of each position int64 [n]."""
        place = _positions(positions) % self.samples
        shard = np.searchsorted(self._ends, place, side="right")
        return shard, place - (self._ends[shard] - self.counts[shard])

    def pool(self, position: int) -> Sequential:
        """What a substitute at this position is drawn from: all samples in the manifest's order."""
        return self

    def removed(self, shard: Ints, row: Ints) -> NDArray[np.bool_]:
        """Whether each sample is removed: none is."""
        return np.zeros(len(shard), bool)


def _checked(counts: ArrayLike) -> Ints:
    counts = np.array(counts, np.int64)
    if counts.ndim != 1 or (counts < 0).any():
        raise OrderError("counts must be one non-negative number of samples for each shard")
    if counts.sum() == 0:
        raise OrderError("the data set has no samples: an order needs at least one; ingest or index some images first")
    return counts


def _positions(positions: ArrayLike) -> Ints:
    positions = np.asarray(positions, np.int64)
    if positions.ndim != 1 or (positions.size and positions.min() < 0):
        raise OrderError("positions must be a vector of numbers from 0 on: they count samples since the run's start")
    return positions
