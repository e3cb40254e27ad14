"""Philox4x32-10, the source of every random number in the data path, vectorised in NumPy.

A counter-based generator has no state: a draw is a function of (seed, position, stream, index) and of nothing else, so
a sample gets the same crops whatever its batch, its rank or the number of restarts before it. NumPy's own `Philox` is
the 64-bit variant behind an object that costs microseconds a sample to make; here a whole batch is one array operation,
and the algorithm is ours to freeze: tests hold it to the published known answers.
Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011, section 4.3 and the Random123 library.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..shards.errors import GristmillError

# The stream is the third counter word. Two purposes never share one, or their draws would be the same numbers.
VIEW = 0  # view v of a position draws from stream VIEW + v, v < 1000
SUBSTITUTE = 1000  # who stands in for a damaged sample
ORDER_SHARDS = 2000  # round keys of the permutation of shards, counted by the epoch
ORDER_WINDOWS = 2001  # round keys of the permutations inside windows, counted by (epoch, lane, window)
MIXTURE = 2002  # which data set a position reads
DROP_PATH = 2100  # layer l of the student draws from stream DROP_PATH + l
SHUFFLE = 2250  # the order of images in a forward whose batch norm must not know them by their place
MASK = 2300  # masked patches of crop v draw from stream MASK + v, v < 1000
NOISE = 4000  # the noise that erased boxes are filled with

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)


class SeedError(GristmillError, ValueError):
    """A seed, position or stream that does not fit its counter words."""


def philox4x32(counter: ArrayLike, key: ArrayLike) -> NDArray[np.uint32]:
    """Random words of each counter: uint32 [..., 4] and keys uint32 [..., 2] (broadcast) -> uint32 [..., 4]."""
    counter, key = np.asarray(counter, np.uint32), np.asarray(key, np.uint32)
    c0, c1, c2, c3 = (counter[..., i].astype(np.uint64) for i in range(4))
    k0, k1 = (key[..., i].astype(np.uint64) for i in range(2))
    # 64-bit lanes throughout: a 32 x 32 bit product needs them, and narrowing in between costs more than it saves.
    for round_ in range(_ROUNDS):
        if round_:
            k0, k1 = (k0 + np.uint64(_WEYL[0])) & _LOW, (k1 + np.uint64(_WEYL[1])) & _LOW
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (p1 >> _SHIFT) ^ c1 ^ k0, p1 & _LOW, (p0 >> _SHIFT) ^ c3 ^ k1, p0 & _LOW
    return np.stack(np.broadcast_arrays(c0, c1, c2, c3), axis=-1).astype(np.uint32)


def key_from(seed: int) -> NDArray[np.uint32]:
    """Key words uint32 [2] (low, high) of a seed in [0, 2**64); SeedError outside."""
    if not 0 <= int(seed) < 2**64:
        raise SeedError(f"seed {seed} is outside 0 ... 2**64 - 1: choose a non-negative seed")
    return np.array([int(seed) & 0xFFFFFFFF, int(seed) >> 32], np.uint32)


def words(seed: int, positions: ArrayLike, stream: ArrayLike, count: int) -> NDArray[np.uint32]:
    """The first `count` random words of each (position, stream): uint32 [..., count].

    positions int64 and stream int broadcast against each other: `positions[:, None], arange(v)` gives [n, v, count].
    Word i does not depend on `count`: asking for more leaves the first ones as they are.
    """
    return word_blocks(seed, positions, stream, range(-(-count // 4)))[..., :count]


def word_blocks(seed: int, positions: ArrayLike, stream: ArrayLike, blocks: Sequence[int]) -> NDArray[np.uint32]:
    """Words 4 b ... 4 b + 3 of each (position, stream), for each b of `blocks`: uint32 [..., 4 * len(blocks)]."""
    positions, stream = np.asarray(positions, np.int64), np.asarray(stream, np.int64)
    if positions.size and positions.min() < 0:
        raise SeedError(f"position {positions.min()} is negative: positions count samples from 0")
    if stream.size and not 0 <= stream.min() <= stream.max() < 2**32:
        raise SeedError(f"stream {stream.min()} ... {stream.max()} does not fit in 32 bits")
    shape = np.broadcast_shapes(positions.shape, stream.shape)
    counter = np.empty((*shape, len(blocks), 4), np.uint32)
    counter[..., 0] = (positions & 0xFFFFFFFF)[..., None]
    counter[..., 1] = (positions >> 32)[..., None]
    counter[..., 2] = stream[..., None]
    counter[..., 3] = np.array(blocks, np.uint32)
    return philox4x32(counter, key_from(seed)).reshape(*shape, 4 * len(blocks))


def paired(words: NDArray[np.uint32]) -> NDArray[np.uint64]:
    """64 bits of every two words, the first one low: uint32 [..., 2 n] -> uint64 [..., n]."""
    wide = words.astype(np.uint64)
    return wide[..., 0::2] | (wide[..., 1::2] << _SHIFT)


def uniform(seed: int, positions: ArrayLike, stream: ArrayLike, count: int) -> NDArray[np.float64]:
    """Uniform draws in [0, 1) with 32 random bits each: float64 [..., count], indexed as `words`."""
    return words(seed, positions, stream, count).astype(np.float64) * 2.0**-32


def uniform_blocks(seed: int, positions: ArrayLike, stream: ArrayLike, blocks: Sequence[int]) -> NDArray[np.float64]:
    """The draws of `uniform` that belong to these blocks of four alone: float64 [..., 4 * len(blocks)]."""
    return word_blocks(seed, positions, stream, blocks).astype(np.float64) * 2.0**-32


def boxed(u: NDArray[np.float64]) -> NDArray[np.float64]:
    """Uniform draws in [0, 1) to standard normal ones by Box and Muller, two to two: float64 [..., 2 n] both."""
    radius = np.sqrt(-2.0 * np.log(1.0 - u[..., 0::2]))  # 1 - u is in (0, 1]: no infinity
    angle = 2.0 * np.pi * u[..., 1::2]
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1).reshape(u.shape)


def normal(seed: int, positions: ArrayLike, stream: ArrayLike, count: int) -> NDArray[np.float64]:
    """Standard normal draws by Box and Muller: float64 [..., count]; draw i uses words 2 * (i // 2) and the next.

    The logarithm and the sine are the C library's: equal on one machine, not promised bit for bit across libraries.
    """
    return boxed(uniform(seed, positions, stream, 2 * -(-count // 2)))[..., :count]


def integers(seed: int, positions: ArrayLike, stream: ArrayLike, count: int, high: int) -> NDArray[np.int64]:
    """Integers in [0, high) from 64 random bits each: int64 [..., count]; draw i uses words 2 i and 2 i + 1.

    Bias is under high / 2**64, which `floor(uniform * high)` with its 32 bits is not for data sets of 1e9 samples.
    """
    if not 0 < high < 2**62:
        raise SeedError(f"cannot draw integers below {high}: it must lie in 1 ... 2**62 - 1")
    return (paired(words(seed, positions, stream, 2 * count)) % np.uint64(high)).astype(np.int64)
