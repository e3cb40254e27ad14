"""Contrast over the levels of a tree of prototypes: HCSC's two losses (sections 2.4 to 2.6 of the notes on its code).

Instance contrast goes over the queue once a level, with the entries dropped that seem to be of the query's cluster there.
Prototype contrast asks for the query's own prototype among a level's others, each logit over its concentration, with those
dropped whose parent seems to be the query's; the coarsest level has no parent and drops none. Membership is a softmax over
a level's prototypes, of which the log-sum-exp is kept: a number for each entry of the queue, and each prototype below.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .contrast import streamed_logsumexp
from .hierarchy_config import HierarchyConfig
from .selection import Recorded, Selection, selective_cross_entropy
from .tree import Tree

FLOOR = 1e-3  # of a concentration where it divides; official: only where instances are selected


@dataclass(frozen=True)
class Masks:
    """Masks that were drawn elsewhere (True: stays), for tests: instance [levels, N, K], prototype [views, N, k] a level."""

    instance: Tensor | None
    prototype: list[Tensor]  # of each level but the last


class Scene(NamedTuple):
    """One teacher crop and the crops that are compared with it."""

    number: int  # of the teacher crop
    key: Tensor  # [N, D]
    queries: Tensor  # [views, N, D], `wide` global ones first
    wide: int
    draws: tuple[int, Tensor]  # key of the step's random numbers, and the images' numbers, int64 [N]


class Queue(NamedTuple):
    """Negatives [K, D] and, once there is a tree, their log-sum-exps over each level's prototypes, [levels, K]."""

    rows: Tensor
    scores: Tensor


class Levels:
    """A tree with what contrast wants of it. Nothing here changes but a cache."""

    def __init__(self, config: HierarchyConfig, tree: Tree) -> None:
        self.config, self.tree = config, tree
        self._above: list[Tensor] | None = None

    def compare(
        self, scene: Scene, queue: Queue, ramp: float, lineage: Tensor | None, masks: Masks | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and detached logs of one teacher crop: plain InfoNCE weighs 1 - ramp, the full loss ramp.

        lineage: each image's prototypes, int64 [levels, N]; None with ramp 0. masks: in place of drawn ones.
        """
        config = self.config
        similarity = (scene.queries[: scene.wide].detach() * scene.key).sum(-1).mean()
        logs = {"positive_similarity": similarity}
        loss = scene.key.new_zeros(())
        if ramp < 1:
            plain = selective_cross_entropy(scene.queries, scene.key, queue.rows, 1 / config.temperature)
            loss = loss + (1 - ramp) * self._over_crops(plain.loss, scene.wide).sum()
            logs["accuracy"] = plain.won[:, : scene.wide].to(similarity.dtype).mean()
        if lineage is None:
            return loss, logs
        if config.instance_weight:
            term, more = self._instance(scene, queue, lineage, masks)
            loss = loss + ramp * config.instance_weight * term
            logs |= more | {"instance": term.detach()}
        if config.prototype_weight:
            term, more = self._prototype(scene, lineage, masks)
            loss = loss + ramp * config.prototype_weight * term
            logs |= more | {"prototype": term.detach()}
        return loss, logs

    def _instance(
        self, scene: Scene, queue: Queue, lineage: Tensor, masks: Masks | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropies against the queue, over levels where its entries are selected."""
        config, rows, scale = self.config, queue.rows, 1 / self.config.temperature
        selected = len(scene.queries) if config.selection_on_local else scene.wide
        if not config.instance_selection:
            found = selective_cross_entropy(scene.queries, scene.key, rows, scale)
            return self._over_crops(found.loss, scene.wide).sum(), {
                "accuracy": found.won[:, : scene.wide].float().mean()
            }
        count = len(lineage)
        if masks is not None and masks.instance is not None:
            keep: Selection | Recorded = Recorded(masks.instance.unsqueeze(1))
        else:
            marks = [self.sharpened(level)[own] for level, own in enumerate(lineage)]
            streams = [[scene.number << 16 | level for level in range(count)]]
            draws = *scene.draws, streams
            keep = Selection([rows] * count, marks, list(queue.scores), config.instance_keep, draws)
        how = {"levels": count, "keep": keep, "masked": config.masked}
        found = selective_cross_entropy(scene.queries[:selected], scene.key, rows, scale, **how)
        total = self._over_levels(self._over_crops(found.loss, scene.wide), config.instance_levels)
        if selected < len(scene.queries):
            local = selective_cross_entropy(scene.queries[selected:], scene.key, rows, scale)
            total = total + self._over_crops(local.loss, 0).sum()
        share = keep.dropped / (count * len(scene.key) * len(rows))
        return total, {"accuracy": found.won[:, : scene.wide].float().mean(), "instance_dropped": share}

    def _prototype(self, scene: Scene, lineage: Tensor, masks: Masks | None) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropies against each level's prototypes, each divided by its concentration."""
        config, tree, last = self.config, self.tree, len(lineage) - 1
        terms, dropped, met, left = [], scene.key.new_zeros(()), 0, []
        for level, own in enumerate(lineage):
            rows = tree.prototypes[level] / tree.phi[level].clamp(min=FLOOR).unsqueeze(1)
            keep: Selection | Recorded | None = None
            if config.prototype_selection and level < last:
                if masks is not None:
                    keep = Recorded(masks.prototype[level].unsqueeze(0))
                else:
                    above = self.sharpened(level + 1)[lineage[level + 1]]
                    streams = [[scene.number << 16 | (v + 1) << 8 | level] for v in range(len(scene.queries))]
                    draws = *scene.draws, streams
                    lse = [self.above()[level]]
                    keep = Selection([tree.prototypes[level]], [above], lse, config.prototype_keep, draws)
            removed = self.no_negatives(own, level)
            left.append((~removed).sum(1, dtype=scene.key.dtype).mean())
            found = selective_cross_entropy(
                scene.queries, rows[own], rows, 1.0, keep=keep, removed=removed, masked=config.masked
            )
            terms.append(self._over_crops(found.loss, scene.wide).sum())
            if keep is not None:
                dropped, met = dropped + keep.dropped, met + len(scene.queries) * len(own) * len(rows)
        # The level with the fewest: at none its loss is 0, since the batch's own prototypes are no negatives.
        logs = {"prototype_negatives": torch.stack(left).min()}
        logs |= {"prototype_dropped": dropped / met} if met else {}
        return self._over_levels(torch.stack(terms), config.prototype_levels), logs

    def no_negatives(self, own: Tensor, level: int) -> Tensor:
        """Prototypes that are no negatives, bool [N, k] or [1, k]; own [N]."""
        k = self.config.levels[level]
        if self.config.negatives == "all":
            return torch.zeros(len(own), k, dtype=torch.bool, device=own.device).scatter_(1, own.unsqueeze(1), True)
        group = self.config.exclusion_batch or len(own)
        removed = torch.zeros(len(own) // group, k, dtype=torch.bool, device=own.device)
        removed.scatter_(1, own.view(-1, group), True)
        removed[:, self.tree.highest[level] :] = True
        return removed.repeat_interleave(group, 0) if len(removed) > 1 else removed

    def _over_crops(self, terms: Tensor, wide: int) -> Tensor:
        """[levels, views, N] to [levels]: the mean over images and over global crops, and the local crops' beside it."""
        by_crop = terms.mean(-1)
        total = by_crop[:, :wide].mean(1) if wide else terms.new_zeros(len(terms))
        local = by_crop[:, wide:]
        if local.shape[1]:
            total = total + (local.sum(1) if self.config.local_crops == "sum" else local.mean(1))
        return total

    @staticmethod
    def _over_levels(terms: Tensor, how: Literal["sum", "mean"]) -> Tensor:
        return terms.sum() if how == "sum" else terms.mean()

    # What selection compares with.

    def sharpened(self, level: int) -> Tensor:
        """A level's prototypes over their concentration, [k, D], so that a product is a logit of membership."""
        ratio = (self.config.selection_temperature or self.config.temperature) / self.config.temperature
        phi = self.tree.phi[level].clamp(min=FLOOR) * ratio
        return self.tree.prototypes[level] / phi.unsqueeze(1)

    def score(self, rows: Tensor) -> Tensor:
        """Log-sum-exp over each level's prototypes of rows [n, D], [levels, n]."""
        levels = range(len(self.config.levels))
        return torch.stack([streamed_logsumexp(rows, self.sharpened(level), 1.0)[0] for level in levels])

    def above(self) -> list[Tensor]:
        """Of each level but the last: log-sum-exp over the next level's prototypes, [k]."""
        if self._above is None:
            below = enumerate(self.tree.prototypes[:-1])
            self._above = [streamed_logsumexp(rows, self.sharpened(level + 1), 1.0)[0] for level, rows in below]
        return self._above
