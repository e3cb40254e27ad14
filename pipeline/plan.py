"""The views of a recipe laid out as columns, one a crop: what drawing and carrying out want to look up at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..shards.errors import GristmillError
from . import philox
from .augmentation import Augment, Strong
from .views import View

NOISE_SIDE = 512  # pixels of the noise tile's sides (augment/noise.py); no erased box is larger

Floats = NDArray[np.float64]


class PlanError(GristmillError, ValueError):
    """Views that cannot be drawn together, or that an executor cannot carry out."""


@dataclass(frozen=True)
class Chances:
    """Chances and ranges of one form (weak or strong) of V crops; float64 [V], or [V, n] where said."""

    flip: Floats
    jitter: Floats
    factors: Floats  # [V, 3]: brightness, contrast, saturation
    hue: Floats
    grey: Floats
    blur: Floats
    sigma: Floats  # [V, 2]: from, to
    solarize: Floats
    threshold: Floats

    @classmethod
    def of(cls, forms: Sequence[tuple[Augment, int, int]]) -> Chances:
        """Of (augmentation, copy of the view, size of the crop) for each crop."""

        def each(probabilities: list[float], copy: int) -> float:
            return probabilities[min(copy, len(probabilities) - 1)]

        return cls(
            flip=np.array([form.flip for form, _, _ in forms]),
            jitter=np.array([form.jitter_p for form, _, _ in forms]),
            factors=np.array([(form.brightness, form.contrast, form.saturation) for form, _, _ in forms]),
            hue=np.array([form.hue for form, _, _ in forms]),
            grey=np.array([form.grey for form, _, _ in forms]),
            blur=np.array([each(form.blur, copy) for form, copy, _ in forms]),
            sigma=np.array([form.sigma(size) for form, _, size in forms], np.float64),
            solarize=np.array([each(form.solarize, copy) for form, copy, _ in forms]),
            threshold=np.array([form.solarize_threshold for form, _, _ in forms], np.float64),
        )


@dataclass(frozen=True)
class StrongSettings:
    """What RandAugment and erasing are drawn with, of V crops; zeros for those without a strong form."""

    chance: Floats  # [V, 2]: of the first and the second operation that is chosen
    replacement: NDArray[np.bool_]  # [V]
    magnitude: Floats  # [V]: mean
    deviation: Floats  # [V]
    increasing: NDArray[np.bool_]  # [V]
    erase: Floats  # [V]
    area: Floats  # [V, 2]: from, to
    log_ratio: Floats  # [V, 2]

    @classmethod
    def of(cls, forms: Sequence[Strong | None]) -> StrongSettings:
        return cls(
            chance=np.array([[f.operation_p if f and f.operations > n else 0 for n in (0, 1)] for f in forms], float),
            replacement=np.array([bool(f and f.replacement) for f in forms]),
            magnitude=np.array([f.magnitude if f else 0 for f in forms], float),
            deviation=np.array([f.magnitude_std if f else 0 for f in forms], float),
            increasing=np.array([bool(f and f.increasing) for f in forms]),
            erase=np.array([f.erase if f else 0 for f in forms], float),
            area=np.array([f.erase_area if f else (0, 0) for f in forms], float),
            log_ratio=np.array([log_range(f.erase_ratio) if f else (0, 0) for f in forms], float),
        )


class Plan:
    """The views of a recipe laid out as columns: crop v of an image is copy `copies[v]` of view `views[owner[v]]`.

    `crops` is V, the crops of an image; `columns[name]` is the slice of V that belongs to a view. `strong` bool [V] are
    the crops that have a strong form; `weak_p` [V] the chance of the weak one; `coin` [V] the crop that tosses for it.
    What is named after an augmentation (`flip`, `blur` ...) are the weak form's chances, float64 [V].
    """

    def __init__(self, views: Sequence[View]) -> None:
        if not views:
            raise PlanError("the recipe has no views: give it at least one")
        names = [view.name for view in views]
        if len(set(names)) != len(names):
            raise PlanError(f"views need different names, these are given: {', '.join(names)}")
        self.views = tuple(views)
        self.owner = tuple(index for index, view in enumerate(views) for _ in range(view.count))
        self.copies = tuple(copy for view in views for copy in range(view.count))
        self.crops = len(self.owner)
        if self.crops > philox.SUBSTITUTE:
            raise PlanError(f"{self.crops} crops of an image are more than {philox.SUBSTITUTE}: lower a view's count")
        ends = np.cumsum([view.count for view in views]).tolist()
        self.columns = {view.name: slice(end - view.count, end) for view, end in zip(views, ends, strict=True)}

        each = [(views[owner], copy) for owner, copy in zip(self.owner, self.copies, strict=True)]
        self.size = np.array([view.size for view, _ in each], np.float64)
        self.scale = np.array([view.scale for view, _ in each], np.float64)
        self.ratio = np.array([view.ratio for view, _ in each], np.float64)
        self.log_ratio = np.array([log_range(view.ratio) for view, _ in each], np.float64)
        self.centre = np.array([view.augment.crop == "centre" for view, _ in each])

        weak = self.weak = Chances.of([(view.augment, copy, view.size) for view, copy in each])
        self.flip, self.jitter, self.factors = weak.flip, weak.jitter, weak.factors
        self.hue, self.grey = weak.hue, weak.grey
        self.blur, self.sigma, self.solarize, self.threshold = weak.blur, weak.sigma, weak.solarize, weak.threshold
        self.coloured = (self.jitter > 0) & ((self.factors > 0).any(-1) | (self.hue > 0)) | (self.grey > 0)

        self.strong = np.array([view.strong is not None for view, _ in each])
        self.weak_p = np.array([view.weak_p for view, _ in each])
        self.coin = self._coins()
        # The strong form's numbers; those of crops without one are never looked at.
        forms = [(view.strong or view.augment, copy, view.size) for view, copy in each]
        self.strong_form = Chances.of(forms)
        self.strong_settings = StrongSettings.of([view.strong for view, _ in each])
        for view in views:
            if view.strong and view.strong.erase and view.size > NOISE_SIDE:
                raise PlanError(
                    f"views.{view.name}: random erasing has noise for crops of up to {NOISE_SIDE} pixels, not "
                    f"{view.size}: make the crop smaller, or set strong.erase to 0"
                )

    def _coins(self) -> NDArray[np.int64]:
        """For each crop the index of the one whose coin counts: its own, or the first of those that share one."""
        coins = np.arange(self.crops)
        tosser: dict[str, View] = {}
        for view in self.views:
            if view.strong is None or view.coin == "crop":
                continue
            # A name of a group never meets that of a view: the latter stands for a group of its own.
            group = f"group {view.coin_group}" if view.coin_group is not None else f"view {view.name}"
            first = tosser.setdefault(group, view)
            if first.weak_p != view.weak_p:
                raise PlanError(
                    f"views.{view.name}: shares the coin {view.coin_group!r} with {first.name} and needs its weak_p "
                    f"{first.weak_p}, not {view.weak_p}"
                )
            coins[self.columns[view.name]] = self.columns[first.name].start
        return coins


def log_range(ends: tuple[float, float]) -> tuple[float, float]:
    """Logarithms of both ends, rounded, so that a C library whose last bit differs draws the same boxes."""
    return round(math.log(ends[0]), 12), round(math.log(ends[1]), 12)
