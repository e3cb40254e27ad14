"""One answer of an exporter as plain numbers, and a rank as two of them: now, and some seconds ago.

Rates and shares are growths between two answers of the same process. What another machine answers is not trusted to be
printable or small. A page that speaks for several ranks (a node's) carries the label `rank`, and falls apart by it.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from prometheus_client.parser import text_string_to_metric_families

Labels = tuple[tuple[str, str], ...]
TARGET_LABELS = ("run", "rank", "node", "instance", "job")  # who says it, not what is said


class Reading:
    """The samples of one answer: a metric as a number, by one label, or by two. Missing metrics are None and {}.

    Raises ValueError or LookupError where the text is no exposition format.
    """

    def __init__(self, text: str = "", at: float | None = None):
        self.at = time.time() if at is None else at
        self.values: dict[str, dict[Labels, float]] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                labels = tuple(sorted((printable(k), printable(v)) for k, v in sample.labels.items()))
                self.values.setdefault(sample.name, {})[labels] = float(sample.value)

    def one(self, name: str, /, **labels: str) -> float | None:
        """The first series of this name that has these labels."""
        wanted = labels.items()
        return next((value for has, value in self.values.get(name, {}).items() if wanted <= dict(has).items()), None)

    def by(self, name: str, label: str) -> dict[str, float]:
        return {dict(labels).get(label, ""): value for labels, value in self.values.get(name, {}).items()}

    def pairs(self, name: str, outer: str, inner: str) -> dict[str, dict[str, float]]:
        table: dict[str, dict[str, float]] = {}
        for labels, value in self.values.get(name, {}).items():
            table.setdefault(dict(labels).get(outer, ""), {})[dict(labels).get(inner, "")] = value
        return table

    def info(self) -> dict[str, str]:
        """What gristmill_run_info tells about the run."""
        return dict(next(iter(self.values.get("gristmill_run_info", {})), ()))

    def age(self, name: str) -> float | None:
        """Seconds since the timestamp that this metric holds."""
        stamp = self.one(name)
        return None if stamp is None else max(self.at - stamp, 0.0)

    def split(self) -> dict[str, tuple[dict[str, str], "Reading"]]:
        """By rank, {rank: (labels of the target, its samples)}; {} for a page of one process, which names no rank."""
        parts: dict[str, tuple[dict[str, str], Reading]] = {}
        for name, series in self.values.items():
            for labels, value in series.items():
                has = dict(labels)
                if "rank" not in has:
                    continue
                if has["rank"] not in parts:
                    parts[has["rank"]] = {}, Reading(at=self.at)
                whose, part = parts[has["rank"]]
                whose |= {k: v for k, v in has.items() if k in TARGET_LABELS and not (k == "run" and "_info" in name)}
                kept = tuple((k, v) for k, v in labels if k not in ("rank", "node", "instance", "job"))
                part.values.setdefault(name, {})[kept] = value
        return parts


@dataclass
class Rank:
    """One process of a run: what it says now and said before, or why it does not answer."""

    url: str
    labels: Mapping[str, str] = field(default_factory=dict)  # of the target: rank, node, run
    now: Reading | None = None
    before: Reading | None = None
    why: str | None = None  # it does not answer

    @property
    def name(self) -> str:
        """Its number where that is known, else where it answers."""
        return self.labels.get("rank") or self.url.partition("://")[2].partition("/")[0] or self.url

    @property
    def order(self) -> tuple[int, str]:
        """Ranks by number, then others by name."""
        return (int(self.name) if self.name.isdecimal() and len(self.name) < 9 else 1 << 30, self.name)

    @property
    def seconds(self) -> float | None:
        """Wall time between the two answers, or since the process began."""
        if self.now is None:
            return None
        started = self.now.one("process_start_time_seconds")
        since = self.before.at if self.before else started
        return None if since is None else max(self.now.at - since, 0.0)

    def whole(self) -> "Rank":
        """The same without a before: growths are those of the whole process."""
        return replace(self, before=None)

    def grown(self, name: str, /, **labels: str) -> float:
        """What a counter grew by between the two answers, or since the process began; 0 where there is none."""
        total = (self.now.one(name, **labels) if self.now else None) or 0.0
        old = (self.before.one(name, **labels) if self.before else None) or 0.0
        return _growth(total, old)

    def grown_by(self, name: str, label: str) -> dict[str, float]:
        """The same for each member of a label."""
        members = self.now.by(name, label) if self.now else {}
        old = self.before.by(name, label) if self.before else {}
        return {member: _growth(total, old.get(member, 0.0)) for member, total in members.items()}

    def per_step(self, name: str, /, **labels: str) -> float | None:
        """Growth of a counter for each step; None where no step was decided."""
        steps = self.grown("gristmill_steps_total")
        return self.grown(name, **labels) / steps if steps else None


def _growth(total: float, old: float) -> float:
    return total - old if total >= old else total  # it fell: the process was started again


def printable(text: str) -> str:
    """A terminal obeys control characters, wherever they come from."""
    return "".join(c if c.isprintable() else "?" for c in text[:200])
