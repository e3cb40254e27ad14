"""What the networks are fed: crops by size, the shape of a step, the draws of stochastic depth, weak flags, masks. No state.

A global batch is cut into `world` equal shares in the order of the positions, and a share into `accumulate`
micro-batches. Everything here is a function of (recipe, rank, world, position), so a step can be fed again elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..objectives import StepInfo
from ..pipeline.masks import draw_masks
from ..pipeline.philox import DROP_PATH, SHUFFLE, uniform
from ..pipeline.plan import Plan
from ..pipeline.strong import strong_crops
from .recipe import Recipe, RecipeError


@dataclass(frozen=True)
class Origin:
    """Where a rank's share of a batch comes from."""

    index: Tensor  # [B] int64: each image's number in the data set, shard by shard
    geometry: Mapping[str, Tensor]  # [B, n, 2, 3] a view: crop pixel (x, y, 1) to pixel of the upright source


class Inputs:
    """Of one rank. `micro`: images of a micro-batch; `parts`: micro-batches a step."""

    def __init__(self, recipe: Recipe, rank: int, world: int, device: torch.device | str):
        self.recipe, self.rank, self.world, self.device = recipe, rank, world, torch.device(device)
        self.parts = recipe.engine.accumulate
        self.micro, rest = divmod(recipe.batch, world * self.parts)
        if rest or not self.micro:
            shared = f"{world} processes" + (f" in {self.parts} micro-batches each" if self.parts > 1 else "")
            raise RecipeError(f"batch: {recipe.batch} images cannot be shared equally by {shared}")
        self.student = _by_size([v for v in recipe.views if v.role in ("student", "both")])
        self.teacher = _by_size([v for v in recipe.views if v.role in ("teacher", "both")])
        self.student_crops = sum(view.count for group in self.student for view in group)
        self._plan = Plan(recipe.views)

    def crops(self, batch: Mapping[str, Tensor], views: list[list[Any]], part: int) -> list[Tensor]:
        """[crops * b, 3, H, W] for each size, crop-major as the official code has them; batch: [B, n, 3, H, W] a view."""
        rows = slice(part * self.micro, (part + 1) * self.micro)
        return [
            torch.cat([batch[view.name][rows].transpose(0, 1).flatten(0, 1) for view in group]).to(
                self.device, non_blocking=True
            )
            for group in views
        ]

    def info(
        self,
        position: int,
        progress: float,
        part: int = 0,
        origin: Origin | None = None,
        images: int = 0,
        drawn: bool = True,
    ) -> StepInfo:
        """The step's shape; `origin`: where its images and crops come from, `images`: how many the data set has.

        drawn: with the weak flags and masks of this position; a batch of masks takes a good part of a second to draw.
        """
        views, seen = ([view for group in side for view in group] for side in (self.student, self.teacher))
        largest = max(view.size for view in views)
        rows = slice(part * self.micro, (part + 1) * self.micro)
        cut = None if origin is None else origin.geometry
        return StepInfo(
            batch=self.micro,
            student_crops=self.student_crops,
            student_globals=sum(view.count for view in views if view.size == largest),
            teacher_crops=sum(view.count for view in seen),
            position=position,
            progress=progress,
            weak=self._weak(views[0].name, position, part) if drawn else None,
            same_views=any(view.role == "both" for view in views),
            masks=self.masks(position, progress, part) if drawn else None,
            rank=self.rank,
            world=self.world,
            index=None if origin is None else origin.index[rows],
            images=images,
            student_geometry=None if cut is None else _crops(cut, self.student[0], rows),
            teacher_geometry=None if cut is None or not seen else _crops(cut, self.teacher[0], rows),
            global_size=largest,
            teacher_size=max((view.size for view in seen), default=0),
        )

    def shuffled(self, position: int, part: int = 0) -> dict[str, Tensor]:
        """Context for a teacher whose batches of batch norm are shuffled: the order of a micro-batch's images [b].

        Drawn from the positions, and inside groups of consecutive ones, so that it does not depend on the ranks.
        """
        size = self.recipe.student.shuffle
        if size is None:
            return {}
        draws = uniform(self.recipe.stream.seed, self._positions(position, part), SHUFFLE, 1).reshape(-1, size)
        order = draws.argsort(axis=1) + np.arange(0, self.micro, size)[:, None]
        return {"shuffle.order": torch.from_numpy(order.flatten()).to(self.device, non_blocking=True)}

    def masks(self, position: int, progress: float, part: int) -> Tensor | None:
        """Of the student's global crops, bool [crops * b, h, w] on the host, crop-major; None: no objective asks.

        Like weak flags and stochastic depth they are a function of the positions.
        """
        config = self.recipe.objectives.patch
        if config is None:
            return None
        side = self.student[0][0].size // self.recipe.patch_size
        crops = [c for view in self.student[0] for c in range(self._plan.crops)[self._plan.columns[view.name]]]
        if progress < config.start:
            return torch.zeros(len(crops) * self.micro, side, side, dtype=torch.bool)
        positions = self._positions(position, part)
        drawn = draw_masks(self.recipe.stream.seed, positions, crops, (side, side), self.recipe.masks)
        return torch.from_numpy(drawn).transpose(0, 1).flatten(0, 1)

    def masked(self, info: StepInfo) -> dict[str, Tensor]:
        """Context for networks that learn by masks: which patches are hidden, and their flat indices."""
        if info.masks is None:
            return {}
        index = info.masks.flatten().nonzero().squeeze(1)  # here, where it costs the device no wait
        return {
            name: x.to(self.device, non_blocking=True)
            for name, x in (("patch.masks", info.masks), ("patch.index", index))
        }

    def _weak(self, view: str, position: int, part: int) -> Tensor | None:
        """Flags [b] of images whose first student crop, of this view, is weak; None where there is no strong form.

        Drawn anew from the positions, as stochastic depth is: a batch that was kept to be fed again needs no flags.
        """
        first = self._plan.columns[view].start
        if not self._plan.strong[first]:
            return None
        strong = strong_crops(self._plan, self.recipe.stream.seed, self._positions(position, part))
        return torch.from_numpy(~strong[:, first]).to(self.device, non_blocking=True)

    def _positions(self, position: int, part: int) -> np.ndarray:
        """Of this rank's images of a micro-batch, int64 [b]."""
        return position + (self.rank * self.parts + part) * self.micro + np.arange(self.micro)

    def draws(self, position: int, part: int, depth: int) -> dict[str, Tensor]:
        """Context for stochastic depth, [crops * b, 2 * depth] uniform in [0, 1), keyed by each sample's position."""
        if not self.recipe.student.drop_path:
            return {}
        count = self.student_crops * 2 * depth
        draws = uniform(self.recipe.seed, self._positions(position, part), DROP_PATH, count)
        by_crop = torch.from_numpy(draws).float().view(-1, self.student_crops, 2 * depth).transpose(0, 1)
        return {"drop_path.draws": by_crop.flatten(0, 1).to(self.device, non_blocking=True)}


def _crops(geometry: Mapping[str, Tensor], views: list[Any], rows: slice) -> Tensor:
    """[crops * b, 2, 3], crop-major, as the crops of one size are."""
    return torch.cat([geometry[view.name][rows].transpose(0, 1).flatten(0, 1) for view in views])


def _by_size(views: list[Any]) -> list[list[Any]]:
    """Views in groups of equal size, largest first: one backbone call a group, globals before locals."""
    sizes = sorted({view.size for view in views}, reverse=True)
    return [[view for view in views if view.size == size] for size in sizes]
