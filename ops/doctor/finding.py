"""What a check finds, and what it is asked: plain data, for a table, for JSON, and for the way between processes."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

State = Literal["ok", "warn", "bad", "skipped"]
BADNESS: dict[State, int] = {"skipped": 0, "ok": 1, "warn": 2, "bad": 3}
PORT = 9464  # of the metrics, as monitor/ports.py has it: a check starts without what that imports (a test ties them)


@dataclass(frozen=True)
class Finding:
    """What one check found.

    found: with figures in words; why: why it matters; remedy: what to do, of all that are not "ok". figures: the same
    numbers for scripts, by name and unit. ranks: whose finding it is in a group; () where there is none.
    """

    name: str
    state: State
    found: str
    why: str
    remedy: str = ""
    figures: Mapping[str, Any] = field(default_factory=dict)
    ranks: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.state not in BADNESS or not self.found or not self.why or (self.state != "ok" and not self.remedy):
            raise ValueError(f"{self.name}: a finding says what it found and why it matters, and a bad one what to do")

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> Finding:
        return cls(**{**tree, "ranks": tuple(tree.get("ranks", ()))})


@dataclass(frozen=True)
class Asked:
    """What is to be looked at. seconds: that a check may take. local_world: processes of ours on this host."""

    data: str | None = None
    out: str | None = None
    cache: str | None = None
    peers: tuple[str, ...] = ()
    port: int = PORT
    seconds: float = 120.0
    local_world: int = 1
    grouped: bool = False  # whether this is one of several processes that a launcher started

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Asked:
        tree = json.loads(text)
        return cls(**{**tree, "peers": tuple(tree["peers"])})


def worst(findings: Iterable[Finding]) -> State:
    """The worst state among them; "skipped" where there are none."""
    states: list[State] = [finding.state for finding in findings]
    return max(states, key=badness) if states else "skipped"


def badness(state: State) -> int:
    """What states are sorted by."""
    return BADNESS[state]


def size(count: float) -> str:
    """Bytes for people: 1.5 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB" if count < 1000 else f"{count:,.0f} TB"


def said(error: BaseException) -> str:
    """An error in one line, without its class where the system has words for it."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror + (f": {os.fspath(error.filename)!s}" if error.filename else "")
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
