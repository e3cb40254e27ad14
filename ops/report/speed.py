"""Throughput and goodput: images a second, the wait that prefetching did not hide, and what attempts cost.

Goodput is the share of the time of all attempts that went into steps that count; the rest was start-up, probes, checkpoints
at the end, and steps that were taken again after a restart or left out as bad.
"""

from __future__ import annotations

import math
from html import escape

import numpy as np

from ..pace import duration
from .attempts import Attempt, read_attempts
from .bars import stacked_bars
from .charts import line_chart, percent, short
from .curves import title
from .folder import Curve, RunFolder


def phases(run: RunFolder) -> dict[str, Curve]:
    """Seconds of a step by phase."""
    prefix = "seconds/"
    return {name.removeprefix(prefix): curve for name, curve in run.curves.items() if name.startswith(prefix)}


def stepping(run: RunFolder) -> float:
    """Seconds of all steps in the log."""
    return sum(float(curve.y[np.isfinite(curve.y) & (curve.y > 0)].sum()) for curve in phases(run).values())


def rate(run: RunFolder) -> Curve | None:
    """Images a second of each step."""
    batch, spent = run.recipe.get("batch"), phases(run)
    if not spent or not isinstance(batch, int) or isinstance(batch, bool):
        return None
    x = np.unique(np.concatenate([curve.x for curve in spent.values()]))
    total = np.zeros(len(x))
    for curve in spent.values():
        total[np.searchsorted(x, curve.x)] += np.where(np.isfinite(curve.y), curve.y, 0).clip(min=0)
    good = total > 0
    return Curve(x[good], float(batch) / total[good]) if good.any() and abs(batch) < 1e12 else None


def section(run: RunFolder) -> str:
    spent = phases(run)
    parts = []
    if (speed := rate(run)) is not None:
        parts.append(
            line_chart("Images a second", {"images a second": speed}, note=f"median {short(float(np.median(speed.y)))}")
        )
    if "data_wait" in spent:
        wait = Curve(spent["data_wait"].x, 1000 * spent["data_wait"].y)
        parts.append(line_chart("Exposed wait for data, milliseconds a step", {"wait": wait}))
    if spent:
        thousand = {title(name): Curve(curve.x, 1000 * curve.y) for name, curve in spent.items()}
        parts.append(stacked_bars("Phases, milliseconds a step", thousand, unit="ms"))
    charts = "".join(parts)
    return (f'<div class="charts">{charts}</div>' if charts else "") + _table(spent) + _attempts(run)


def _table(spent: dict[str, Curve]) -> str:
    means = {name: float(curve.y[curve.y >= 0].mean()) for name, curve in spent.items() if (curve.y >= 0).any()}
    total = sum(means.values())
    if not total > 0 or not math.isfinite(total):
        return ""
    rows = "".join(
        f"<tr><th>{escape(title(name))}</th><td>{1000 * mean:.1f}</td><td>{percent(mean / total)}</td>"
        f'<td class="text"><span class="bar" style="width:{9 * mean / total:.2f}rem"></span></td></tr>'
        for name, mean in means.items()
    )
    return (
        f'<h3>Where a step\'s time goes</h3><div class="scroll"><table><thead><tr><th>phase</th>'
        f"<th>milliseconds</th><th>share</th><th></th></tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _attempts(run: RunFolder) -> str:
    attempts = read_attempts(run.path)
    if not attempts:
        return ""
    rows = "".join(_row(number, attempt) for number, attempt in enumerate(attempts, start=1))
    spent, lost = sum(a.seconds for a in attempts), sum(a.lost_seconds for a in attempts)
    images = sum(a.lost_images for a in attempts)
    restarts = len(attempts) - 1
    text = f"{restarts or 'No'} {'restart' if restarts == 1 else 'restarts'}"
    if images:
        text += f"; {images:,} images, {duration(lost)} of stepping, were taken again"
    if attempts[-1].ended is not None and 0 < (useful := stepping(run)) <= spent:
        text += f". Goodput: {percent(useful / spent)} of {duration(spent)} went into steps that count"
    head = "".join(f"<th>{t}</th>" for t in ("attempt", "from image", "lasted", "taken again after it"))
    return (
        f'<h3>Attempts</h3><p>{text}.</p><div class="scroll"><table><thead><tr>{head}<th class="text">ended</th></tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _row(number: int, attempt: Attempt) -> str:
    lasted = duration(attempt.seconds) if attempt.ended is not None else "–"
    lost = f"{attempt.lost_images:,} images, {duration(attempt.lost_seconds)}" if attempt.lost_images else "–"
    why = attempt.why or ("killed, or its machine was lost" if attempt.ended is not None else "no word yet")
    return (
        f"<tr><td>{number}</td><td>{attempt.position:,}</td><td>{lasted}</td><td>{lost}</td>"
        f'<td class="text long">{escape(why)}</td></tr>'
    )
