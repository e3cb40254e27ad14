"""A run folder, read for showing: whatever is there, and a plain sentence about what is not.

A report is most wanted while a run goes on or after it broke, so that nothing here raises for a missing or torn file.
`metrics.jsonl` lies as ops/runlog writes it; a later line about the same position replaces the earlier one, since
steps after a resume are taken again.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ...shards.errors import GristmillError

SIGNS = ("recipe.yaml", "metrics.jsonl", "crops.npz", "neighbours.npz")  # each of them says that a run was here


class ReportError(GristmillError):
    """There is no run to report on, or no place to write the report."""


@dataclass(frozen=True)
class Curve:
    """One recorded number over the images seen: `x` ascending, `y` of the same length, not finite where it was lost."""

    x: np.ndarray
    y: np.ndarray

    @property
    def constant(self) -> bool:
        return bool(len(self.y)) and bool(np.all(self.y == self.y[0]))


@dataclass
class RunFolder:
    """What a run folder holds. `curves` by name, nested numbers as `seconds/data_wait`; `problems` in plain words."""

    path: Path
    recipe_text: str = ""
    recipe: dict[str, Any] = field(default_factory=dict)
    curves: dict[str, Curve] = field(default_factory=dict)
    probes: list[dict[str, Any]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    steps: int = 0
    problems: list[str] = field(default_factory=list)
    undrawn: dict[str, str] = field(default_factory=dict)  # drawings that could not be made, and why

    @property
    def position(self) -> int:
        """Images seen, as far as the log tells."""
        known = [curve.x[-1] for curve in self.curves.values() if len(curve.x)]
        known += [line["position"] for line in self.probes if "position" in line]
        return int(max(known, default=0))

    def teacher(self) -> list[dict[str, Any]]:
        """The teacher's probes by position, of equal positions the last."""
        rows = {line.get("position", 0): line for line in self.probes if line.get("who") == "teacher"}
        return [rows[position] for position in sorted(rows)]

    def baseline(self, who: str) -> dict[str, Any]:
        """The last probe of `chance`, `pixels` or `random`; {} if there is none."""
        rows = [line for line in self.probes if line.get("who") == who]
        return rows[-1] if rows else {}

    def probe_names(self) -> list[str]:
        """Names of the numbers that any probe reports, in order of appearance; the teacher's come first."""
        lines = self.teacher() + self.probes
        names = dict.fromkeys(name for line in lines for name, value in line.items() if _number(value) is not None)
        return [name for name in names if name not in ("position", "step", "time", "seconds")]


def read_run(path: Path) -> RunFolder:
    """Read `recipe.yaml` and `metrics.jsonl` of a run folder. Raises ReportError if the folder is no run's."""
    if not path.is_dir():
        raise ReportError(f"{path} is no folder. Name the run's folder, the one that holds metrics.jsonl.")
    # A link that leads nowhere counts as there: the page says what is wrong with it.
    if not any(os.path.lexists(path / name) for name in SIGNS):
        raise ReportError(f"{path} holds no run (no recipe.yaml, no metrics.jsonl); name the folder of a run")
    run = RunFolder(path)
    _read_recipe(run)
    _read_metrics(run)
    return run


def _read_recipe(run: RunFolder) -> None:
    try:
        run.recipe_text = (run.path / "recipe.yaml").read_text(errors="replace")
        recipe = yaml.safe_load(run.recipe_text)
    except FileNotFoundError:
        run.problems.append("There is no recipe.yaml, so the settings are not known.")
    except (OSError, yaml.YAMLError, RecursionError) as error:
        run.problems.append(f"recipe.yaml cannot be read: {str(error).splitlines()[0]}.")
    else:
        run.recipe = recipe if isinstance(recipe, dict) else {}


def _read_metrics(run: RunFolder) -> None:
    try:
        text = (run.path / "metrics.jsonl").read_text(errors="replace")
    except FileNotFoundError:
        run.problems.append("There is no metrics.jsonl yet, so nothing was recorded.")
        return
    except OSError as error:
        run.problems.append(f"metrics.jsonl cannot be read: {error}.")
        return
    steps: dict[float, dict[str, float]] = {}
    torn = 0
    for raw in text.splitlines():
        try:
            line = json.loads(raw)
        except (ValueError, RecursionError):
            torn += 1
            continue
        kind = line.get("kind") if isinstance(line, dict) else None
        position = _number(line.get("position")) if kind else None
        if kind == "step" and position is not None:
            steps[position] = _flat(line)
        elif kind == "probe":
            run.probes.append({**line, "position": int(position or 0)})
        elif kind == "event":
            run.events.append(line)
    if torn > 1:
        run.problems.append(f"{torn} lines of metrics.jsonl cannot be read and are left out.")
    run.steps = len(steps)
    order = sorted(steps)
    for name in dict.fromkeys(name for at in order for name in steps[at]):
        if name not in ("position", "step"):
            x = [at for at in order if name in steps[at]]
            run.curves[name] = Curve(np.array(x), np.array([steps[at][name] for at in x]))


def _flat(line: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """Numbers of a step's line; those of a mapping inside get its name before them."""
    found: dict[str, float] = {}
    for key, value in line.items():
        if isinstance(value, dict) and not prefix:
            found.update(_flat(value, f"{key}/"))
        elif (number := _number(value, finite=False)) is not None:
            found[f"{prefix}{key}"] = number
    return found


def _number(value: Any, *, finite: bool = True) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) or not finite else None
