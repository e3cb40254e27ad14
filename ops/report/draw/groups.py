"""Mugs' local groups as pictures: an image with those that its network would mix it with (arXiv 2203.14415, 3.2).

The memories hold features without pictures, so that the probes' reference images stand in for them: each is asked for as
training asks (the mean of its tokens against the rows that a memory holds). Beside it are the nearest by the feature that
comes out, mixed with neighbours from the checkpoint's own memory. What is kept is arrays like those of the probes' neighbours.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ....models.neighbours import search
from ...evaluate.knn import nearest
from ..neighbours import neighbour_arrays
from .source import SHOWN, Source


def draw_groups(source: Source) -> dict[str, np.ndarray]:
    """The local groups of a few images, as arrays of neighbours; `who` is memory or mixed."""
    glance, wanted = source.glance, source.recipe.student.neighbours + 4
    asked = np.unique(np.linspace(0, len(glance.keys) - 1, SHOWN).astype(int))
    memory = _others(glance.query, glance.row, asked, wanted)
    mixed_rows = mixed(source)
    found = {"memory": memory, "mixed": _others(mixed_rows, mixed_rows, asked, wanted)}
    codes = source.codes(glance.keys)
    # The level that k-NN is asked for: of the finest of three an image has few others.
    level = list(codes)[min(1, len(codes) - 1)] if codes else ""
    labels = codes.get(level)
    asked_labels = None if labels is None else labels[asked].tolist()
    arrays = neighbour_arrays(
        glance.thumbnails[asked], found, glance.thumbnails, asked_labels, None if labels is None else labels.tolist()
    )
    return arrays | {"level": np.array(level)}


@torch.no_grad()
def mixed(source: Source) -> Tensor:
    """The teacher's local-group features [n, out] of the images that are seen, by the checkpoint's memory."""
    teacher, context = source.teacher, source.objectives.teacher_context()
    assert teacher.relation is not None
    query = source.glance.query
    _, rows = search(
        query, context["local_group.bank"], source.recipe.student.neighbours, norms=context["local_group.norms"]
    )
    return F.normalize(
        teacher.heads["local_group"](teacher.relation(query, rows, teacher.backbone.norm)).float(), dim=1
    )


def _others(query: Tensor, rows: Tensor, asked: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosine [q, k] and number [q, k] of the rows nearest to each image that is asked, without its own."""
    chosen = torch.from_numpy(asked)
    cosine, index = nearest(rows, query[chosen], k=count + 1)
    others = (index != chosen[:, None]).float()
    # Stable: those that are others move to the front in their order, the image itself (or the last) falls off.
    order = others.argsort(dim=1, descending=True, stable=True)[:, : min(count, len(rows) - 1)]
    return cosine.gather(1, order).numpy(), index.gather(1, order).numpy()
