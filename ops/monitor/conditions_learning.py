"""Conditions on what is learned, in the order of alerts_learning.py: bad steps, collapse by objective, teacher, memories."""

import math
import re
from collections.abc import Callable, Sequence

from .glyphs import number
from .scene import Condition, Scene

HISTORY = "it compares with hours that this view has not seen"
CONTRAST = ("instance", "dense", "local_group", "hierarchy", "batch_contrast")
UNIT = r".+[.]queue[0-9]?|hierarchy[.]memory"  # memories whose rows have length one

UNKNOWN = {
    "GristmillLossSpike": HISTORY,
    "GristmillContrastAtChance": "accuracy has to be at chance for an hour: a single step says little",
    "GristmillNeighboursCollapsed": "it is an average over an hour: a single step says little",
    "GristmillMatchesAtChance": "it is an average over an hour: a single step says little",
    "GristmillProbeFell": HISTORY,
    "GristmillTeacherFrozen": "the teacher has to stand still for half an hour",
}


def _bad_steps(scene: Scene, limit: float, window: float) -> list[str]:
    most = max((scene.increase(rank, "gristmill_bad_steps_total", window) for rank in scene.answering), default=0.0)
    return [f"{number(most)} steps left out"] if most > limit else []


def _rollback(scene: Scene, window: float) -> list[str]:
    most = max((scene.increase(rank, "gristmill_rollbacks_total", window) for rank in scene.answering), default=0.0)
    return [f"went back {number(most)} times"] if most > 0 else []


def _signs(
    names: Sequence[str], objectives: Sequence[str], bad: Callable[[float, float], bool]
) -> Callable[..., list[str]]:
    """A condition on any of these signs of life, once the run is warm."""

    def holds(scene: Scene, limit: float, warm: float) -> list[str]:
        if scene.progress <= warm:
            return []
        found = scene.signs(*names, objectives=objectives)
        return [f"{objective}: {name} {number(value)}" for objective, name, value in found if bad(value, limit)]

    return holds


def _above(value: float, limit: float) -> bool:
    return value > limit


def _below(value: float, limit: float) -> bool:
    return value < limit


def _contrast(scene: Scene, alike: float, chance: float, warm: float) -> list[str]:
    if scene.progress <= warm:
        return []
    right = {objective: value for objective, _, value in scene.signs("accuracy")}
    return [
        f"{objective}: positives agree by {number(value)}, accuracy {number(right[objective])}"
        for objective, _, value in scene.signs("positive_similarity", objectives=CONTRAST)
        if value > alike and right.get(objective, 1.0) < chance
    ]


def _dead(scene: Scene, used: float, reseeded: float, warm: float) -> list[str]:
    if scene.progress <= warm:
        return []
    few = [
        f"clusters: {value:.0%} in use" for _, _, value in scene.signs("used", objectives=["clusters"]) if value < used
    ]
    levels = scene.signs(*(f"level{level}_reseeded" for level in range(3)), objectives=["hierarchy"])
    return few + [f"hierarchy: {name} {number(value)}" for _, name, value in levels if value > reseeded]


def _features(scene: Scene, spread: float, rank: float, warm: float) -> list[str]:
    limits = {"feature_std": spread, "rank_me": rank} if scene.progress > warm else {}
    scores = {probe: scene.run["probes"].get(probe, {}).get("teacher", math.nan) for probe in limits}
    return [f"{probe} {number(scores[probe])}" for probe, limit in limits.items() if scores[probe] < limit]


def _stale(scene: Scene, times: float, more: float) -> list[str]:
    told = []
    for name, memory in scene.memories.items():
        age, expected = memory.get("age"), memory.get("expected_age")
        if age is not None and expected is not None and age > times * expected + more:
            told.append(f"{name}: {number(age)} steps old, {number(expected)} expected")
    return told


def _not_unit(scene: Scene, limit: float) -> list[str]:
    return [
        f"{name}: mean length {number(memory['norm'])}"
        for name, memory in scene.memories.items()
        if re.fullmatch(UNIT, name) and "norm" in memory and abs(memory["norm"] - 1) > limit
    ]


def _not_finite(scene: Scene) -> list[str]:
    return [
        f"{name}: {number(memory['nonfinite'])} rows"
        for name, memory in scene.memories.items()
        if memory.get("nonfinite", 0) > 0
    ]


CONDITIONS = {
    "GristmillBadSteps": Condition(_bad_steps, (3, 600)),
    "GristmillRollback": Condition(_rollback, (3600,)),
    "GristmillCollapseUniform": Condition(
        _signs(("teacher_entropy_ratio", "code_entropy_ratio"), ("group", "patch", "swapped"), _above), (0.99, 0.05)
    ),
    "GristmillCollapseOneGroup": Condition(_signs(("batch_entropy_ratio",), ("group", "patch"), _below), (0.05, 0.05)),
    "GristmillCollapseContrast": Condition(_contrast, (0.98, 0.01, 0.05)),
    "GristmillCollapseBootstrap": Condition(
        _signs(("prediction_std", "target_std"), ("bootstrap",), _below), (0.1, 0.05)
    ),
    "GristmillPrototypesDead": Condition(_dead, (0.8, 100, 0.05)),
    "GristmillFeaturesCollapsed": Condition(_features, (0.05, 2, 0.05)),
    "GristmillQueueStale": Condition(_stale, (2.5, 2)),
    "GristmillQueueNotUnit": Condition(_not_unit, (0.02,)),
    "GristmillMemoryNotFinite": Condition(_not_finite),
}
