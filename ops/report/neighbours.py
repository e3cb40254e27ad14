"""What lies next to an image, seen with different eyes: `neighbours.npz`, its writer and its reader.

Format, one row a query and pair of eyes, Q rows in all, S the thumbnails' side, k neighbours in falling similarity:
`query` uint8 [Q, S, S, 3]; `neighbour` uint8 [Q, k, S, S, 3]; `similarity` float32 [Q, k], cosine; `match` int8 [Q, k],
1 same label, 0 another, -1 not known; `who` strings [Q]: teacher, random (the untrained network), pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np

from .crops import BROKEN, picture
from .folder import RunFolder

EYES = {"teacher": "teacher", "random": "untrained", "pixels": "raw pixels"}
QUERIES, NEAREST = 8, 8


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
        for row, asked in enumerate(self.query):
            groups.setdefault(asked.tobytes(), []).append(row)
        return list(groups.values())


def save_neighbours(
    path: Path,
    query: np.ndarray,
    found: Mapping[str, tuple[np.ndarray, np.ndarray]],
    reference: np.ndarray,
    query_labels: Sequence[int] | None = None,
    reference_labels: Sequence[int] | None = None,
) -> None:
    """Write `neighbour_arrays` to `path`."""
    arrays = neighbour_arrays(query, found, reference, query_labels, reference_labels)
    with path.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)


def neighbour_arrays(
    query: np.ndarray,
    found: Mapping[str, tuple[np.ndarray, np.ndarray]],
    reference: np.ndarray,
    query_labels: Sequence[int] | None = None,
    reference_labels: Sequence[int] | None = None,
) -> dict[str, np.ndarray]:
    """What each of `found` (who -> cosine [q, k], row of `reference` [q, k], as `evaluate.nearest` gives) saw, in the format.

    `query` uint8 [q, S, S, 3] and `reference` uint8 [m, S, S, 3] are thumbnails; labels are codes, negative for unknown.
    """
    similarity = np.concatenate([np.asarray(s, dtype=np.float32) for s, _ in found.values()])
    index = np.concatenate([np.asarray(i) for _, i in found.values()])
    match = np.full(index.shape, -1, dtype=np.int8)
    if query_labels is not None and reference_labels is not None:
        ours = np.tile(np.asarray(query_labels), len(found))[:, None]
        theirs = np.asarray(reference_labels)[index]
        match = np.where((ours < 0) | (theirs < 0), -1, ours == theirs).astype(np.int8)
    return {
        "query": np.tile(query, (len(found), 1, 1, 1)),
        "neighbour": reference[index],
        "similarity": similarity,
        "match": match,
        "who": np.repeat(np.array(list(found), dtype=np.str_), len(query)),
    }


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


def section(run: RunFolder) -> str:
    """What the teacher, the untrained network and the bare pixels hold to be alike."""
    if not (run.path / "neighbours.npz").exists():
        return '<p class="missing">No neighbours yet: the last probe leaves them here.</p>'
    try:
        near = load_neighbours(run.path / "neighbours.npz")
        groups = rows_of_pictures(near, EYES)
    except BROKEN as error:
        return f'<p class="missing">neighbours.npz cannot be read: {escape(str(error))}</p>'
    return (
        "<p>Each picture is followed by the pictures most similar to it, as the trained teacher, the untrained network "
        f"and the bare pixels see them. The number is the cosine similarity.{legend(near)}</p>{groups}"
    )


def legend(near: Neighbours, what: str = "label") -> str:
    """What frames and signs mean, where labels are known."""
    known = (near.match >= 0).any()
    return f" A solid frame and ✓ mean the same {what}, a dotted frame and ✗ another one." if known else ""


def rows_of_pictures(near: Neighbours, eyes: Mapping[str, str], queries: int = QUERIES) -> str:
    """Each query with a row of neighbours a pair of eyes, in the order of `eyes` (who -> words)."""
    return "".join(_query(near, rows, eyes) for rows in near.by_query()[:queries])


def _query(near: Neighbours, rows: list[int], eyes: Mapping[str, str]) -> str:
    lines = []
    for row in sorted(rows, key=lambda row: (list(eyes).index(near.who[row]) if near.who[row] in eyes else 9, row)):
        who = str(near.who[row])
        thumbs = "".join(
            thumbnail(near.neighbour[row, place], float(near.similarity[row, place]), int(near.match[row, place]))
            for place in range(min(NEAREST, near.similarity.shape[1]))
        )
        lines.append(f'<li><span class="eyes">{escape(eyes.get(who, who))}</span>{thumbs}</li>')
    asked = picture(near.query[rows[0]])
    return f'<div class="near"><img alt="query" width="96" src="{asked}"><ul class="rows">{"".join(lines)}</ul></div>'


def thumbnail(pixels: np.ndarray, value: float, match: int = -1, what: str = "cosine") -> str:
    """A small picture with a number below it and, where it is known, whether its label is the query's."""
    kind, sign, words = {1: ("yes", "✓ ", "same label, "), 0: ("no", "✗ ", "another label, ")}.get(match, ("", "", ""))
    title = f"{words}{what} {value:.3f}"
    return f'<figure class="thumb {kind}" title="{title}"><img alt="{title}" src="{picture(pixels)}">{sign}{value:.2f}</figure>'
