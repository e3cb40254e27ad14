"""A few JPEGs as a camera makes them: textured, lit from one side, noisy, of several sizes; drawn by the demo's code."""

import io
from functools import cache

import numpy as np
from gristmill.shards.demo import draw_instance
from PIL import Image

SIZES = [(200, 150), (150, 200), (128, 128), (240, 97)]  # width, height


@cache
def jpegs() -> tuple[bytes, ...]:
    """One JPEG of each of SIZES."""
    encoded = []
    for index, (width, height) in enumerate(SIZES):
        pictures, _ = draw_instance(3, index, index, 0, images=2, size=256)
        buffer = io.BytesIO()
        Image.fromarray(np.asarray(pictures[0], np.uint8)).crop((8, 8, 8 + width, 8 + height)).save(
            buffer, "JPEG", quality=92
        )
        encoded.append(buffer.getvalue())
    return tuple(encoded)


def textures() -> list[np.ndarray]:
    """The same, decoded: uint8 [H, W, 3] each."""
    return [np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for data in jpegs()]
