"""The deep look at a shard: each image's checksum, its upright size, and whether it decodes at all.

A quick index knows places alone. This fills in what only the bytes can tell, and changes nothing of a data set's
identity. An image that does not decode stays in its place, without a size: the rows of a shard made by others are not
ours to drop, the reader puts a substitute into such a slot at once, and no second index renames the data set.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
from isal.isal_zlib import crc32

from .archive import ShardError
from .blob import Blob
from .images import ImageError, check_image
from .manifest import Rows

_TOGETHER = 1 << 23  # bytes asked for at once: a remote shard is not fetched image by image


@dataclass
class Depth:
    """A shard's rows with checksums and sizes. A damaged image (key, reason) has width and height 0.

    `odd` counts, by reason, images that Pillow decodes and DALI may fail on or misread: ingest would have re-encoded
    them, which cannot be done in place.
    """

    rows: Rows
    damaged: list[tuple[str, str]] = field(default_factory=list)
    odd: Counter[str] = field(default_factory=Counter)


def deepen(blob: Blob, rows: Rows) -> Depth:
    """Read and decode every image of a shard. ShardError where the bytes end; a blob's own errors pass through."""
    n = len(rows)
    sums, width, height = np.zeros(n, np.uint32), np.zeros(n, np.int32), np.zeros(n, np.int32)
    found = Depth(rows)
    for row, data in images(blob, rows):
        if len(data) < rows.length[row]:
            raise ShardError(blob.url, int(rows.offset[row]) + len(data), "cut short while it was read")
        sums[row] = crc32(data)
        try:
            image = check_image(data)
        except ImageError as error:
            found.damaged.append((rows.keys[row], str(error)))
            continue
        width[row], height[row] = image.width, image.height
        if image.reencoded is not None:
            found.odd[image.reencoded] += 1
    found.rows = replace(rows, crc32=sums, width=width, height=height, deep=True)
    return found


def images(blob: Blob, rows: Rows) -> Iterator[tuple[int, bytes]]:
    """Every row and its bytes, neighbours read together; fewer bytes where the blob ends. A blob's errors pass through."""
    offset, length = rows.offset.tolist(), rows.length.tolist()
    row = 0
    while row < len(rows):
        start, stop = offset[row], row + 1
        end = start + length[row]
        while stop < len(rows) and end <= offset[stop] and offset[stop] + length[stop] - start <= _TOGETHER:
            end = offset[stop] + length[stop]
            stop += 1
        window = blob.read(start, end - start)
        for at in range(row, stop):
            yield at, window[offset[at] - start : offset[at] - start + length[at]]
        row = stop
