"""The live view: looks every second until Ctrl-C, or until the run has been silent for too long."""

import time

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from .screen import Screen
from .view import View

INTERVAL = 1.0  # seconds between two looks
PATIENCE = 60.0  # seconds of silence until the view ends: a restart in place takes less


def watch(view: View, console: Console, interval: float = INTERVAL, patience: float = PATIENCE) -> int:
    """Draws `view` again and again. Returns 0 after Ctrl-C, 1 when no exporter has answered for `patience` seconds."""
    heard = time.monotonic()
    try:
        with Live(console=console, auto_refresh=False, vertical_overflow="crop") as live:
            while True:
                begun = time.monotonic()
                answer = view.look()
                silent = all(run["verdict"] == "silent" for run in answer["runs"])
                heard = heard if silent else time.monotonic()
                quiet = time.monotonic() - heard
                note = Text(f"no answer for {quiet:.0f} s" if silent else "Ctrl-C ends this view, not the run")
                note.stylize("bold red" if silent else "dim")
                live.update(Group(Screen(answer), note), refresh=True)
                if silent and (view.ended or quiet >= patience):
                    break
                time.sleep(max(interval - (time.monotonic() - begun), 0.05))
    except KeyboardInterrupt:
        return 0
    console.print(Text(view.ended or "the run no longer answers: it has ended, or was killed", style="bold"))
    return 1
