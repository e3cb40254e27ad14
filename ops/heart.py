"""A heart: what one rank tells of itself, and what all ranks' hearts at two moments say about who holds up the run.

Pure: hearts in, text out. Who beats, who listens and when to look is watchdog.py's.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass

UNSET = "-"  # what a key holds before anybody wrote it; all are made at the start, since reading a missing one waits
DEPTH, ROWS, STACKS = 48, 32, 8  # frames in a heartbeat; rows of the table and stacks in a report

Stack = list[tuple[str, int, str]]  # file, line, function; innermost last


@dataclass(frozen=True)
class Heart:
    """A heartbeat. `count`: calls of `at` at this position; `idle`: seconds since the last; `silent`: of the next rank."""

    rank: int
    host: str
    pid: int
    beat: int
    phase: str
    position: int
    count: int
    idle: float
    silent: float
    waits: bool  # in a phase or a function in which ranks wait for each other
    left: bool
    stack: Stack

    def where(self) -> str:
        return f"phase {self.phase}" + (f" at position {self.position}" if self.position >= 0 else "")

    def who(self) -> str:
        return f"rank {self.rank} (host {self.host}, pid {self.pid})"

    def to_json(self) -> str:
        return json.dumps(vars(self))

    @classmethod
    def from_json(cls, text: str) -> Heart | None:
        """None for a key that holds no heart yet."""
        return None if text == UNSET else cls(**json.loads(text))


def accuse(before: Mapping[int, Heart | None], after: Mapping[int, Heart | None]) -> tuple[str, list[int]]:
    """Who holds up the run, by all hearts at two moments: a kind, and the ranks.

    "stopped": the heart did not beat in between, or never did. "stuck": neither in a collective nor in a phase of
    waiting, or all are, and of those the furthest behind. "left": all others wait for ranks that ended. "all": nobody
    stands out.
    """
    beats = {rank: heart.beat for rank, heart in before.items() if heart}
    stopped = [rank for rank, heart in after.items() if not heart or (not heart.left and heart.beat == beats.get(rank))]
    if stopped:
        return "stopped", stopped
    hearts = [heart for heart in after.values() if heart]
    left = [heart.rank for heart in hearts if heart.left]
    here = [heart for heart in hearts if not heart.left]
    free = [heart for heart in here if not heart.waits]
    if left and not free:
        return "left", left
    pool = free or here
    behind = min((heart.position, heart.count) for heart in pool)
    suspects = [heart.rank for heart in pool if (heart.position, heart.count) == behind]
    return ("stuck" if len(suspects) < len(after) or len(after) == 1 else "all"), suspects


def describe(before: Mapping[int, Heart | None], after: Mapping[int, Heart | None]) -> str:
    """The finding: a sentence that names the suspects, a table of all ranks, the suspects' stacks."""
    kind, suspects = accuse(before, after)
    stopped = suspects if kind == "stopped" else []
    charges, rows, stacks = [], [], {}
    for rank in sorted(after, key=lambda rank: (rank not in suspects, rank)):
        heart, watcher = after[rank], after.get((rank - 1) % len(after))
        if heart is None:
            charge, row = f"rank {rank} was never heard", f"{rank:>7}  never heard"
        else:
            state = "stopped" if rank in stopped else "left" if heart.left else "waits" if heart.waits else "busy"
            row = f"{rank:>7}  {heart.host:<16} {heart.phase:<16} {heart.position:>12} {heart.idle:>8.1f}  {state}"
            if rank in stopped:
                how_long = f" for {watcher.silent:.1f} s" if watcher and watcher.rank not in stopped else ""
                charge = f"{heart.who()} has stopped: no heartbeat{how_long}; last seen in {heart.where()}"
            elif heart.left:
                charge = f"{heart.who()} has left, and the others wait for it"
            else:
                charge = f"{heart.who()} makes no progress: in {heart.where()} for {heart.idle:.1f} s"
            if rank in suspects:
                stacks.setdefault(render(heart.stack), []).append(rank)
        rows.append(row)
        if rank in suspects and kind != "all":
            charges.append(charge)
    title = "; ".join(charges[:3]) + (f"; and {len(charges) - 3} more" if len(charges) > 3 else "")
    header = f"   rank  {'host':<16} {'phase':<16} {'position':>12} {'idle s':>8}  state"
    more = [f"    ...  {len(rows) - ROWS} more"] if len(rows) > ROWS else []
    stood = [f"rank {str(ranks[:ROWS])[1:-1]} stood here:\n{text}" for text, ranks in list(stacks.items())[:STACKS]]
    return "\n".join([title or "no rank makes progress, and none stands out", header, *rows[:ROWS], *more, *stood])


def stand(heart: Heart) -> str:
    """Where one rank stands, with its stack."""
    return f"{heart.who()} stands in {heart.where()} for {heart.idle:.1f} s:\n{render(heart.stack)}"


def stack_of(thread: int) -> Stack:
    """The innermost DEPTH frames of a thread by its identifier; [] once it has ended."""
    frame, stack = sys._current_frames().get(thread), []
    while frame is not None and len(stack) < DEPTH:
        stack.append((frame.f_code.co_filename, frame.f_lineno or 0, frame.f_code.co_qualname))
        frame = frame.f_back
    return stack[::-1]


def render(stack: Stack) -> str:
    """A stack as text, innermost call last. Without source lines: the disk that holds them may be what hangs."""
    return "\n".join(f'    File "{file}", line {line}, in {function}' for file, line, function in stack)
