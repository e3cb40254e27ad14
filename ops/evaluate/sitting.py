"""Who is asked about what: what an evaluator gets. Features are asked for by it, and computed once for all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...shards.errors import GristmillError
from .cache import Kept
from .pictures import Pictures
from .subject import Subject

LABELS = "name folders of classes, shards with labels.parquet or .cls, VOC or COCO"
Scores = dict[str, float]
Progress = Callable[[int, int, str], None]


class NotAskedError(GristmillError):
    """What an evaluator wants and this data does not have; the message says what."""


@dataclass(frozen=True)
class Sitting:
    """Who is asked about what. reference: to learn from; query: to be asked about, its classes numbered as the reference's.

    look: features of either, for so many last blocks. places: (path, split) of reference and of query as they were named,
    for evaluators that read masks or boxes; davis: a folder of clips. progress(done, total, text).
    """

    subject: Subject
    reference: Pictures
    query: Pictures
    look: Callable[[Subject, Pictures, int], Kept]
    seed: int = 0
    places: tuple[tuple[str, str | None], tuple[str, str | None]] | None = None
    davis: str | None = None
    progress: Progress | None = None

    def features(self, pictures: Pictures) -> Tensor:
        """Of the last block, [m, d], without what does not decode."""
        return self.look(self.subject, pictures, 1).features

    def labelled(self, pictures: Pictures, level: str | None) -> tuple[Tensor, Tensor]:
        """Features [m, d] and labels int64 [m] of those that have one. NotAskedError where there are none."""
        kept = self.look(self.subject, pictures, 1)
        labels = labels_of(pictures, level)[kept.rows]
        known = labels >= 0
        if not bool(known.any()):
            raise NotAskedError(f"no picture of {pictures.where} has a label; {LABELS}")
        return kept.features[known], labels[known]

    def both(self, level: str | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Features and labels of the reference, and of the query."""
        return (*self.labelled(self.reference, level), *self.labelled(self.query, level))


def labels_of(pictures: Pictures, level: str | None) -> Tensor:
    """int64 [n] of a level, -1 where unknown; of the pictures' own where none is named."""
    return pictures.labels if level is None else pictures.levels.get(level, torch.full((len(pictures),), -1))
