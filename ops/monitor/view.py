"""A view of runs over time: every look asks all exporters, and sets what they say against what they said before.

The places are looked up at each look, since a run that restarts has other ports; a process that restarted has no before.
"""

from collections import deque
from collections.abc import Sequence
from typing import Any

from . import asking
from .asking import OPEN, Tls
from .conditions import UNKNOWN, holding
from .places import Place, SilentError, StatusError, locate
from .reading import Rank, Reading
from .summary import summarize

SCHEMA = 1  # of the JSON: another number where a key went or changed its meaning
WINDOW = 15  # looks that rates are taken over
REUSED = "this process began after the run's files named its port: another run"
ORDER = ("ok", "warn", "page", "silent")


class View:
    """What there is to see at `targets` (see `places.locate`). prometheus: a URL whose alerts are shown, too.

    The first look raises StatusError where there is nothing to look at; later ones show what was there as silent.
    """

    def __init__(self, targets: Sequence[str] = (), tls: Tls = OPEN, prometheus: str | None = None):
        self.targets, self.tls, self.prometheus = tuple(targets), tls, prometheus
        self.ended: str | None = None  # why the run no longer runs, if its folder says so
        self._fired: list[dict[str, Any]] | None = None
        self._places = locate(self.targets)
        self._before: dict[tuple[str, str], deque[Reading]] = {}
        self._names: dict[str, str] = {}  # of runs, by URL: one that falls silent keeps its place

    def look(self) -> dict[str, Any]:
        """One look, as the JSON that `gristmill status --json` prints."""
        try:
            self._places, self.ended = locate(self.targets), None
        except SilentError as error:
            self.ended = str(error)
        except StatusError:
            pass  # files come and go while a run starts again
        runs: dict[str, list[tuple[Place, Rank]]] = {}
        for place, rank in asking.look(self._places, self.tls):
            self._remember(rank)
            runs.setdefault(self._group(place, rank), []).append((place, rank))
        for place, rank in runs.pop("", []):  # it never answered: of the one run that the other URLs are of, or of none
            of = set(self._names.values())
            runs.setdefault(of.copy().pop() if len(of) == 1 else rank.name, []).append((place, rank))
        told = [self._run(name, found) for name, found in runs.items()]
        fired = self._alerts()
        states = [run["verdict"] for run in told]
        known = all("run" in rank.labels for found in runs.values() for _, rank in found)  # what Prometheus calls them
        names = {run["run"] for run in told}
        states += [
            one["severity"]
            for one in fired or []
            if one["state"] == "firing" and (not known or one["labels"].get("run") in {None, *names})
        ]
        return {
            "schema": SCHEMA,
            "state": max((state for state in states if state in ORDER), key=ORDER.index, default="ok"),
            "runs": told,
            "unchecked": sorted(UNKNOWN),
            "prometheus": fired,
        }

    def _alerts(self) -> list[dict[str, Any]] | None:
        """What Prometheus has; one that answered before and does not now is no reason to end a view."""
        if self.prometheus is None:
            return None
        try:
            self._fired = asking.alerts(self.prometheus, self.tls)
        except StatusError:
            if self._fired is None:
                raise
        return self._fired

    def _remember(self, rank: Rank) -> None:
        if rank.now is None:
            return
        seen = self._before.setdefault((rank.url, rank.name), deque(maxlen=WINDOW))
        start = "process_start_time_seconds"
        if seen and (seen[-1].one(start) != rank.now.one(start) or seen[-1].info() != rank.now.info()):
            seen.clear()
        rank.before = seen[0] if seen else None
        seen.append(rank.now)

    def _group(self, place: Place, rank: Rank) -> str:
        if place.group:
            return place.group
        if rank.now is not None:
            self._names[rank.url] = rank.now.info().get("run", "?")
        return self._names.get(rank.url, "")

    def _run(self, name: str, found: list[tuple[Place, Rank]]) -> dict[str, Any]:
        ranks = [rank for _, rank in found]
        notes = {REUSED for place, rank in found if _reused(place, rank)}
        run = summarize(name, ranks, sorted(notes))
        run["alerts"] = holding(run, ranks, all(place.complete for place, _ in found))
        severities = {alert["severity"] for alert in run["alerts"] if alert["masked_by"] is None}
        silent = not run["ranks"]["answering"]
        run["verdict"] = "silent" if silent else max(severities, key=ORDER.index, default="ok")
        return run


def _reused(place: Place, rank: Rank) -> bool:
    started = rank.now.one("process_start_time_seconds") if rank.now else None
    return place.written is not None and started is not None and started > place.written + 2.0
