"""What a condition looks at: a run's summary and its ranks, with the questions that several conditions ask."""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple

from .reading import Rank
from .summary import memories


class Condition(NamedTuple):
    """holds(scene, *limits): the places where it holds, in words. limits: the thresholds, as they stand in the alert."""

    holds: Callable[..., list[str]]
    limits: tuple[float, ...] = ()


class Scene:
    """One run as it is seen now."""

    def __init__(self, run: dict[str, Any], ranks: Sequence[Rank], complete: bool):
        self.run, self.ranks, self.complete = run, ranks, complete
        self.answering = [rank for rank in ranks if rank.now]

    @property
    def progress(self) -> float:
        """Share of the run that is done."""
        return self.run["progress"]["ratio"] or 0.0

    @property
    def standstill(self) -> float | None:
        """Seconds since any rank's last step, 0 while the run does something else; None where nobody knows."""
        ages = [rank.now.age("gristmill_last_step_timestamp_seconds") for rank in self.answering if rank.now]
        known = [age for age in ages if age is not None]
        if not known or self.run["state"] is None:
            return None
        return min(known) if self.run["state"] == "training" else 0.0

    @cached_property
    def memories(self) -> dict[str, dict[str, float]]:
        """By name, of each number the worst that a rank tells: the greatest, and the length that is furthest from one."""
        told: dict[str, dict[str, list[float]]] = {}
        for rank in self.answering:
            for name, memory in memories(rank.now).items() if rank.now else ():
                for what, value in memory.items():
                    there = what != "norm" or memory.get("fill", 0.0) > 0  # rows that are not there have no length
                    if there and not math.isnan(value):
                        told.setdefault(name, {}).setdefault(what, []).append(value)
        return {name: {what: _worst(what, values) for what, values in of.items()} for name, of in told.items()}

    def increase(self, rank: Rank, name: str, window: float, **labels: str) -> float:
        """What a counter grew by within `window` seconds, at least."""
        return self.over(rank, window).grown(name, **labels)

    def over(self, rank: Rank, window: float) -> Rank:
        """The rank from its beginning, if that is within `window` seconds; else since it is watched."""
        lifetime = rank.whole().seconds
        if lifetime is not None and lifetime <= window:
            return rank.whole()
        return rank if rank.before else Rank(rank.url, rank.labels, rank.now, rank.now)

    def rate(self, rank: Rank, name: str, window: float, **labels: str) -> float:
        """Growth a second."""
        seen = self.over(rank, window)
        return seen.grown(name, **labels) / seen.seconds if seen.seconds else 0.0

    def signs(self, *names: str, objectives: Sequence[str] = ()) -> Iterator[tuple[str, str, float]]:
        """(objective, name, mean over the ranks) of signs of life that are numbers."""
        sums: dict[tuple[str, str], list[float]] = {}
        for rank in self.answering:
            table = rank.now.pairs("gristmill_objective_health", "objective", "name") if rank.now else {}
            for objective, signs in table.items():
                for name in names:
                    if name in signs and (not objectives or objective in objectives):
                        sums.setdefault((objective, name), []).append(signs[name])
        for (objective, name), values in sums.items():
            mean = sum(values) / len(values)
            if math.isfinite(mean):
                yield objective, name, mean


def _worst(what: str, values: list[float]) -> float:
    return max(values, key=lambda value: abs(value - 1)) if what == "norm" else max(values)
