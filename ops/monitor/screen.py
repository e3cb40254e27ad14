"""How runs look in the terminal: what needs the operator first, then the data path, ranks, learning, machine.

One column at 60 characters, two from 130, so that a run fits on one screen without scrolling.
"""

from collections.abc import Iterator
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.table import Table
from rich.text import Text

from .glyphs import Packed, bar, duration, heading, number
from .screen_data import data_path, machine, ranks
from .screen_learning import learning, memories, phases, probes

WIDE = 130  # characters from which there are two columns
LATE = 10.0  # seconds without a step that are worth red, where steps are short
STYLES = {
    "page": "bold white on red",
    "warn": "bold black on yellow",
    "silent": "bold white on red",
    "ok": "bold green",
}
FACTS = ("recipe", "device", "precision", "zero", "executor")  # of the run's own, in the title


class Screen:
    """What `View.look` found, for `Console.print` and `Live`."""

    def __init__(self, answer: dict[str, Any]):
        self.answer = answer

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        width = options.max_width
        for index, run in enumerate(self.answer["runs"]):
            if index:
                yield Text("")
            yield from head(run, width)
            if run["ranks"]["answering"]:
                yield from _body(run, width)
            else:
                yield from _missing(run)
        if self.answer["prometheus"] is not None:
            yield from _prometheus(self.answer["prometheus"])


def head(run: dict[str, Any], width: int) -> Iterator[RenderableType]:
    """The run, how far it is, and what is wrong with it."""
    of, facts = run["ranks"], run["facts"]
    told = {name: facts[name] for name in FACTS if name in facts} if width >= 80 else {}
    yield Packed(
        [
            Text.assemble((f" {run['verdict'].upper()} ", STYLES[run["verdict"]]), " ", (run["run"], "bold")),
            run["state"],
            f"{of['answering']} of {of['expected']} ranks" if of["expected"] > 1 else None,
            *(Text(f"{name} {value}", style="dim") for name, value in told.items()),
        ]
    )
    for note in run["notes"]:
        yield Text(note, style="bold yellow")
    progress = run["progress"]
    if progress["position"] is None and progress["ratio"] is None:
        if run["ranks"]["answering"]:
            yield Text("no step yet")
    else:
        yield Packed(_progress(progress, 20 if width < 80 else 40))
    for alert in run["alerts"]:
        if alert["masked_by"]:
            yield Text(f"      {alert['name']}  follows from {alert['masked_by']}", style="dim")
            continue
        label = Text(f" {alert['severity'].upper()} ", style=STYLES[alert["severity"]])
        line = Text.assemble(label, " ", (alert["name"], "bold"), "  ", "; ".join(alert["where"]) or alert["summary"])
        yield (
            line.append(f"  fires after {duration(alert['hold_seconds'])}", style="dim")
            if alert["hold_seconds"]
            else line
        )


def _progress(progress: dict[str, Any], long: int) -> list[Text]:
    of = f" of {number(progress['images'])}" if progress["images"] is not None else ""
    rate, pace, age = progress["images_per_second"], progress["step_seconds"], progress["last_step_age_seconds"]
    parts = [Text(bar(progress["ratio"], long)), Text(f"image {number(progress['position'])}{of}")]
    parts += [Text(f"step {number(progress['step'])}")] if progress["step"] is not None else []
    late = age is not None and age > max(LATE, 5 * (pace or 0.0)) and (progress["ratio"] or 0.0) < 1
    if late:  # what it did before says nothing now
        return [*parts, Text(f"no step for {duration(age)}", style="bold red")]
    parts += [Text(f"{number(round(rate, 1))} images/s")] if rate else []
    parts += [Text(f"{number(pace)} s/step")] if pace else []
    parts += [Text(f"{duration(progress['eta_seconds'])} left")] if progress["eta_seconds"] else []
    return parts + ([Text(f"last step {duration(age)} ago")] if age is not None else [])


def _body(run: dict[str, Any], width: int) -> Iterator[RenderableType]:
    if width < WIDE:
        for section in (data_path, ranks, phases, learning, memories, probes, machine):
            yield from _spaced(section(run, width))
        return
    half = (width - 3) // 2
    grid = Table.grid(padding=(0, 3, 0, 0), expand=True)
    grid.add_column(ratio=1)
    grid.add_column(ratio=1)
    left = [part for section in (data_path, ranks, phases, machine) for part in _spaced(section(run, half))]
    right = [part for section in (learning, memories, probes) for part in _spaced(section(run, half))]
    grid.add_row(_stack(left), _stack(right))
    yield grid


def _spaced(parts: list[RenderableType]) -> Iterator[RenderableType]:
    if parts:
        yield Text("")
        yield from parts


def _stack(parts: list[RenderableType]) -> Table:
    grid = Table.grid()
    for part in parts:
        grid.add_row(part)
    return grid


def _missing(run: dict[str, Any]) -> Iterator[RenderableType]:
    for rank in run["ranks"]["list"][:8]:
        yield Text(f"rank {rank['rank']} does not answer at {rank['url']}: {rank['why']}", style="red")


def _prometheus(found: list[dict[str, Any]]) -> Iterator[RenderableType]:
    yield Text("")
    yield heading("Prometheus")
    if not found:
        yield Text("no alert of Gristmill is pending or firing")
    for alert in found:
        style = STYLES.get(alert["severity"], "") if alert["state"] == "firing" else "dim"
        of = "  ".join(
            f"{k} {v}" for k, v in alert["labels"].items() if k in ("run", "rank", "node", "objective", "memory")
        )
        yield Text.assemble((f" {alert['state']} ", style), " ", (alert["name"], "bold"), f"  {of}  {alert['summary']}")
