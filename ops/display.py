"""What a person sees of a run: a live display on a terminal, plain lines elsewhere, JSON lines for a program.

It listens to the run's log and knows nothing else of the run. The live display is drawn again at most four times a
second, and never for more than a hundredth of the time, however slow the terminal is. A terminal that has gone away (a
connection that broke, `| head` that has seen enough) costs the display, not the run.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from typing import Literal

import torch
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from .json_lines import JsonLines
from .pace import Pace, duration
from .runlog import Line

Form = Literal["auto", "json", "quiet"]
EVERY = 10.0  # seconds between plain lines
REFRESH = 0.25  # seconds between two drawings
SHARE = 1 / 100  # of the time that drawing may take
FREE = 0.1  # seconds of it that count for nothing: the first drawing imports what it draws with
WIDE = 80  # columns from which things stand side by side
NO_PROBE = ("kind", "who", "position", "seconds")


class Display:
    """One run's, on rank 0. `start` it; it says nothing before. `note` may be called from any thread.

    total, batch: images to see, and of a step over all `world` processes. form: auto shows it live on a terminal and as
    plain lines elsewhere, on the error stream; json writes objects on standard output; quiet says warnings only, as json
    does on the error stream.
    """

    def __init__(self, title: str, total: int, batch: int, world: int = 1, form: Form = "auto"):
        self.title, self.form = title, form
        self.pace = Pace(total, batch, world)
        self._console = Console(stderr=True, highlight=False)
        self._live: Live | None = None
        self._lines: JsonLines | None = None
        self._on = self._gone = False
        self._state, self._next, self._shown = "starting", 0.0, time.monotonic()
        self._began, self._spent = time.monotonic(), 0.0
        self._lock = threading.RLock()

    def start(self) -> None:
        """From now on it shows."""
        self._on = True
        if self.form == "json":
            self._lines = JsonLines(self.pace, lambda line: self.note(line))
        elif self.form == "auto" and sys.stderr.isatty() and not self._console.is_dumb_terminal:
            # What goes to standard output is somebody else's, unless that is the same terminal.
            same = sys.stdout.isatty()
            self._live = Live(console=self._console, auto_refresh=False, transient=True, redirect_stdout=same)
            self._guarded(lambda live: live.start(), self._live)
            self._refresh(now=True)

    def begin(self, position: int, *, trained: int) -> None:
        """The run stands at `position`, and its steps begin."""
        self.pace.begin(position, trained)
        self._state = "beginning"
        about = {"position": position, "end": self.pace.end, "batch": self.pace.batch, "world": self.pace.world}
        self._tell({"kind": "start", **about})
        self._refresh(now=True)

    def note(self, line: str) -> None:
        """A line of its own, above what is live."""
        if not self._on:
            return
        self._tell({"kind": "note", "text": line})
        if self._gone or (self.form != "auto" and not line.lower().startswith("warning")):
            return
        with self._lock:
            self._guarded(lambda console: console.print(line, markup=False, soft_wrap=True), self._console)

    def take(self, line: Line) -> None:
        """A line of the run's log."""
        if not self._on:
            return
        self.pace.take(line)
        self._tell(line)
        kind = line["kind"]
        if kind == "state":
            self._state = "" if line["state"] == "training" else line["state"]
            self._refresh(now=True)
        elif kind == "step":
            self._state = ""
            self._refresh()
            self._say()
        elif kind == "event" and line["event"] == "stalled":  # the watchdog's last word: it ends the process
            self._stop()

    def close(self, code: int, position: int, error: BaseException | None = None) -> None:
        """The run has ended, so: error, or a code."""
        if not self._on:
            return
        self._stop()
        if self._lines is not None:
            lines, self._lines = self._lines, None
            lines.end(code, position, error)

    # Live.

    def _stop(self) -> None:
        """Give the terminal back as it was."""
        if self._live is not None:
            live, self._live = self._live, None
            self._guarded(lambda _: live.stop(), live)
            if self.pace.step:  # what was live is gone; this stays
                self.note(f"{self.title}: {sentence(self.pace)}")

    def _refresh(self, now: bool = False) -> None:
        began = time.monotonic()
        dear = self._spent > FREE + SHARE * (began - self._began)
        if self._live is None or ((began < self._next or dear) and not now):
            return
        with self._lock:
            self._guarded(lambda live: live.update(self.picture(self._console.width), refresh=True), self._live)
        self._spent += time.monotonic() - began
        self._next = began + REFRESH

    def picture(self, width: int) -> RenderableType:
        """All of it, for so many columns."""
        pace, wide = self.pace, width >= WIDE
        done = f"{min(pace.position, pace.end)}/{pace.end} images"
        left = self._state if self._state or not pace.step else f"{duration(pace.left)} left"
        bar = Table.grid(padding=(0, 1), expand=True)
        bar.add_column(no_wrap=True)
        bar.add_column(ratio=1, min_width=8)
        bar.add_column(no_wrap=True, justify="right")
        meter = ProgressBar(total=max(pace.end, 1), completed=pace.position)
        share = f"{100 * pace.position / max(pace.end, 1):.0f} %"
        parts: list[RenderableType] = [bar]
        if wide:
            bar.add_row(self.title, meter, f"{share}  {done}  {left}")
        else:
            bar.add_row(self.title, meter, share)
            parts.append(Text(f"{done}, {left}", overflow="ellipsis", no_wrap=True))
        if pace.step:
            grid = Table.grid(padding=(0, 4))
            losses, facts = self._losses(), self._facts()
            if wide:
                grid.add_row(losses, facts)
                parts.append(grid)
            else:
                parts += [losses, facts]
        parts += [Text(f"probe {probe(line)}") for line in list(pace.probes.values())[-2:]]
        return Group(*parts)

    def _losses(self) -> Table:
        table = Table("", "now", "mean", box=None, padding=(0, 1), header_style="dim")
        for column in table.columns[1:]:
            column.justify = "right"
        for name, value in self.pace.losses.items():
            table.add_row(name.replace("_", " "), f"{value:.4g}", f"{self.pace.mean(name):.4g}")
        return table

    def _facts(self) -> Table:
        pace, step = self.pace, self.pace.step
        table = Table.grid(padding=(0, 2))
        table.add_column(style="dim", no_wrap=True)
        table.add_row("images/s", f"{pace.rate:.0f}")
        if pace.world > 1:
            table.add_row("a process", f"{pace.rate / pace.world:.0f} (of {pace.world})")
        table.add_row("data wait", f"{100 * pace.wait:.1f} % of the time")
        table.add_row("gradient norm", f"{step.get('grad_norm', float('nan')):.3g}")
        table.add_row("learning rate", f"{step.get('lr', float('nan')):.3g}")
        table.add_row("memory", memory())
        age = pace.age
        saved = (
            "none in this attempt"
            if age is None or pace.saved is None
            else f"{duration(age)} ago, image {pace.saved[0]}"
        )
        table.add_row("checkpoint", saved)
        table.add_row("left out", f"{pace.skipped} step{'' if pace.skipped == 1 else 's'}")
        return table

    # Plain lines.

    def _say(self) -> None:
        now, pace = time.monotonic(), self.pace
        if self.form != "auto" or self._live is not None:
            return
        if now - self._shown >= EVERY or pace.position >= pace.end:
            self._shown = now
            self.note(f"{self.title}: {sentence(pace)}")

    def _tell(self, line: Line) -> None:
        if self._lines is not None:
            with self._lock:
                self._lines.take(line)

    def _guarded(self, show, what) -> None:
        """A terminal that cannot be written any more is not written any more."""
        try:
            show(what)
        except OSError:
            self._gone, self._live = True, None


def sentence(pace: Pace) -> str:
    """Where a run stands, in one line."""
    losses = {name.replace("_", " "): f"{value:.4g}" for name, value in pace.losses.items()}
    whole = losses.pop("loss", "?")
    parts = f" ({', '.join(' '.join(each) for each in losses.items())})" if losses else ""
    together = f" on {pace.world} processes" if pace.world > 1 else ""
    return (
        f"{pace.position}/{pace.end} images, loss {whole}{parts}, {pace.rate:.0f} images/s{together}, "
        f"data wait {100 * pace.wait:.1f} %, {duration(pace.left)} left"
    )


def probe(line: Line) -> str:
    """A row of probes in words."""
    from .evaluate.online import shown

    scores = ", ".join(f"{n.replace('_', ' ')} {shown(n, v)}" for n, v in line.items() if n not in NO_PROBE)
    return f"at image {line['position']}: {line['who']}: {scores}"


def memory() -> str:
    """What this process holds: of its GPU if it has one, else of the machine."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return f"{torch.cuda.memory_reserved() / 1e9:.1f} GB of the GPU"
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[1])
    return f"{pages * os.sysconf('SC_PAGE_SIZE') / 1e9:.1f} GB"
