"""`gristmill status`: a view of runs in the terminal, read from their exporters like Prometheus reads them.

It asks the run and not its files, so what it shows is what an alert would see. It never loads torch: it has to answer
at once, also on a machine that trains nothing.
"""

import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from . import asking
from .asking import OPEN, STRANGER, Tls
from .glyphs import plain
from .live import watch
from .places import SilentError, StatusError, ended_because
from .screen import Screen
from .view import View

__all__ = ["SilentError", "StatusError", "show_status"]

STEPS = 5  # between the two looks of --once
OVER = (1.0, 10.0)  # seconds that this may take


def show_status(
    targets: Sequence[str] = (),
    *,
    once: bool = False,
    as_json: bool = False,
    check: bool = False,
    over: float | None = None,
    tls: Tls = OPEN,
    prometheus: str | None = None,
) -> int:
    """Shows the runs at `targets`: run folders, folders of targets, URLs, host:port; none: the newest run below here.

    once: one look and out, also wherever the output is no terminal; as_json: the same as one JSON object; over: seconds
    that its rates are taken over (None: about five steps), 0 for the whole process. Returns the exit code: 0; 1 if a run
    does not answer, and with `check` also where an alert of severity `page` would fire. Raises StatusError, with the
    remedy: where nothing answers SilentError (exit code 1), else exit code 2.
    """
    view = View(targets, tls, prometheus)
    plain(sys.stdout)
    live = not (once or as_json or check) and sys.stdout.isatty()
    answer = view.look()
    if all(run["verdict"] == "silent" for run in answer["runs"]):
        error = silence(answer, targets)
        if not as_json or not isinstance(error, SilentError):
            raise error
    if live:
        return watch(view, Console(highlight=False))
    if seconds := _pause(answer) if over is None else over:
        time.sleep(seconds)
        answer = view.look()
    if as_json:
        print(json.dumps(_finite(answer), indent=2))
    else:
        Console(highlight=False).print(Screen(answer))
    silent = any(run["verdict"] == "silent" for run in answer["runs"])
    return 1 if silent or (check and answer["state"] == "page") else 0


def _pause(answer: dict[str, Any]) -> float:
    """Seconds in which the slowest run that steps takes some steps; 0 where none does."""
    paces = [run["progress"]["step_seconds"] for run in answer["runs"] if run["progress"]["step_seconds"]]
    return min(max(STEPS * max(paces), OVER[0]), OVER[1]) if paces else 0.0


def silence(answer: dict[str, Any], targets: Sequence[str]) -> StatusError:
    """What to say where nothing answers."""
    ranks = [rank for run in answer["runs"] for rank in run["ranks"]["list"]]
    if all(rank["why"] == STRANGER for rank in ranks):
        return asking.stranger(ranks[0]["url"])
    more = f", nor at {len(ranks) - 1} more" if len(ranks) > 1 else ""
    told = [f"its last attempt ended ({why})" for target in targets if (why := ended_because(Path(target)))]
    return asking.silence(ranks[0]["url"], ranks[0]["why"], more, told[0] if told else "")


def _finite(value: Any) -> Any:
    """JSON has no NaN: what is not finite becomes null."""
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
