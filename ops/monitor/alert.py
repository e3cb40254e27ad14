"""One alert or recording rule as data, and how the durations in its expression are written out.

Durations stand in expressions as `$600s` (a window, as in `rate(x[$600s])`) and `$600` (a number of seconds to compare
with), so that the rules can be rendered for a run that lives a hundred times faster: a test then sees in a minute what
an operator sees in hours.
"""

import re
from typing import Literal, NamedTuple

EACH = "run, node, rank, instance"  # labels that tell one process of a run


class Record(NamedTuple):
    """A recording rule, named level:metric:operation; level is what the series are told apart by."""

    name: str
    expr: str


class Alert(NamedTuple):
    """One alert, a series for each run (or objective, memory, disk of a run) and never for each of a thousand ranks.

    severity: "page" wakes somebody, since work is being lost; "warn" can wait for the morning. hold: seconds for which
    expr must be true; keep: seconds for which it goes on firing afterwards, where it would flap. value: what the value
    of expr is, as it is shown. masks: alerts of the same run that need not be told while this one fires; it is their cause.
    """

    name: str
    severity: Literal["page", "warn"]
    expr: str
    summary: str
    cause: str
    hold: int = 0
    keep: int = 0
    value: Literal["ratio", "seconds", "number", "bytes"] = "number"
    masks: tuple[str, ...] = ()


def duration(seconds: float) -> str:
    """As Prometheus writes it: 90 is "90s", 5400 "90m", 0.25 "250ms"."""
    if seconds < 1 or seconds != int(seconds):
        return f"{max(1, round(seconds * 1000))}ms"
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= 2 * size and seconds % size == 0:
            return f"{seconds // size:.0f}{unit}"
    return f"{seconds:.0f}s"


def scaled(expr: str, scale: float = 1.0, shortest: float = 0.0) -> str:
    """`expr` with its durations in place; windows are at least `shortest` seconds, so that two scrapes fit in."""

    def put(found: re.Match[str]) -> str:
        seconds = int(found[1]) * scale
        return duration(max(seconds, shortest)) if found[2] else f"{seconds:.12g}"

    return re.sub(r"\$(\d+)(s?)\b", put, expr)
