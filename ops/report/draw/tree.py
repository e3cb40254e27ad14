"""HCSC's tree with images: who belongs to which prototype, and which negatives its selection takes for false ones.

Images of the probes' reference are embedded by the teacher's own head and walk down the tree that the checkpoint holds. The
queue holds features without pictures, so that selection is shown among these images instead: a negative is dropped with the
probability that it belongs to the query's prototype, the mean over the levels of what training computes (levels.py). Labels,
where there are some, say how often the dropped really are of the query's kind, and how often any two are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .source import SHOWN, Source

if TYPE_CHECKING:
    from ....objectives.hierarchy import HierarchyObjective
    from ....objectives.levels import Levels

ROOTS, CHILDREN = 6, 3  # nodes shown on the coarsest level, and below each node
SIDE, BOX = 48, Image.Resampling.BOX  # pixels of a node's pictures, of which there are many
PICTURES = (6, 4, 3)  # of a node, by its depth
NEAREST = 8  # of the dropped and of the kept


class NoTreeError(ValueError):
    """The objective has not clustered yet."""


def draw_tree(source: Source) -> dict[str, np.ndarray]:
    """Nodes depth first (depth, number, images int64 [N]; picture uint8 [N, P, T, T, 3], pictures int64 [N]) and removals."""
    objective: HierarchyObjective = source.objectives.objectives["hierarchy"]  # pyright: ignore[reportAssignmentType]
    if objective.last < 0:
        warm = objective.config.warmup * source.recipe.images
        raise NoTreeError(
            f"there is no tree yet: the first one is made after {warm:,.0f} images, once the objective's memory is full"
        )
    keys = embed(source)
    tree = objective.tree
    lineage = tree.lineage(tree.assign(keys))
    small = np.stack([np.asarray(Image.fromarray(t).resize((SIDE, SIDE), BOX)) for t in source.glance.thumbnails])
    found = nodes(lineage.numpy(), (keys @ tree.prototypes[0].T).numpy(), small)
    found |= {"levels": np.array([len(means) for means in tree.means]), "clustered": np.array(objective.last)}
    return found | removals(source, keys, drop_probability(objective.levels, keys, lineage).numpy())


@torch.no_grad()
def embed(source: Source) -> Tensor:
    """Unit rows [n, dim] of the images that are seen, by the teacher's head of the hierarchy."""
    out = source.teacher.heads["hierarchy"](source.glance.class_token)
    return F.normalize((out[0] if isinstance(out, tuple) else out).float(), dim=1)


def nodes(lineage: np.ndarray, cosine: np.ndarray, thumbnails: np.ndarray) -> dict[str, np.ndarray]:
    """The fullest nodes of each level, each with the images that are surest of their finest prototype.

    lineage int64 [levels, n], the finest first; cosine [n, k] with the finest prototypes.
    """
    surest = np.argsort(-cosine[np.arange(len(cosine)), lineage[0]], kind="stable")
    rows: list[tuple[int, int, np.ndarray]] = []

    def walk(depth: int, members: np.ndarray) -> None:
        level = len(lineage) - 1 - depth
        if level < 0:
            return
        numbers, counts = np.unique(lineage[level, members], return_counts=True)
        for place in np.argsort(-counts, kind="stable")[: CHILDREN if depth else ROOTS]:
            own = members[lineage[level, members] == numbers[place]]
            rows.append((depth, int(numbers[place]), own))
            walk(depth + 1, own)

    walk(0, surest)
    pictures = np.zeros((len(rows), PICTURES[0], *thumbnails.shape[1:]), np.uint8)
    for row, (depth, _, members) in enumerate(rows):
        shown = members[: PICTURES[min(depth, len(PICTURES) - 1)]]
        pictures[row, : len(shown)] = thumbnails[shown]
    return {
        "depth": np.array([depth for depth, _, _ in rows]),
        "number": np.array([number for _, number, _ in rows]),
        "images": np.array([len(members) for _, _, members in rows]),
        "picture": pictures,
        "pictures": np.array([min(len(m), PICTURES[min(d, len(PICTURES) - 1)]) for d, _, m in rows]),
        "total": np.array(lineage.shape[1]),
        "used": np.array([len(np.unique(level)) for level in lineage]),
    }


def drop_probability(levels: Levels, keys: Tensor, lineage: Tensor) -> Tensor:
    """That image k is dropped from the negatives of image n, [n, n], the mean over the levels."""
    low, high = levels.config.instance_keep
    total = torch.zeros(len(keys), len(keys))
    for level, lse in enumerate(levels.score(keys)):
        member = (levels.sharpened(level)[lineage[level]] @ keys.T - lse).exp()
        total += 1 - (1 - member).clamp(low, high)
    return total / len(lineage)


def removals(source: Source, keys: Tensor, dropped: np.ndarray) -> dict[str, np.ndarray]:
    """Of a few queries: those likeliest dropped, and the nearest that are dropped less than most; what labels say of all pairs."""
    pictures, count = source.glance.thumbnails, len(keys)
    similarity = (keys @ keys.T).numpy()
    own = np.eye(count, dtype=bool)
    chance = np.where(own, -1.0, dropped)
    asked = np.unique(np.linspace(0, count - 1, SHOWN).astype(int))
    gone = np.argsort(-chance[asked], axis=1, kind="stable")[:, :NEAREST]
    stay = np.where(own | (dropped > dropped[~own].mean()), -2.0, similarity)[asked]
    kept = np.argsort(-stay, axis=1, kind="stable")[:, :NEAREST]
    found: dict[str, Any] = {
        "query": pictures[asked],
        "gone": pictures[gone],
        "gone_chance": np.take_along_axis(dropped[asked], gone, 1),
        "kept": pictures[kept],
        "kept_cosine": np.take_along_axis(similarity[asked], kept, 1),
    }
    names, truth, base = [], [], []
    for name, codes in source.codes(source.glance.keys).items():
        known = codes >= 0
        pairs = known[:, None] & known & ~own
        same = (codes[:, None] == codes) & pairs
        weight = dropped * pairs
        if same.any() and weight.sum() > 0:
            names.append(name)
            truth.append(float((weight * same).sum() / weight.sum()))
            base.append(float(same.sum() / pairs.sum()))
    found |= {"label": np.array(names, dtype=np.str_), "right": np.array(truth), "by_chance": np.array(base)}
    return found | {"dropped": np.array(dropped[~own].mean())}
