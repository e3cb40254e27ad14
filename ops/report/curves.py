"""Curves of the log: each objective's loss, the schedules, gradients and signs of health, and all else that was recorded.

Charts answer the pointer with their values; for a keyboard and a screen reader the same numbers stand in a table below.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from html import escape

import numpy as np

from .charts import BUCKETS, line_chart, short
from .folder import Curve, RunFolder

COARSE = 40  # points of a curve among the many that few people look at
SCHEDULES = ("lr", "learning_rate", "weight_decay", "momentum", "progress")
NAMES = {
    "loss": "Total loss",
    "ema": "EMA",
    "lr": "Learning rate",
    "weight_decay": "Weight decay",
    "momentum": "Teacher's momentum",
    "grad_norm": "Gradient norm",
}


def title(key: str) -> str:
    """`memory/queue/fill` -> `Memory · queue · fill`."""
    text = key.replace("_", " ").replace("/", " · ")
    return NAMES.get(key) or text[:1].upper() + text[1:]


def is_loss(key: str) -> bool:
    return key == "loss" or key.startswith("loss/")


def is_schedule(key: str) -> bool:
    return key in SCHEDULES or "temperature" in key or key.startswith(("weight/", "lr/"))


def charts(run: RunFolder, names: Iterable[str], words: Callable[[str], str] = title, *, points: int = BUCKETS) -> str:
    """Small charts of curves that move with a table of their values, and a line of text for those that do not."""
    names = list(names)
    drawn = {
        name: line_chart(words(name), {name: run.curves[name]}, points=points)
        for name in names
        if not run.curves[name].constant
    }
    still = [f"{words(name)} {short(float(run.curves[name].y[0]))}" for name in names if run.curves[name].constant]
    text = f'<p class="soft">Constant: {escape(", ".join(still))}.</p>' if still else ""
    shown = [name for name, chart in drawn.items() if chart]
    table = values({words(name): run.curves[name] for name in shown})
    return (f'<div class="charts">{"".join(drawn.values())}</div>{table}' if shown else "") + text


def values(curves: dict[str, Curve]) -> str:
    """First, lowest, highest and last value of each curve, folded away."""
    rows = []
    for name, curve in curves.items():
        good = curve.y[np.isfinite(curve.y)]
        if len(good):
            cells = "".join(f"<td>{short(float(v))}</td>" for v in (good[0], good.min(), good.max(), good[-1]))
            rows.append(f"<tr><th>{escape(name)}</th>{cells}</tr>")
    if not rows:
        return ""
    head = "".join(f"<th>{text}</th>" for text in ("", "first", "lowest", "highest", "last"))
    return (
        f'<details><summary>As numbers</summary><div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div></details>"
    )


def losses(run: RunFolder) -> str:
    names = sorted(filter(is_loss, run.curves), key=lambda name: (name != "loss", name))
    return charts(run, names, lambda key: title(key.removeprefix("loss/") if key != "loss" else key))


def schedules(run: RunFolder) -> str:
    return charts(run, [*filter(is_schedule, run.curves), *(name for name in run.curves if "grad_norm" in name)])


def some(run: RunFolder, names: dict[str, str], *, heading: str, share: bool = False) -> str:
    """One chart of those of `names` (key -> words) that were recorded; "" without any."""
    found = {words: run.curves[key] for key, words in names.items() if key in run.curves}
    return line_chart(heading, found, share=share)


def others(run: RunFolder) -> str:
    def shown(key: str) -> bool:
        return is_loss(key) or is_schedule(key) or key.startswith("seconds/") or "grad_norm" in key or key == "time"

    content = charts(run, [name for name in run.curves if not shown(name)], points=COARSE)
    return f"<details><summary>Show the curves</summary>{content}</details>" if content else ""
