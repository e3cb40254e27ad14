"""What a replay found, and what follows of it: numbers by rank and objective, and the sentence that a user acts on.

The verdict's words are compared with the replay's: what was not finite on a rank must be so again on that rank. Where it
is not, neither data nor recipe explain it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# How far the mean loss of a spike may be from the recorded one: a mean of few samples, on another device.
CLOSE = {"fp32": 1e-3, "autocast": 2e-2, "bf16": 2e-2}
SHOWN = 6  # keys or names in one line


@dataclass
class Finding:
    """One rank's replay. Names as the verdict has them."""

    rank: int
    losses: dict[str, float] = field(default_factory=dict)  # by objective, and "loss": mean over micro-batches
    bad: list[str] = field(default_factory=list)  # objectives, "loss", "memory" that are not finite
    samples: list[str] = field(default_factory=list)  # keys of those whose pixels are not finite
    modules: dict[str, str] = field(default_factory=dict)  # "student", "teacher" -> first whose output is not finite
    inputs: dict[str, bool] = field(default_factory=dict)  # whether that module's input was finite
    gradients: list[str] = field(default_factory=list)  # parameters whose gradient is not finite
    parameters: int = 0  # of so many

    @property
    def healthy(self) -> bool:
        return not (self.bad or self.samples or self.gradients)


@dataclass
class Replay:
    """What the verdict was, and what came of the same step now."""

    path: Path
    position: int
    batch: int
    precision: str
    bad: list[str]
    culprits: list[tuple[int, str]]
    losses: dict[str, float]  # as recorded, mean over ranks
    hosts: list[str]  # by rank
    state: list[str] = field(default_factory=list)  # weights and memories that were not finite before the step: none
    findings: list[Finding] = field(default_factory=list)

    @property
    def missing(self) -> list[tuple[int | None, str]]:
        """What the verdict named and did not come back; rank None where it named none."""
        again = {(found.rank, what) for found in self.findings for what in found.bad}
        replayed = {found.rank for found in self.findings}
        if self.culprits:
            return [(rank, what) for rank, what in self.culprits if rank in replayed and (rank, what) not in again]
        if self.bad == ["spike"]:
            then, now = self.losses["loss"], sum(f.losses["loss"] for f in self.findings) / len(self.findings)
            return [] if abs(now - then) <= CLOSE[self.precision] * abs(then) else [(None, "spike")]
        return [] if any(found.bad or found.gradients for found in self.findings) else [(None, w) for w in self.bad]

    @property
    def reproduced(self) -> bool:
        return not self.missing

    def as_dict(self) -> dict[str, Any]:
        """For JSON, which knows no NaN: a number that is not finite is its name as text."""
        return {
            "capture": str(self.path),
            "position": self.position,
            "recorded": {
                "bad": self.bad,
                "culprits": self.culprits,
                "losses": _plain(self.losses),
                "hosts": self.hosts,
            },
            "not_finite_before": self.state,
            "ranks": [vars(found) | {"losses": _plain(found.losses)} for found in self.findings],
            "missing": self.missing,
            "reproduced": self.reproduced,
        }

    def lines(self) -> Iterator[str]:
        """The same for people."""
        named = ranks_text(sorted({rank for rank, _ in self.culprits}))
        yield f"images {self.position} to {self.position + self.batch - 1}, left out for {', '.join(self.bad)}" + (
            f" on {named}" if named else ""
        )
        yield ""
        yield from self._table()
        for found in self.findings:
            if not found.healthy:
                yield ""
                yield from _details(found)
        if self.state:
            yield f"\nnot finite before the step already, which the guard must prevent: {_some(self.state)}; report it"
        yield ""
        yield self._conclusion()

    def _table(self) -> list[str]:
        """Ranks by objectives, aligned, and what was recorded."""
        names = list(self.findings[0].losses)
        rows = [["", *names, "memory", "gradients"]]
        for found in self.findings:
            bad = len(found.gradients)
            gradients = "finite" if not bad else f"{bad} of {found.parameters} not finite"
            memory = "not finite" if "memory" in found.bad else "finite"
            rows.append([f"rank {found.rank}", *(f"{found.losses[name]:.4g}" for name in names), memory, gradients])
        rows.append(["recorded mean", *(f"{self.losses.get(name, math.nan):.4g}" for name in names), "", ""])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return [
            "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
            for row in rows
        ]

    def _conclusion(self) -> str:
        missing = self.missing
        if missing:
            what = ", ".join(dict.fromkeys(what for _, what in missing))
            ranks = sorted({rank for rank, _ in missing if rank is not None})
            hosts = ", ".join(dict.fromkeys(self.hosts[rank] for rank in ranks))
            where = (
                f"{ranks_text(ranks)} (on {hosts})" if ranks else "one of the ranks; the verdict could not tell which"
            )
            return f"not reproduced ({what}): suspect the hardware or software of {where}"
        if any(found.samples for found in self.findings):
            why = "the cause is in the pixels of the samples named; `gristmill verify DATA --deep` checks them on disk"
        elif self.bad == ["spike"]:
            why = "the samples really are that far from what was learned; a higher guard.spike lets such steps pass"
        else:
            why = "the cause is in the weights or the arithmetic; try a lower optimizer.lr, or precision=fp32"
        return f"reproduced: {why}"


def ranks_text(ranks: list[int]) -> str:
    """ "rank 1", "ranks 0, 2", or "" for none."""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}" if ranks else ""


def _details(found: Finding) -> Iterator[str]:
    """Where it begins on one rank."""
    yield f"rank {found.rank}"
    yield "  pixels not finite  " + (
        f"{len(found.samples)} samples: {_some(found.samples)}" if found.samples else "none"
    )
    for who, module in found.modules.items():
        yield f"  first module       {who}.{module}, " + (
            "whose input is finite" if found.inputs[who] else "and so is its input"
        )
    if not found.modules:
        yield "  first module       none: both networks' outputs are finite" + (
            "; it begins in the loss" if found.bad else ""
        )
    if found.gradients:
        all_of_them = len(found.gradients) == found.parameters
        yield "  gradients          of " + ("all parameters" if all_of_them else _some(found.gradients))


def _some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def _plain(numbers: dict[str, float]) -> dict[str, float | str]:
    return {name: value if math.isfinite(value) else repr(value) for name, value in numbers.items()}
