"""One night with many runs: all healthy at first, then each meets its fault, and everything told is written down.

They live side by side under one pair of watchers, since it is waiting that takes time and not training. A fault comes
from within (misfortunes.py) or from here: storage that slows down, bytes that rot, a disk that fills, signals.
"""

from __future__ import annotations

import errno
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from gristmill.ops.bench.endings import tiny_data
from gristmill.ops.monitor import alerts
from gristmill.shards.manifest import Manifest

from ..disks import mounted
from ..faulty_http import FaultyServer
from ..waiting import wait_for
from ..workers import Workers
from .runs import PACE, Running
from .watchers import Notice, Watchers, watchers

SCALES = (1 / 75, 1 / 25)  # a minute of the rules passes in 0.8 seconds; in 2.4 where the machine is busy elsewhere
SCRAPE = 37.5  # seconds, to be scaled, between two scrapes
WARM = 10 * 60.0  # seconds, to be scaled, of good steps before the faults come: the windows of rates are full
AFTER = 48 * 60.0  # seconds, to be scaled, for which everything is watched from the faults on
ENDED = 35  # steps of the run that ends well in that time
CALM = 0.6  # share of its pace that a run without a fault keeps where nothing disturbs it
START = 240.0  # seconds for all runs to begin, on a machine that is busy


class Case(NamedTuple):
    """A run: what befalls it, in words, what has to be told, in any order, and how its ranks end; None: they do not."""

    what: str
    told: frozenset[str]
    codes: tuple[int | None, ...] = (None,)

    @property
    def world(self) -> int:
        return len(self.codes)


CASES = {
    "healthy": Case("nothing", frozenset()),
    "ended": Case("nothing; it ends well", frozenset(), (0,)),
    "slow": Case("each request to the storage takes long", frozenset({"GristmillStarvedByStorage"})),
    "damaged": Case("a shard's bytes rot", frozenset({"GristmillDataDamaged"})),
    "collapsed": Case("all prototypes become one", frozenset({"GristmillCollapseUniform"})),
    "frozen": Case("the teacher is never updated", frozenset({"GristmillTeacherFrozen"})),
    "poisoned": Case("pixels that are no numbers in six batches", frozenset({"GristmillBadSteps"})),
    "hung": Case("a step does not end", frozenset({"GristmillNoProgress"})),
    "full": Case("the checkpoints' disk is full", frozenset({"GristmillDiskFull"})),
    "killed": Case("kill -9 of one rank of two", frozenset({"GristmillRanksMissing"}), (76, -signal.SIGKILL)),
    "stopped": Case("SIGSTOP of one rank of two", frozenset({"GristmillRanksMissing"}), (None, None)),
    "straggling": Case("one rank of two is slower", frozenset({"GristmillStraggler"}), (None, None)),
}


@dataclass
class Night:
    """What happened: when each run met its fault (by time.time()), how its ranks ended, and all that arrived."""

    scale: float
    told: list[Notice] = field(default_factory=list)
    late: dict[str, float] = field(default_factory=dict)  # seconds by which alerts are held longer than scaled
    runs: dict[str, Running] = field(default_factory=dict)
    struck: dict[str, float] = field(default_factory=dict)
    codes: dict[str, list[int | None]] = field(default_factory=dict)
    rules: list[str] = field(default_factory=list)  # what Prometheus had to say against its rules
    stands: list[dict[str, Any]] = field(default_factory=list)  # alerts as Prometheus had them at the end
    disk: Path = Path()  # where the run "full" keeps its checkpoints
    no_disk: str = ""  # why no small disk could be mounted, if so
    disturbed: str = ""  # how other work on this machine slowed a run that has no fault

    def fill(self) -> None:
        """Take all that is free on that disk, whatever the run itself writes or removes there meanwhile."""
        if self.no_disk:
            return
        with (self.disk / "filler").open("ab", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(2**16))
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise

    def notices(self, run: str) -> list[Notice]:
        return [one for one in self.told if one.labels.get("run") == run]

    def fired(self, run: str) -> dict[str, float]:
        """Alerts that fired for this run, and how many seconds after its fault each was told first."""
        first: dict[str, float] = {}
        for one in self.notices(run):
            if one.firing:
                first.setdefault(one.name, one.at - self.struck[run])
        return first

    def wrong(self) -> list[str]:
        """Runs of which something else was told than should be, or too early, or whose ranks did not end as they should."""
        found = []
        for name, case in CASES.items():
            shown = name != "full" or not self.no_disk
            early = any(one.at < self.struck[name] for one in self.notices(name))
            told = set(self.fired(name)) == case.told or not shown
            if early or not told or self.codes[name] != list(case.codes):
                found.append(name)
        return found

    def story(self, run: str) -> str:
        """All that is known about a run, for the message of a failure."""
        told = [
            f"{one.at - self.struck[run]:6.1f} s  {one.name} {'fires' if one.firing else 'ends'}"
            for one in self.notices(run)
        ]
        stands = [
            f"at the end {one['labels']['alertname']} is {one['state']}, value {one['value']}"
            for one in self.stands
            if one["labels"].get("run") == run
        ]
        return "\n".join([f"{run}: {CASES[run].what}", *told, *stands, self.runs[run].errors()])

    def table(self) -> str:
        """As Markdown: fault, alert, seconds until it was told, and minutes in a run whose time passes as it does."""
        lines = [
            f"| run | fault | alert told | after, at a scale of 1/{1 / self.scale:.0f} | at scale 1 |",
            "|---|---|---|---|---|",
        ]
        for name, case in CASES.items():
            fired = self.fired(name)
            for alert, seconds in fired.items():
                minutes = (seconds - self.late.get(alert, 0.0)) / self.scale / 60
                lines.append(f"| {name} | {case.what} | {alert} | {seconds:.1f} s | {minutes:.0f} min |")
            if not fired:
                lines.append(f"| {name} | {case.what} | none | | |")
        return "\n".join([*lines, ""])


@contextmanager
def night_of(folder: Path, workers: Workers, scale: float) -> Iterator[Night]:
    """All of it, under `folder`; at the end of the block nothing of it runs any more."""
    with ExitStack() as stack:
        data = tiny_data(folder / "tiny")
        (targets := folder / "targets").mkdir()
        watch = stack.enter_context(watchers(folder / "watchers", targets, scale=scale, scrape=SCRAPE * scale))
        night = Night(scale, watch.inbox.notices, watch.late)
        files = {f"/{path.relative_to(data)}": path.read_bytes() for path in data.rglob("*") if path.is_file()}
        server = stack.enter_context(FaultyServer(files))
        rotten = Path(shutil.copytree(data, folder / "rotten"))
        night.disk = folder / "full" / "checkpoints"
        night.no_disk = stack.enter_context(mounted(night.disk, "32m"))
        sources = {"slow": server.url(""), "damaged": rotten}
        steps = int((WARM + 3 * AFTER) * scale / PACE)  # a night's, and some more
        for name, case in CASES.items():
            own = [f"images={8 * (ENDED if name == 'ended' else steps)}", f"metrics.targets={targets}"]
            run = Running(workers, folder, name, sources.get(name, data), world=case.world, more=own)
            stack.callback(run.kill)
            night.runs[name] = run
        _until_all_train(night, watch)

        strikes: dict[str, Callable[[], object]] = {
            "slow": lambda: setattr(server, "hold", 1.5),
            "damaged": lambda: _rot(rotten),
            "killed": lambda: night.runs["killed"].signal(1, signal.SIGKILL),
            "stopped": lambda: night.runs["stopped"].signal(1, signal.SIGSTOP),
            "full": night.fill,
        }
        for name, run in night.runs.items():
            night.struck[name] = time.time()
            strikes.get(name, run.strike)()
        _until_all_is_told(night)
        night.codes = {name: run.codes() for name, run in night.runs.items()}
        night.stands = watch.alerts()
        night.rules = [f"{rule['name']}: {rule['lastError']}" for rule in watch.rules() if rule["health"] != "ok"]
        night.disturbed = _disturbed(watch, time.time() - min(night.struck.values()))
        yield night


def _until_all_train(night: Night, watch: Watchers) -> None:
    """Until all ranks have made steps for as long as the rules' windows reach back."""
    ranks = sum(case.world for case in CASES.values())

    def train() -> bool:
        for name, run in night.runs.items():
            assert all(code is None or (code, name) == (0, "ended") for code in run.codes()), run.errors()
        return len(watch.query("max_over_time(gristmill_steps_total[10m]) > 8")) == ranks

    wait_for(train, START, "all runs train", every=0.1)
    until = time.monotonic() + WARM * night.scale
    wait_for(lambda: time.monotonic() > until and train(), START, "all runs go on", every=0.1)


def _until_all_is_told(night: Night) -> None:
    """For as long as alerts may take; somewhat longer where some that should come have not."""
    until = time.monotonic() + AFTER * night.scale

    def told() -> bool:
        night.fill()  # a checkpoint that was removed after the first time made room again
        left = until - time.monotonic()
        if left > 0:
            return False
        missing = any(not case.told <= set(night.fired(name)) for name, case in CASES.items())
        return not missing or left < -AFTER * night.scale / 2

    wait_for(told, START + 2 * AFTER * night.scale, "the end of the night", every=0.1)


def _disturbed(watch: Watchers, seconds: float) -> str:
    """How far this machine kept a healthy run from its pace, or Prometheus from asking it, for the last so many seconds."""
    often, healthy = alerts.duration(seconds), '{run="healthy"}'
    lost = 1 - float(watch.query(f"avg_over_time(up{healthy}[{often}])")[0]["value"][1])
    steps = float(watch.query(f"min_over_time(rate(gristmill_steps_total{healthy}[8s])[{often}:1s])")[0]["value"][1])
    if lost or steps * PACE < CALM:
        return f"{lost:.0%} of scrapes were lost, and {steps:.2f} steps a second made where {1 / PACE:.2f} were due"
    return ""


def _rot(data: Path) -> None:
    """Of each shard, the first bytes of three samples change in place."""
    manifest = Manifest.open(data)
    for shard in range(len(manifest.urls)):
        with manifest.path(shard).open("r+b") as file:
            for offset in manifest.rows(shard).offset[3:6]:
                file.seek(int(offset))
                file.write(bytes(64))
