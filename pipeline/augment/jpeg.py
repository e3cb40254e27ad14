"""Encoded bytes to pixels on the CPU: libjpeg-turbo for plain JPEGs, OpenCV for all else.

Both give the same bits, and nvImageCodec's (DALI's) too. simplejpeg writes into memory that stays, where OpenCV takes
fresh memory for every image: at 500 x 375 pixels that makes it half as fast, for page faults. OpenCV turns images
upright by EXIF, and reads PNG, WebP, CMYK and whatever libjpeg-turbo only reads with a warning; its verdict counts.
Sizes are compared before a pixel is decoded, so that no header can ask for memory.
"""

from __future__ import annotations

import struct

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray

_ORIENTATION = 0x112
_EXIF = b"Exif\0\0"


class Pixels:
    """Memory for one decoded image at a time; uint8 [height * width * 3 + slack], reused and grown as needed."""

    def __init__(self, slack: int) -> None:
        self._slack = slack
        self._memory = np.zeros(slack, np.uint8)

    def decode(self, encoded: NDArray[np.uint8], width: int, height: int) -> NDArray[np.uint8] | None:
        """Upright RGB rows and slack behind, until the next call; None if it does not decode to this size."""
        needed = height * width * 3
        if _plain(encoded):
            try:
                if simplejpeg.decode_jpeg_header(encoded)[:2] != (height, width):
                    return None
                out = self._room(needed)
                simplejpeg.decode_jpeg(encoded, buffer=out)
                return self._memory
            except ValueError:  # damaged, or of a rare kind
                pass
        if not encoded.size:
            return None
        try:
            image = cv2.imdecode(encoded, cv2.IMREAD_COLOR_RGB)
        except cv2.error:
            return None
        if image is None or image.shape != (height, width, 3):
            return None
        self._room(needed)[:] = image.reshape(-1)
        return self._memory

    def _room(self, needed: int) -> NDArray[np.uint8]:
        if len(self._memory) < needed + self._slack:
            self._memory = np.zeros(needed * 5 // 4 + self._slack, np.uint8)
        return self._memory[:needed]


def _plain(encoded: NDArray[np.uint8]) -> bool:
    """Whether this claims to be a JPEG that lies upright as it is stored."""
    if len(encoded) < 4 or encoded[0] != 0xFF or encoded[1] != 0xD8:
        return False
    data = encoded.tobytes()
    at = data.find(_EXIF)
    return at < 0 or (data.find(_EXIF, at + 1) < 0 and _upright(data[at + len(_EXIF) : at + (1 << 16)]))


def _upright(tiff: bytes) -> bool:
    """Whether an EXIF block is whole as far as its first directory, and has the image stored upright."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None:
        return False
    try:
        (start,) = struct.unpack_from(order + "I", tiff, 4)
        (count,) = struct.unpack_from(order + "H", tiff, start)
        entries = [struct.unpack_from(order + "HHIH", tiff, start + 2 + 12 * i) for i in range(count)]
    except struct.error:
        return False
    found = [entry for entry in entries if entry[0] == _ORIENTATION]
    return all(entry[1:] == (3, 1, 1) for entry in found)
