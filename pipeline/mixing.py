"""Which data set a position reads, when several are mixed by weight, and which of that data set's own positions.

Both are functions of (seed, weights, position). Positions are cut into blocks of 256. How many of a block's slots fall
to each data set is decided by floors of exact fractions (halving the list of data sets again and again, each half
getting its share of the slots), so that any stretch of blocks is off by less than one sample for each halving; which
slots they are is a keyed permutation of the block. Nothing is drawn independently: a data set of weight 1/4 has 64 of
every 256, and its own positions follow each other without a gap, so that its epochs are exact too. Weights may change
at a position; the counts reached until there are arithmetic, not history.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from math import gcd, lcm

import numpy as np
from numpy.typing import ArrayLike

from ..shards.errors import GristmillError
from .order import Ints, OrderError, permute, share
from .philox import MIXTURE, paired, words

Weights = tuple[float, ...]
History = tuple[tuple[int, Weights], ...]  # (from which position, weights)

BLOCK = 256  # slots that are permuted among themselves: a power of two, so that no cycle is walked
_BITS = BLOCK.bit_length() - 1
_PRECISION = 1 << 20  # weights with larger denominators are rounded to this many parts
_AT_ONCE = 4096  # blocks worked out together: 8 MB for each array


class MixingError(GristmillError, ValueError):
    """Weights of which no mixture can be made, or a change of weights at a position where none can be."""


class Mixing:
    """The mixture of `sources` data sets under a history of weights.

    history: (from which position, a weight for each data set), the first from 0 on, ascending. Weights need not sum to
    one; those that are missing at the end are zero, for a data set that joined later. MixingError otherwise.
    """

    def __init__(self, seed: int, sources: int, history: History) -> None:
        starts = [start for start, _ in history]
        if not starts or starts[0] != 0 or starts != sorted(set(starts)):
            raise MixingError(f"mixture: {starts} must begin at position 0 and ascend")
        self.seed, self.sources = seed, sources
        self._starts = np.array(starts, np.int64)
        self._parts = [proportions(weights, sources) for _, weights in history]
        self._bases: list[Ints] = [np.zeros(sources, np.int64)]  # of each data set, given before the weights changed
        for start in starts[1:]:
            self._bases.append(self._counts(np.array([start]), len(self._bases) - 1)[0])

    def at(self, positions: ArrayLike) -> tuple[Ints, Ints]:
        """(data set int64 [n], its own position int64 [n]) of each position int64 [n]."""
        positions = np.asarray(positions, np.int64)
        if positions.size and positions.min() < 0:
            raise OrderError("positions must be numbers from 0 on: they count samples since the run's start")
        if self.sources == 1:
            return np.zeros_like(positions), positions
        source, own = np.empty_like(positions), np.empty_like(positions)
        eras = np.searchsorted(self._starts, positions, side="right") - 1
        for era in np.unique(eras):
            here = eras == era
            source[here], own[here] = self._at(positions[here], int(era))
        return source, own

    def counts(self, position: int) -> Ints:
        """How many samples each data set has given before this position: int64 [sources]."""
        era = int(np.searchsorted(self._starts, position, side="right")) - 1
        return self._counts(np.array([position]), era)[0]

    def reach(self, source: int, own: int) -> int:
        """The first position before which this data set has given `own` samples. MixingError if it never will."""
        low, high = 0, max(1, int(self._starts[-1]))
        while self.counts(high)[source] < own:
            if self._parts[-1][source] == 0 and high > self._starts[-1]:
                raise MixingError(f"data set {source} has weight 0 and never gives {own} samples: raise its weight")
            low, high = high, 2 * high
        while low < high:
            middle = (low + high) // 2
            low, high = (middle + 1, high) if self.counts(middle)[source] < own else (low, middle)
        return low

    def _at(self, positions: Ints, era: int) -> tuple[Ints, Ints]:
        """`at` for positions under the same weights: the blocks that they lie in are worked out whole."""
        blocks, which = np.unique((positions - self._starts[era]) // BLOCK, return_inverse=True)
        slot = (positions - self._starts[era]) % BLOCK
        source, own = np.empty_like(positions), np.empty_like(positions)
        for first in range(0, len(blocks), _AT_ONCE):
            some = blocks[first : first + _AT_ONCE]
            here = (which >= first) & (which < first + len(some))
            pattern, inside = self._pattern(some, era)
            block, at = which[here] - first, slot[here]
            source[here] = pattern[block, at]
            own[here] = self._dealt(some * BLOCK, era)[block, source[here]] + inside[block, at]
        return source, own + self._bases[era][source]

    def _pattern(self, blocks: Ints, era: int) -> tuple[Ints, Ints]:
        """Data set of each slot, and how many slots of the block before it have the same: int64 [blocks, 256] each."""
        counts = self._dealt(blocks * BLOCK + BLOCK, era) - self._dealt(blocks * BLOCK, era)
        slots = np.arange(BLOCK)
        tokens = np.zeros((len(blocks), BLOCK), np.int64)  # each data set's share in one piece, before they are mixed
        for end in np.cumsum(counts, axis=1).T[:-1]:
            tokens += slots >= end[:, None]
        keys = np.repeat(paired(words(self.seed, self._starts[era] + blocks * BLOCK, MIXTURE, 4)), BLOCK, axis=0)
        x = np.tile(slots, len(blocks))
        moved = permute(x, np.full_like(x, BLOCK), keys, _BITS).reshape(len(blocks), BLOCK)
        pattern = np.take_along_axis(tokens, moved, axis=1)
        inside = np.zeros_like(pattern)
        for source in range(self.sources):
            mine = pattern == source
            inside += np.where(mine, np.cumsum(mine, axis=1) - 1, 0)
        return pattern, inside

    def _counts(self, positions: Ints, era: int) -> Ints:
        """How many of each data set were given before positions at or behind the start of an era: [n, sources]."""
        offset = positions - self._starts[era]
        counts = self._dealt(offset // BLOCK * BLOCK, era)
        for number, (block, slot) in enumerate(zip(*np.divmod(offset, BLOCK), strict=True)):
            if slot:
                pattern, _ = self._pattern(np.array([block]), era)
                counts[number] += np.bincount(pattern[0, :slot], minlength=self.sources)
        return counts + self._bases[era]

    def _dealt(self, n: Ints, era: int) -> Ints:
        """How many of the era's first n slots, n a multiple of 256, fall to each data set: int64 [len(n), sources]."""
        counts = np.zeros((len(n), self.sources), np.int64)
        stack = [(0, self.sources, n)]
        while stack:
            first, stop, slots = stack.pop()
            if stop - first == 1:
                counts[:, first] = slots
                continue
            middle = (first + stop) // 2
            left, whole = sum(self._parts[era][first:middle]), sum(self._parts[era][first:stop])
            mine = share(slots, left, whole) if whole else np.zeros_like(slots)
            stack += [(first, middle, mine), (middle, stop, slots - mine)]
        return counts


def proportions(weights: Sequence[float], sources: int) -> list[int]:
    """Whole numbers in the proportions of the weights: exact where their decimals allow, else to one in a million.

    MixingError for negative or infinite weights, all of them zero, or more of them than there are data sets.
    """
    if len(weights) > sources or not all(0 <= weight < float("inf") for weight in weights) or not any(weights):
        raise MixingError(
            f"mixture: {list(weights)} for {sources} data sets: give each a weight from 0 on, one at least above"
        )
    # As the decimals that a recipe has: 0.1 is meant to be one tenth, and not the float beside it.
    exact = [Fraction(str(weight)) for weight in weights] + [Fraction(0)] * (sources - len(weights))
    scale = lcm(*(weight.denominator for weight in exact))
    parts = [int(weight * scale) for weight in exact]
    common = gcd(*parts)
    parts = [part // common for part in parts]
    if sum(parts) > _PRECISION:
        total = sum(parts)
        parts = [max(1, round(part * _PRECISION / total)) if part else 0 for part in parts]
    return parts
