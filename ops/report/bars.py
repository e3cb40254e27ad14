"""Stacked bars over the images seen as inline SVG: where each stretch of a run spent its time."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

import numpy as np

from .charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, short, ticks
from .folder import Curve

BARS, PARTS = 40, 6


def stacked_bars(heading: str, curves: Mapping[str, Curve], *, unit: str = "", note: str = "") -> str:
    """A <figure> of bars whose parts are means over a stretch of steps, the largest below; "" if there is nothing.

    More than `PARTS` curves: the smallest together are `other`. Values that are not finite or negative count as nothing.
    """
    x = np.unique(np.concatenate([curve.x for curve in curves.values()] or [np.zeros(0)]))
    if not len(x):
        return ""
    filled = {name: np.zeros(len(x)) for name in curves}
    for name, curve in curves.items():
        filled[name][np.searchsorted(x, curve.x)] = np.where(np.isfinite(curve.y), curve.y, 0).clip(min=0)
    order = sorted(filled, key=lambda name: -filled[name].sum())
    if len(order) > PARTS:
        rest = order[PARTS - 1 :]
        filled["other"] = np.sum([filled[name] for name in rest], axis=0)
        order = [*order[: PARTS - 1], "other"]
    chunks = np.array_split(np.arange(len(x)), min(BARS, len(x)))
    means = np.array([[filled[name][chunk].mean() for name in order] for chunk in chunks])
    top = float(means.sum(1).max())
    if top <= 0:
        return ""
    width, height = (WIDTH - LEFT - RIGHT) / len(chunks), HEIGHT - TOP - BOTTOM
    parts = []
    for value, text in ticks(0.0, top, 4):
        y = HEIGHT - BOTTOM - value / top * height
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{text}</text>')
    for number, (chunk, row) in enumerate(zip(chunks, means, strict=True)):
        left, level = LEFT + number * width, HEIGHT - BOTTOM
        lines = [f"{x[chunk[0]]:,.0f} to {x[chunk[-1]]:,.0f} images"]
        for colour, (name, value) in enumerate(zip(order, row, strict=True), start=1):
            tall = value / top * height
            level -= tall
            lines.append(f"{name}: {short(float(value))} {unit}")
            parts.append(
                f'<rect class="part c{colour % 6}" x="{left:.1f}" y="{level:.2f}" width="{max(0.85 * width, 0.5):.1f}" '
                f'height="{tall:.2f}"/>'
            )
        area = f'x="{left:.1f}" y="{TOP}" width="{width:.1f}" height="{height}"'
        parts.append(f'<rect class="hit" {area}><title>{escape(chr(10).join(lines))}</title></rect>')
    for place, anchor in ((0, "start"), (-1, "end")):
        at = LEFT if place == 0 else WIDTH - RIGHT
        parts.append(f'<text x="{at}" y="{HEIGHT - 8}" text-anchor="{anchor}">{short(float(x[place]))}</text>')
    keys = "".join(f'<span class="key c{n % 6}">{escape(name)}</span>' for n, name in enumerate(order, start=1))
    last = ", ".join(f"{name} {short(float(value))} {unit}" for name, value in zip(order, means.mean(0), strict=True))
    return (
        f"<figure><figcaption>{escape(heading)}{f'<small>{escape(note)}</small>' if note else ''}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH:.0f} {HEIGHT:.0f}" role="img" aria-label="{escape(f"{heading}; means: {last}")}">'
        f'{"".join(parts)}</svg><p class="legend">{keys}</p></figure>'
    )
