"""Small line charts as inline SVG, without a plotting library: a page of twenty weighs less than one PNG.

Colours and type come from the page's style sheet, so that a chart follows light and dark. Many points are averaged in
buckets, with their range as a band behind the line; every bucket answers the pointer with its values through <title>,
which needs no script.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from html import escape
from itertools import pairwise

import numpy as np

from .folder import Curve

WIDTH, HEIGHT = 360.0, 200.0
LEFT, RIGHT, TOP, BOTTOM = 46.0, 10.0, 10.0, 26.0
BUCKETS = 120
LABEL_GAP = 12.0


def short(value: float) -> str:
    """A number for an axis or a tooltip: 0.0004, 3.81, 12,300, 1.2M."""
    if not math.isfinite(value):
        return "not finite"
    size = abs(value)
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e5, "k")):
        if size >= limit:
            return f"{value / (1e3 if unit == 'k' else limit):.3g}{unit}"
    if size >= 1000 or value == round(value):
        return f"{value:,.0f}"
    return f"{value:.3g}" if size >= 1e-3 else f"{value:.2g}"


def percent(value: float) -> str:
    """A share as percent with one place: 61.3 %."""
    return f"{100 * value:.1f}\N{NO-BREAK SPACE}%" if math.isfinite(value) else "not finite"


def ticks(low: float, high: float, count: int, *, share: bool = False) -> list[tuple[float, str]]:
    """Round numbers inside [low, high], about `count` of them, with as many decimals as tell them apart."""
    scale = 100.0 if share else 1.0
    raw = scale * (high - low) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(f * power for f in (1, 2, 5, 10) if f * power >= raw * 0.999)
    first, last = math.ceil(scale * low / step - 1e-9), math.floor(scale * high / step + 1e-9)
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    found = []
    for i in range(first, last + 1):
        value = i * step
        text = short(value) if abs(value) >= 1e5 or (value and decimals > 5) else f"{value:,.{decimals}f}"
        found.append((value / scale, f"{text}\N{NO-BREAK SPACE}%" if share else text))
    return found


def buckets(curve: Curve, count: int = BUCKETS) -> np.ndarray:
    """At most `count` rows (x, mean, lowest, highest) [b, 4]; a bucket without a finite value is NaN."""
    rows = []
    for x, y in zip(
        np.array_split(curve.x, min(count, len(curve.x))),
        np.array_split(curve.y, min(count, len(curve.y))),
        strict=True,
    ):
        good = y[np.isfinite(y)]
        rows.append((x.mean(), good.mean(), good.min(), good.max()) if len(good) else (x.mean(), *[math.nan] * 3))
    return np.array(rows)


def line_chart(
    title: str,
    curves: Mapping[str, Curve],
    *,
    levels: Mapping[str, float] | None = None,
    share: bool = False,
    dots: bool = False,
    note: str = "",
    points: int = BUCKETS,
) -> str:
    """A <figure> with lines over the images seen and dashed `levels` to compare them with; "" if there is nothing.

    `share` shows values as percent; `dots` marks each point, for curves of a few; `points`: of a curve at most.
    """
    show = percent if share else short
    data = {name: buckets(curve, points) for name, curve in curves.items() if len(curve.x)}
    data = {name: rows for name, rows in data.items() if np.isfinite(rows[:, 1]).any()}
    levels = {name: value for name, value in (levels or {}).items() if math.isfinite(value)}
    if not data:
        return ""
    lost = sum(int((~np.isfinite(curves[name].y)).sum()) for name in data)
    note = f"{lost} {'value is' if lost == 1 else 'values are'} not finite" if lost and not note else note
    x_low, x_high = _span([curves[name].x for name in data], 0.0)
    y_low, y_high = _span([rows[:, 2:].ravel() for rows in data.values()] + [np.array(list(levels.values()))], 0.06)

    def at(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / (x_high - x_low)
        up = (y - y_low) / (y_high - y_low)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    parts = []
    for value, text in ticks(y_low, y_high, 5, share=share):
        y = at(x_low, value)[1]
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{text}</text>')
    for value, text in ticks(x_low, x_high, 5):
        x = at(value, y_low)[0]
        anchor = "middle" if x < WIDTH - 24 else "end"
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 8}" text-anchor="{anchor}">{text}</text>')
    parts += _levels(levels, lambda value: at(x_low, value)[1], show)
    for number, rows in enumerate(data.values(), start=1):
        parts += _line(rows, at, f"c{number % 6}", dots)
    parts += _targets(data, at, show)
    legend = ""
    if len(data) > 1:
        keys = (f'<span class="key c{n % 6}">{escape(name)}</span>' for n, name in enumerate(data, start=1))
        legend = f'<p class="legend">{"".join(keys)}</p>'
    last = "; ".join(
        f"{name} ends at {show(float(rows[np.isfinite(rows[:, 1])][-1, 1]))}" for name, rows in data.items()
    )
    return (
        f"<figure><figcaption>{escape(title)}{f'<small>{escape(note)}</small>' if note else ''}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH:.0f} {HEIGHT:.0f}" role="img" aria-label="{escape(f"{title}: {last}")}">'
        f"{''.join(parts)}</svg>{legend}</figure>"
    )


def _span(values: list[np.ndarray], margin: float) -> tuple[float, float]:
    """Lowest and highest finite value, widened by a share of their distance; never empty."""
    flat = np.concatenate(values)
    flat = flat[np.isfinite(flat)]
    low, high = float(flat.min()), float(flat.max())
    if high - low <= 1e-9 * max(abs(low), abs(high), 1e-9):
        half = abs(low) * 0.1 or 0.5
        return low - half, high + half
    return low - margin * (high - low), high + margin * (high - low)


def _line(rows: np.ndarray, at, colour: str, dots: bool) -> list[str]:
    """Band and line of each stretch without a hole."""
    parts = []
    finite = np.isfinite(rows[:, 1])
    for stretch in np.split(np.arange(len(rows)), np.flatnonzero(np.diff(finite)) + 1):
        if not finite[stretch[0]]:
            continue
        piece = rows[stretch]
        points = [at(x, mean) for x, mean, _, _ in piece]
        if np.any(piece[:, 3] > piece[:, 2]):
            rim = [at(x, high) for x, _, _, high in piece] + [at(x, low) for x, _, low, _ in piece[::-1]]
            parts.append(f'<polygon class="band {colour}" points="{_points(rim)}"/>')
        parts.append(f'<polyline class="line {colour}" points="{_points(points)}"/>')
        if dots or len(points) == 1:
            parts += [f'<circle class="dot {colour}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in points]
    return parts


def _levels(levels: Mapping[str, float], height, show) -> list[str]:
    """Dashed lines with their names above them, or below where there is no room."""
    parts = []
    previous = -math.inf
    for name, value in sorted(levels.items(), key=lambda item: -item[1]):
        y = height(value)
        above, below = y - 3, y + 10
        label = min(above if above - previous >= LABEL_GAP else max(below, previous + LABEL_GAP), HEIGHT - BOTTOM - 2)
        previous = label
        title = f"<title>{escape(f'{name}: {show(value)}')}</title>"
        parts.append(f'<line class="level" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}">{title}</line>')
        parts.append(f'<text class="name" x="{WIDTH - RIGHT}" y="{label:.1f}" text-anchor="end">{escape(name)}</text>')
    return parts


def _targets(data: Mapping[str, np.ndarray], at, show) -> list[str]:
    """Invisible columns over the chart that tell the values below the pointer."""
    longest = max(data.values(), key=len)
    centres = [at(x, 0.0)[0] for x in longest[:, 0]]
    edges = [LEFT, *((a + b) / 2 for a, b in pairwise(centres)), WIDTH - RIGHT]
    parts = []
    for number, (x, start, end) in enumerate(zip(longest[:, 0], edges, edges[1:], strict=False)):
        lines = [f"{x:,.0f} images"]
        for name, rows in data.items():
            row = rows[number] if rows is longest else rows[np.abs(rows[:, 0] - x).argmin()]
            lines.append(f"{name}: {show(float(row[1]))}")
        area = f'x="{start:.1f}" y="{TOP}" width="{max(end - start, 0.1):.1f}" height="{HEIGHT - TOP - BOTTOM}"'
        parts.append(f'<rect class="hit" {area}><title>{escape(chr(10).join(lines))}</title></rect>')
    return parts


def _points(points: list[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
