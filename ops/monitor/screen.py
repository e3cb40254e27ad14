"""How a run looks in the terminal: one row a subject, shares as bars, what needs the operator in colour.

Names come from the wire, so they are always `Text`: rich would read [markup] in a plain string.
"""

import math
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

STALL = 0.2  # share of the step spent waiting for data that is worth red


def draw(summary: dict[str, Any]) -> RenderableType:
    """A summary for the terminal: one row a subject, one line a thing."""
    progress, checkpoint, samples = summary["progress"], summary["checkpoint"], summary["samples"]
    rows = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    rows.add_column(style="bold cyan", no_wrap=True)
    rows.add_column()
    title = " ".join(f"{name}={value}" for name, value in summary["run"].items() if name != "run")
    rows.add_row("run", Text(f"{summary['run'].get('run', '?')}  {title}"))
    if summary["warning"]:
        rows.add_row("", Text(summary["warning"], style="bold yellow"))
    rate, wait = progress["images_per_second"], summary["data_wait_ratio"]
    line = f"image {_number(progress['position'])}  {_number(rate)} images/s"
    line += f"  {_number(progress['step_seconds'])} s/step, last {_duration(progress['last_step_age_seconds'])} ago"
    rows.add_row("progress", Text(f"{_bar(progress['ratio'])} {line}" if progress["ratio"] is not None else line))
    if progress["bad_steps"]:
        rows.add_row("", Text(f"{_number(progress['bad_steps'])} steps left out: not finite", style="yellow"))
    rows.add_row("loss", _pairs(summary["loss"]))
    for objective, health in summary["health"].items():
        rows.add_row(Text(f"  {objective}", style="cyan"), _pairs(health))
    rows.add_row("applied", _pairs(summary["schedules"]))
    for phase, share in summary["phases"].items():
        rows.add_row(
            Text(f"  {phase}", style="cyan"),
            Text(_bar(share), style="red" if phase == "data_wait" and share > STALL else ""),
        )
    rows.add_row("data wait", Text("-" if wait is None else f"{wait:.1%} of the step"))
    rows.add_row("samples", _pairs({**samples, "bytes": _bytes(samples["bytes"])}))
    for name, buffer in summary["buffers"].items():
        capacity = buffer.get("capacity")
        fill = f"{_bar(buffer.get('depth', 0.0) / capacity)}  " if capacity else ""
        rows.add_row(Text(f"buffer {name}"), Text(fill).append_text(_pairs(buffer)))
    for name, memory in summary["memories"].items():
        rest = {what: value for what, value in memory.items() if what != "fill"}
        rows.add_row(Text(f"memory {name}"), Text(f"{_bar(memory.get('fill', 0.0))}  ").append_text(_pairs(rest)))
    for name, scores in summary["probes"].items():
        rows.add_row(Text(f"probe {name}"), _pairs(scores))
    counts = {name: count for name, count in checkpoint.items() if name not in ("age_seconds", "bytes") and count}
    age = "none yet" if checkpoint["age_seconds"] is None else f"{_duration(checkpoint['age_seconds'])} old"
    rows.add_row("checkpoint", Text(f"{age}  {_bytes(checkpoint['bytes'])}  ").append_text(_pairs(counts)))
    return rows


def _pairs(values: dict[str, Any]) -> Text:
    shown = [f"{k} {v if isinstance(v, str) else _number(v)}" for k, v in values.items() if v is not None]
    return Text("  ".join(shown) or "-")


def _bar(share: float, width: int = 24) -> str:
    full = round(min(max(share, 0.0), 1.0) * width) if math.isfinite(share) else 0
    return f"{'█' * full}{'░' * (width - full)} {share:4.0%}"


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if math.isfinite(value) and value == int(value) else f"{value:.4g}"


def _bytes(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return "-"
    power = min(max(int(math.log(max(value, 1.0), 1024)), 0), 4)
    return f"{value / 1024**power:.1f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    for span, unit in ((3600.0, "h"), (60.0, "min")):
        if seconds >= 2 * span:
            return f"{seconds / span:.1f} {unit}"
    return f"{seconds:.0f} s"
