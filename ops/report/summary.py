"""The top of the page: what was trained on what, how far it came, where it stopped and why, and the probes in one line."""

from __future__ import annotations

import time
from html import escape
from pathlib import Path
from typing import Any

from ..pace import duration
from . import probes
from .attempts import read_attempts
from .charts import percent, short
from .data import about, sources
from .folder import RunFolder
from .speed import phases, rate, stepping


def lead(run: RunFolder) -> str:
    """One sentence: how much was seen, and how the time went."""
    total, batch = run.recipe.get("images"), _count(run.recipe.get("batch"))
    if not run.steps:
        return '<p class="lead">No training step is recorded yet.</p>'
    seen = reached(run)
    text = f"{seen:,} images seen in {run.steps:,} steps"
    if isinstance(total, int) and total > 0:
        share = min(seen / total, 1)
        text += (
            " – the whole run" if seen + batch > total else f", {share:.0%} of the {total:,} that the recipe asks for"
        )
    waits, seconds = run.curves.get("seconds/data_wait"), stepping(run)
    if seconds > 0:
        text += f"; {duration(seconds)} of stepping"
        if waits is not None:
            text += f", {percent(float(waits.y[waits.y > 0].sum()) / seconds)} of it waiting for data"
    return f'<p class="lead">{escape(text)}.</p>'


def reached(run: RunFolder) -> int:
    """Images seen, the last step's own included."""
    steps = [curve.x[-1] for name, curve in run.curves.items() if len(curve.x)]
    return int(max([run.position, *(at + _count(run.recipe.get("batch")) for at in steps)]))


def facts(run: RunFolder) -> str:
    """A list of what a reader asks first; only what is known."""
    found = {
        "Method": _method(run.recipe),
        "Network": _network(run.recipe),
        "Data": _data(run.recipe),
        "Seen": _seen(run),
        "Probes": _probes(run),
        "Now": _ending(run),
    }
    rows = "".join(f"<dt>{name}</dt><dd>{escape(text)}</dd>" for name, text in found.items() if text)
    return f'<dl class="facts">{rows}</dl>' if rows else ""


def _count(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62 else 0


def _part(tree: Any, *names: str) -> Any:
    """A value deep in the recipe, or None."""
    for name in names:
        tree = tree.get(name) if isinstance(tree, dict) else None
    return tree


def _method(recipe: dict[str, Any]) -> str:
    objectives = _part(recipe, "objectives")
    if not isinstance(objectives, dict):
        return ""
    weights = objectives.get("weights")
    names = [n for n, config in objectives.items() if isinstance(config, dict) and n not in ("weights", "add")]
    parts = []
    for name in names:
        weight = weights.get(name) if isinstance(weights, dict) else None
        plain = isinstance(weight, int | float) and weight != 1
        parts.append(name.replace("_", " ") + (f" × {weight:g}" if plain else ""))
    return ", ".join(parts)


def _network(recipe: dict[str, Any]) -> str:
    student = _part(recipe, "student")
    if not isinstance(student, dict) or not student.get("backbone"):
        return ""
    text = str(student["backbone"])
    sizes = {"width": "embed_dim", "depth": "depth", "heads": "heads", "patches of": "patch_size"}
    given = [f"{words} {student[key]}" for words, key in sizes.items() if student.get(key)]
    views = recipe.get("views")
    crops = [
        f"{view.get('count', 1)} x {view.get('size')}"
        for view in (views if isinstance(views, list) else [])
        if isinstance(view, dict)
    ]
    return text + (f", {', '.join(given)}" if given else "") + (f"; crops {', '.join(crops)}" if crops else "")


def _data(recipe: dict[str, Any]) -> str:
    parts = []
    for row in sources(recipe)[:4]:
        images = about(row.get("path")).get("samples")
        parts.append(str(row.get("path")) + (f" ({images:,} images)" if isinstance(images, int) else ""))
    return "; ".join(parts)


def _seen(run: RunFolder) -> str:
    if not run.steps:
        return ""
    text = f"{reached(run):,} images in batches of {_count(run.recipe.get('batch')):,}"
    samples = [about(row.get("path")).get("samples") for row in sources(run.recipe)]
    if len(samples) == 1 and isinstance(samples[0], int) and samples[0] > 0:
        text += f", {reached(run) / samples[0]:.1f} times each"
    speed = rate(run)
    return text + (f", {short(float(speed.y.mean()))} a second" if phases(run) and speed is not None else "")


def _probes(run: RunFolder) -> str:
    teacher = run.teacher()
    if not teacher:
        return ""
    parts = []
    for name in run.probe_names():
        value = probes.score_of(teacher[-1], name)
        if value is None:
            continue
        chance = probes.score_of(run.baseline("chance"), name)
        beside = f" (chance {probes.show(name, chance)})" if chance is not None else ""
        parts.append(f"{probes.title(name)} {probes.show(name, value)}{beside}")
    return "; ".join(parts)


def _ending(run: RunFolder) -> str:
    """Where the run stands and why it does not go on."""
    total, seen = _count(run.recipe.get("images")), reached(run) if run.steps else run.position
    attempts = read_attempts(run.path)
    why = attempts[-1].why if attempts else ""
    if total and run.steps and seen + _count(run.recipe.get("batch")) > total:
        return f"finished after {seen:,} images"
    if _running(run):
        return f"under way, at image {seen:,}"
    if not run.steps:
        return ""
    text = f"stopped at image {seen:,}"
    if why and why != "done":
        return f"{text}: {why}"
    last = run.events[-1] if run.events else {}
    if last.get("event") in ("stalled", "checkpoint_failed") and last.get("why"):
        return f"{text}; the last event: {str(last['event']).replace('_', ' ')}, {str(last['why'])[:200]}"
    return f"{text}; `gristmill train` with the same recipe and folder goes on from its newest checkpoint"


def _running(run: RunFolder) -> bool:
    """Whether a process of this machine holds the run folder's lock, or the log was written within the last minute.

    The lock is looked up, not tried: a run that starts at this moment must not be refused because a report is made.
    """
    try:
        inode = f":{(run.path / '.lock').stat().st_ino} "
        held = any("FLOCK" in line and inode in line for line in Path("/proc/locks").read_text().splitlines())
        return held or time.time() - (run.path / "metrics.jsonl").stat().st_mtime < 60
    except OSError:
        return False
