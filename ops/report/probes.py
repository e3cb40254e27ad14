"""The probes on the page: a tile a number, the table against its baselines, and the curves over the images seen.

A number alone says little, so that none is shown without what chance, the raw pixels and the untrained network reach on
the same images.
"""

from __future__ import annotations

import math
from html import escape
from typing import Any

import numpy as np

from .charts import line_chart, percent, short
from .folder import Curve, RunFolder

BASELINES = {"chance": "chance", "pixels": "raw pixels", "random": "random initialisation"}
LABEL_FREE = {
    "rank_me": "Effective rank (RankMe)",
    "feature_std": "Spread of features",
    "uniformity": "Uniformity",
    "neighbour_agreement": "Neighbour agreement",
}
SHARES = (
    "_knn", "_retrieval", "_agreement", "_accuracy", "_purity", "_top1", "_top5", "_miou", "_map", "_nmi", "_ari", "_correct",
    "_j_f",
)  # fmt: skip
KINDS = {
    "knn": "k\N{NON-BREAKING HYPHEN}NN: share of images whose class the vote of their nearest neighbours names correctly.",
    "retrieval": "Retrieval: mean average precision: how early in the ranking the other images of the same one come.",
}


def title(name: str) -> str:
    """`coarse_knn` -> `Coarse classes, k-NN`."""
    level, _, kind = name.rpartition("_")
    if name in LABEL_FREE:
        return LABEL_FREE[name]
    if kind == "knn":
        return f"{level.replace('_', ' ').capitalize()}{'' if level == 'class' else ' classes'}, k\N{NON-BREAKING HYPHEN}NN"
    if kind == "retrieval":
        return f"{level.replace('_', ' ').capitalize()}, retrieval"
    return name.replace("_", " ").capitalize()


def is_share(name: str) -> bool:
    """Whether a number is a share between 0 and 1, shown as percent."""
    return name.endswith(SHARES) or "_recall" in name


def score_of(row: dict[str, Any], name: str) -> float | None:
    """A probe's number, or None if it is not there or not finite."""
    value = row.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def show(name: str, value: float | None) -> str:
    """As percent or as it is."""
    if value is None:
        return "–"
    return percent(value) if is_share(name) else short(value)


def tiles(run: RunFolder) -> str:
    """The teacher's last numbers, each with its distance to the best baseline."""
    teacher = run.teacher()
    parts = []
    for name in run.probe_names():
        value = score_of(teacher[-1], name) if teacher else None
        if value is None or (name not in LABEL_FREE and not is_share(name)):
            continue
        others = {label: score_of(run.baseline(who), name) for who, label in BASELINES.items()}
        known = {label: other for label, other in others.items() if other is not None}
        text = ""
        if known and is_share(name) and name not in LABEL_FREE:
            best = max(known, key=lambda label: known[label])
            points = 100 * (value - known[best])
            text = f"{abs(points):.1f} points {'below' if points < 0 else 'above'} {best}"
            if "chance" in known and best != "chance":
                text += f", chance {percent(known['chance'])}"
        parts.append(
            f'<div class="tile"><span>{escape(title(name))}</span><b>{show(name, value)}</b><span>{escape(text)}</span></div>'
        )
    return f'<div class="tiles">{"".join(parts)}</div>' if parts else ""


def table(run: RunFolder) -> str:
    """Chance, raw pixels, random initialisation, and the teacher at the start, in the middle and at the end."""
    names = run.probe_names()
    teacher = run.teacher()
    rows = [(label, run.baseline(who)) for who, label in BASELINES.items()]
    rows = [(label, row) for label, row in rows if row]
    if teacher:
        middle = min(teacher, key=lambda row: abs(row["position"] - teacher[-1]["position"] / 2))
        chosen = {row["position"]: row for row in (teacher[0], middle, teacher[-1])}
        rows += [(f"teacher after {at:,} images" if at else "teacher at the start", row) for at, row in chosen.items()]
    if not rows or not names:
        return '<p class="missing">No probe has reported yet.</p>'
    head = "".join(f"<th>{escape(title(name))}</th>" for name in names)
    body = []
    for number, (label, row) in enumerate(rows):
        cells = "".join(f"<td>{show(name, score_of(row, name))}</td>" for name in names)
        last = ' class="last"' if teacher and number == len(rows) - 1 else ""
        body.append(f"<tr{last}><th>{escape(label)}</th>{cells}</tr>")
    words = " ".join(text for kind, text in KINDS.items() if any(name.endswith(f"_{kind}") for name in names))
    return (
        f'<div class="scroll"><table><thead><tr><th></th>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'
        f'<p class="soft">{escape(words)} Labels are read by the probes alone, never by training.</p>'
    )


def curves(run: RunFolder) -> str:
    """One chart a number: the teacher's over the images seen, with the baselines as dashed levels."""
    teacher = run.teacher()
    untrained = run.baseline("random")
    if teacher and untrained.get("position") == 0 and teacher[0]["position"] > 0:
        teacher = [untrained, *teacher]  # before its first step the teacher is the untrained network
    if len(teacher) < 2:
        return ""
    charts = []
    for name in run.probe_names():
        points = [(row["position"], value) for row in teacher if (value := score_of(row, name)) is not None]
        if len(points) < 2:
            continue
        curve = Curve(np.array([x for x, _ in points], dtype=float), np.array([y for _, y in points]))
        levels = {label: score_of(run.baseline(who), name) for who, label in BASELINES.items()}
        known = {label: value for label, value in levels.items() if value is not None}
        charts.append(line_chart(title(name), {"teacher": curve}, levels=known, share=is_share(name), dots=True))
    return (
        f'<p>The teacher\'s probes over the images seen.</p><div class="charts">{"".join(charts)}</div>'
        if charts
        else ""
    )
