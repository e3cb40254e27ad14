"""What an image looks like, in 256 bits: signs of its low frequencies, in the manner of PDQ.

A luma of 64 x 64 (refine.py) is transformed by DCT-II, and 16 x 16 frequencies without the constant row and column are held
against their median (PDQ: Meta, "The TMK+PDQF Video-Hashing Algorithm and the PDQ Image-Hashing Algorithm", 2019). All
arithmetic is on whole numbers below 2^53, so that the bits are the same on every machine. Bits lie in diagonals: each 16
consecutive ones, a band of the search in known.py, take one frequency of every row and column. A mirrored image is
another one: left and right are real to many a task, and training flips anyway.
"""

from __future__ import annotations

import numpy as np

SIDE = 64  # of the luma
BITS = 256
# Under this quality, rounding decides most of the bits: even grounds and plain ramps would be duplicates of each other.
MIN_QUALITY = 1.0
_LOW = 16
_SCALE = 1 << 13

# [16, 64]: rows 1..16 of the DCT, rounded to whole numbers. |row| sums to under 2^19, so the products stay under 2^46.
_COSINES = np.rint(np.cos(np.pi / (2 * SIDE) * np.outer(np.arange(1, _LOW + 1), 2 * np.arange(SIDE) + 1)) * _SCALE)
_ROWS, _COLUMNS = np.meshgrid(np.arange(_LOW), np.arange(_LOW), indexing="ij")
# Place `16 * d + r` of the bits holds row r and column (d - r) mod 16.
_DIAGONAL = (_COLUMNS * _LOW + (_ROWS - _COLUMNS) % _LOW).ravel()
# What rounding 64 x 64 pixels to whole levels (variance 1 / 12) does to a frequency, on average.
_ROUNDING = float(np.sqrt(np.mean(np.outer((_COSINES**2).sum(1), (_COSINES**2).sum(1))) / 12))


def fingerprint(pixels: np.ndarray) -> bytes:
    """32 bytes from a luma of uint8 [64, 64]; none (b"") of an image too flat to have a look of its own."""
    frequencies = _frequencies(pixels)
    middle = _middle(frequencies)
    if _quality(frequencies, middle) < MIN_QUALITY:
        return b""
    return np.packbits(frequencies > middle).tobytes()


def quality(pixels: np.ndarray) -> float:
    """How far from their threshold half of the bits are at least, in standard deviations of the luma's rounding."""
    frequencies = _frequencies(pixels)
    return _quality(frequencies, _middle(frequencies))


def distance(a: bytes, b: bytes) -> int:
    """In how many bits two fingerprints differ; 128 is what unrelated images come to."""
    return (int.from_bytes(a, "little") ^ int.from_bytes(b, "little")).bit_count()


def _frequencies(pixels: np.ndarray) -> np.ndarray:
    if pixels.shape != (SIDE, SIDE) or pixels.dtype != np.uint8:
        raise ValueError(
            f"a fingerprint is taken of uint8 [{SIDE}, {SIDE}], not of {pixels.dtype} {list(pixels.shape)}"
        )
    # float64 holds these whole numbers exactly, whatever the order of the sum, and has a fast product.
    return (_COSINES @ pixels.astype(np.float64) @ _COSINES.T).ravel()[_DIAGONAL]


def _middle(frequencies: np.ndarray) -> float:
    return np.partition(frequencies, BITS // 2 - 1)[BITS // 2 - 1]


def _quality(frequencies: np.ndarray, middle: float) -> float:
    return float(np.partition(np.abs(frequencies - middle), BITS // 2)[BITS // 2]) / _ROUNDING
