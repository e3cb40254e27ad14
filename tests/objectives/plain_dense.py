"""Dense contrast written from the paper's formulas (DenseCL, arXiv 2011.09157), a loop a place, in NumPy's float64.

Nothing is shared with the product. Maps are [n, S2, d], row by row; crops are crop-major.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Places = dict[int, int]  # place of the query map -> place of the key map, of those that have one


def cosine(a: Floats, b: Floats) -> float:
    return float(a @ b / math.sqrt((a @ a) * (b @ b)))


def by_features(query: Floats, key: Floats, mutual: bool = False, least: float | None = None) -> Places:
    """Maps [S2, d] of one image."""
    table = [[cosine(q, k) for k in key] for q in query]
    found: Places = {}
    for i, row in enumerate(table):
        j = row.index(max(row))
        column = [other[j] for other in table]
        if mutual and column.index(max(column)) != i:
            continue
        if least is None or row[j] >= least:
            found[i] = j
    return found


def centre(geometry: Floats, size: int, side: int, place: int) -> Floats:
    """Source pixel (x, y) under the middle of a cell."""
    cell = size / side
    x, y = (place % side + 0.5) * cell - 0.5, (place // side + 0.5) * cell - 0.5
    return geometry @ np.array([x, y, 1.0])


def by_geometry(query: Floats, key: Floats, size: tuple[int, int], side: tuple[int, int]) -> Places:
    """Crops' maps [2, 3]: nearest middle of a cell in the source, for places that the key crop shows."""
    found: Places = {}
    for i in range(side[0] ** 2):
        point = centre(query, size[0], side[0], i)
        x, y = np.linalg.solve(key[:, :2], point - key[:, 2])
        if not (-0.5 <= x <= size[1] - 0.5 and -0.5 <= y <= size[1] - 0.5):
            continue
        far = [float(((centre(key, size[1], side[1], j) - point) ** 2).sum()) for j in range(side[1] ** 2)]
        found[i] = far.index(min(far))
    return found


def info_nce(query: Floats, positive: Floats, queue: Floats, temperature: float) -> float:
    """-log of the positive's share, for one place."""
    logits = [float(query @ positive) / temperature, *(float(query @ row) / temperature for row in queue)]
    top = max(logits)
    return top + math.log(sum(math.exp(x - top) for x in logits)) - logits[0]


def dense_loss(
    queries: list[Floats],
    keys: list[Floats],
    match: Callable[[int, int, int], Places],
    queue: Floats,
    temperature: float,
    same_views: bool,
) -> float:
    """`queries`, `keys`: a crop each, unit rows [B, S2, D]; `match(i, j, image)`: of teacher crop i and student crop j."""
    terms = []
    for i, key in enumerate(keys):
        for j, query in enumerate(queries):
            if i == j and same_views:
                continue
            of_images = []
            for image in range(len(query)):
                found = match(i, j, image)
                losses = [info_nce(query[image, a], key[image, b], queue, temperature) for a, b in found.items()]
                of_images.append(sum(losses) / len(losses) if losses else 0.0)
            terms.append(sum(of_images) / len(of_images))
    return sum(terms) / len(terms)
