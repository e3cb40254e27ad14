"""What lies next to an image, seen with different eyes: `neighbours.npz`, its writer and its reader.

Format, one row a query and pair of eyes, Q rows in all, S the thumbnails' side, k neighbours in falling similarity:
`query` uint8 [Q, S, S, 3]; `neighbour` uint8 [Q, k, S, S, 3]; `similarity` float32 [Q, k], cosine; `match` int8 [Q, k],
1 same label, 0 another, -1 not known; `who` strings [Q]: teacher, random (the untrained network), pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Neighbours:
    """The arrays of `neighbours.npz`."""

    query: np.ndarray
    neighbour: np.ndarray
    similarity: np.ndarray
    match: np.ndarray
    who: np.ndarray

    def by_query(self) -> list[list[int]]:
        """Rows of the same query picture, in order of appearance."""
        groups: dict[bytes, list[int]] = {}
        for row, picture in enumerate(self.query):
            groups.setdefault(picture.tobytes(), []).append(row)
        return list(groups.values())


def save_neighbours(
    path: Path,
    query: np.ndarray,
    found: Mapping[str, tuple[np.ndarray, np.ndarray]],
    reference: np.ndarray,
    query_labels: Sequence[int] | None = None,
    reference_labels: Sequence[int] | None = None,
) -> None:
    """Write what each of `found` (who -> cosine [q, k], row of `reference` [q, k], as `evaluate.nearest` gives) saw.

    `query` uint8 [q, S, S, 3] and `reference` uint8 [m, S, S, 3] are thumbnails; labels are codes, negative for unknown.
    """
    similarity = np.concatenate([np.asarray(s, dtype=np.float32) for s, _ in found.values()])
    index = np.concatenate([np.asarray(i) for _, i in found.values()])
    match = np.full(index.shape, -1, dtype=np.int8)
    if query_labels is not None and reference_labels is not None:
        ours = np.tile(np.asarray(query_labels), len(found))[:, None]
        theirs = np.asarray(reference_labels)[index]
        match = np.where((ours < 0) | (theirs < 0), -1, ours == theirs).astype(np.int8)
    with path.open("wb") as file:
        np.savez_compressed(
            file,
            allow_pickle=False,
            query=np.tile(query, (len(found), 1, 1, 1)),
            neighbour=reference[index],
            similarity=similarity,
            match=match,
            who=np.repeat(np.array(list(found), dtype=np.str_), len(query)),
        )


def load_neighbours(path: Path) -> Neighbours:
    """Read the file; `match` and `who` may be missing. Raises one of `crops.BROKEN` for a file that is none of ours."""
    with np.load(path, allow_pickle=False) as archive:
        query, neighbour = archive["query"], archive["neighbour"]
        similarity = np.asarray(archive["similarity"], dtype=np.float32)
        match = archive["match"] if "match" in archive.files else np.full(similarity.shape, -1, np.int8)
        who = archive["who"] if "who" in archive.files else np.array("teacher")
    rows, k = similarity.shape if similarity.ndim == 2 else (-1, -1)
    thumbnails = query.dtype == neighbour.dtype == np.uint8 and query.ndim == 4 and query.shape[-1] == 3
    if (
        not thumbnails
        or len(query) != rows
        or neighbour.shape[:2] != (rows, k)
        or neighbour.shape[2:] != query.shape[1:]
    ):
        raise ValueError(
            f"query {query.shape}, neighbour {neighbour.shape} and similarity {similarity.shape} do not fit"
        )
    return Neighbours(query, neighbour, similarity, np.broadcast_to(match, (rows, k)), np.broadcast_to(who, (rows,)))
