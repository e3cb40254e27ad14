"""The metrics of one training process: the few calls that feed the catalogue, and the registry that is served.

Parts of the system keep plain numbers; once a step the loop hands them here. Every name that can arrive is known when
`Metrics` is built; a value under another name, or one that is no number, is counted and dropped, and never stops a
run. Gauges appear with their first value (a checkpoint that was never written has no age); counters start at zero,
so that `increase()` sees the first event. Children of the client library are resolved once, on first use.
"""

import math
import re
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, is_dataclass
from itertools import product
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    ProcessCollector,
    disable_created_metrics,
)

from .catalogue import CATALOGUE, ENUMS, HEALTH, HEALTH_OF, MEMORIES, OBJECTIVES, PROBES, Row

WAIT_WINDOW = 64  # steps behind the data wait ratio: long enough to be calm, short enough to show a stall
UNKNOWN_KEPT = 16  # names kept for whoever looks for a misspelt one
FACTS = 16

Action = Callable[[float], object]


class Metrics:
    """Metrics of one process, in a registry of their own.

    run: the run's name; info: few facts for joins (recipe, topology, versions), at most 16, no secrets.
    The enumerations may be widened or narrowed for recipes of other make; they cannot change afterwards.
    Raises ValueError where a name cannot be a label (programming error, not the user's).
    """

    def __init__(
        self,
        run: str,
        info: Mapping[str, Any],
        *,
        objectives: Iterable[str] = OBJECTIVES,
        health: Iterable[str] | None = None,
        memories: Iterable[str] = MEMORIES,
        probes: Iterable[str] = PROBES,
    ):
        disable_created_metrics()  # a `_created` gauge beside each counter would nearly double the series
        self.registry = CollectorRegistry()
        self.unknown: set[str] = set()  # some of the names that fitted nothing
        health_of = HEALTH_OF if health is None else {}
        names = HEALTH if health is None else tuple(health)
        enums = ENUMS | {
            "objective": tuple(objectives),
            "name": names,
            "memory": tuple(memories),
            "probe": tuple(probes),
        }
        for label, members in enums.items():
            bad = [m for m in members if not re.fullmatch(r"[a-z][a-z0-9_./]{0,47}", m)]
            if bad:
                raise ValueError(f"{label} {bad[0]!r} cannot be a label value: lower case, digits and _ . / only")
        self._families: dict[str, Any] = {}
        self._places: dict[str, tuple[Row, tuple[str, ...]]] = {}
        self._actions: dict[str, Action] = {}
        self._waits: deque[tuple[float, float]] = deque(maxlen=WAIT_WINDOW)
        for row in CATALOGUE:
            for members in product(*(enums[label] for label in row.free)):
                of = dict(zip(row.free, members, strict=True))
                if of.get("name", "") not in ("", *health_of.get(of.get("objective", ""), names)):
                    continue
                name = row.name.format(**of)
                values = (*(value for _, value in row.fixed), *members)
                if name in self._places:
                    raise ValueError(f"two metrics would be fed by the name {name!r}")
                self._places[name] = (row, values)
                if row.kind != "gauge" and not row.late:
                    self._action(name)
        self._state = "starting"
        self.observe(dict.fromkeys(ENUMS["state"], 0.0), "state/")
        self.observe_state(self._state)
        Info("gristmill_run", "What runs.", registry=self.registry).info(_facts(run, info))
        ProcessCollector(registry=self.registry)

    def observe(self, values: Mapping[str, Any], prefix: str = "") -> None:
        """Takes numbers under their names in CATALOGUE, all of which begin with `prefix`."""
        self._put(prefix, values)

    def observe_state(self, state: str) -> None:
        """Says what this process is doing now, one of labels.STATES."""
        known = state in ENUMS["state"]
        self._put("state/", {self._state: 0.0, state: 1.0} if known else {state: 1.0})
        self._state = state if known else self._state

    def observe_step(self, values: Mapping[str, Any]) -> None:
        """Takes one decided step, under the names of CATALOGUE. Tensors are waited for here: hand over numbers.

        `phases`: seconds by phase; `seconds`: wall time of the step, else the sum of its phases; `batch`: images of
        this step; `bad`: true, or names of what was wrong with it. Checkpoints and probes lie between steps.
        `own_seconds`: its data wait and forward by the device's own clock, else by these phases.
        """
        row = {"steps": 1, "time": time.time(), **values, "bad": bool(values.get("bad"))}
        row.pop("kind", None)
        phases = row.pop("phases", None) or {}
        if isinstance(row.get("seconds"), Mapping):  # the spelling of metrics.jsonl
            phases = row.pop("seconds")
        if isinstance(phases, Mapping):
            row |= {f"phase/{phase}": value for phase, value in phases.items()}
            if phases and "seconds" not in row:
                row["seconds"] = sum(value for value in phases.values() if isinstance(value, int | float))
            if "own_seconds" not in row:
                own = (phases.get("data_wait"), phases.get("forward"))
                row["own_seconds"] = sum(value for value in own if isinstance(value, int | float))
        self._put("", row)
        wait, seconds = row.get("phase/data_wait"), row.get("seconds")
        if isinstance(wait, int | float) and isinstance(seconds, int | float) and seconds > 0 <= wait:
            self._waits.append((wait, max(seconds, wait)))
            waited, passed = map(sum, zip(*self._waits, strict=True))
            self._put("", {"data_wait_ratio": waited / passed})

    def observe_loader(self, stats: Any) -> None:
        """Takes a dataclass of running numbers (the loader's `Stats`); fields that fit no metric are only counted."""
        if not is_dataclass(stats) or isinstance(stats, type):
            raise TypeError(f"observe_loader takes a dataclass of numbers, not {type(stats).__name__}")
        self._put("loader/", {field.name: getattr(stats, field.name) for field in fields(stats)})

    def observe_probe(self, values: Mapping[str, Any], seconds: float | None = None) -> None:
        """Takes scores in [0, 1] by probe; keys `who` (default: teacher) and `position` say whose and when.

        seconds: what the probes cost, once per round of them.
        """
        scores = {name: value for name, value in values.items() if name not in ("who", "position", "kind")}
        self._put(f"probe/{values.get('who', 'teacher')}/", scores)
        if "position" in values:
            self._put("probe/", {"position": values["position"]})
        if seconds is not None:
            self._put("phase/", {"probe": seconds})

    def observe_checkpoint(
        self, *, ok: bool, seconds: float | None = None, size: int | None = None, position: int | None = None
    ) -> None:
        """Takes one try: seconds it took, size in bytes, its position. Only a good one renews the age."""
        values: dict[str, Any] = {"ok" if ok else "failed": 1}
        if ok:
            values["time"] = time.time()
            values |= {name: value for name, value in (("bytes", size), ("position", position)) if value is not None}
        if seconds is not None:
            values["seconds"] = seconds  # most of them beside training; what the step waited is its phase "checkpoint"
        self._put("checkpoint/", values)

    def _put(self, prefix: str, values: Mapping[str, Any]) -> None:
        actions = self._actions
        for name, value in values.items():
            name = f"{prefix}{name}" if prefix else name
            act = actions.get(name) or self._action(name)
            if act is not None:
                try:
                    act(float(value))
                    continue
                except (TypeError, ValueError, RuntimeError, OverflowError):
                    pass  # no number, or one that this metric cannot take: counted below
            if len(self.unknown) < UNKNOWN_KEPT:
                self.unknown.add(str(name)[:80])
            actions["ignored"](1.0)

    def _action(self, name: str) -> Action | None:
        """What to do with a value of this name, kept for the next time; None where the catalogue has none."""
        if name not in self._places:
            return None
        row, values = self._places[name]
        if row.metric not in self._families:
            if row.kind == "gauge":
                family = Gauge(row.metric, row.help, row.labels, registry=self.registry)
            elif isinstance(row.kind, str):
                family = Counter(row.metric, row.help, row.labels, registry=self.registry)
            else:
                family = Histogram(row.metric, row.help, row.labels, registry=self.registry, buckets=row.kind)
            self._families[row.metric] = family
        child = self._families[row.metric].labels(*values) if values else self._families[row.metric]
        if row.kind == "gauge":
            act = child.set
        elif row.kind == "total":
            act = _growth(child.inc)
        else:
            act = _guarded(child.inc if row.kind == "add" else child.observe)
        self._actions[name] = act
        return act


def _guarded(add: Action) -> Action:
    """One NaN would make a sum NaN for good, and a counter must not fall: such values are refused."""

    def act(value: float) -> None:
        if not 0.0 <= value < math.inf:
            raise ValueError(value)
        add(value)

    return act


def _growth(add: Action) -> Action:
    """Adds what a running total grew by; one that fell was started again, and counts from zero."""
    last = 0.0
    guarded = _guarded(add)

    def act(value: float) -> None:
        nonlocal last
        guarded(value - last if value >= last else value)
        last = value

    return act


def _facts(run: str, info: Mapping[str, Any]) -> dict[str, str]:
    """Label values of the one info series: short, printable, and without what a URL may carry in secret."""
    if len(info) > FACTS:
        raise ValueError(f"info has {len(info)} entries; {FACTS} at most, the rest belongs in the run folder")
    facts = {}
    for name, value in {**info, "run": run}.items():
        if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
            raise ValueError(f"info name {name!r} cannot be a label: lower case, digits and _ only")
        text = "".join(c if c.isprintable() else "?" for c in str(value))
        if "://" in text:
            url = urlsplit(text)
            text = urlunsplit((url.scheme, url.netloc.rpartition("@")[2], url.path, "", ""))
        facts[name] = text[:120]
    return facts
