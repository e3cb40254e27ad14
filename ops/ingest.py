"""`gristmill ingest`: progress while it runs, a table at the end in which outcomes sum to inputs, metrics if asked for."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from typing import Any

from prometheus_client import CollectorRegistry
from rich.console import Console
from rich.table import Table

from ..shards.ingest import IngestConfig, IngestReport, IngestStats, Outcome, ingest
from .monitor.exporter import Exporter
from .monitor.intake import IngestCollector
from .progress import Meter

RESUMABLE = 75  # EX_TEMPFAIL: the same command goes on
_MEANING = {
    Outcome.KEPT: "in the data set",
    Outcome.DUPLICATE: "the same bytes came earlier",
    Outcome.NEAR_DUPLICATE: "looks like an earlier one",
    Outcome.FILTERED: "left out by your filter",
    Outcome.TOO_SMALL: "under --min-side or the like",
    Outcome.TOO_LARGE: "too many bytes",
    Outcome.TOO_MANY_PIXELS: "over --max-pixels; not decoded",
    Outcome.ASPECT: "over --max-aspect",
    Outcome.NOT_AN_IMAGE: "no image",
    Outcome.BROKEN: "does not decode",
    Outcome.UNREADABLE: "file, member or row cannot be read",
    Outcome.BAD_URL: "no http or https url",
    Outcome.BLOCKED_ADDRESS: "private or otherwise not of the public web",
    Outcome.OPTED_OUT: "X-Robots-Tag says no",
    Outcome.GONE: "404, 403 and the like",
    Outcome.NO_HOST: "name is not known",
    Outcome.NO_CONNECTION: "host does not answer",
    Outcome.TIMED_OUT: "too slow",
    Outcome.CUT: "connection lost",
    Outcome.SERVER_ERROR: "5xx, 429",
    Outcome.REDIRECTS: "too many redirects",
}


def _exporter(registry: CollectorRegistry, port: int) -> Exporter:
    """Metrics of an ingest, and the page for people at `/`."""
    from .monitor.board import board

    pages, ticks = board(registry, names=("ingest",))
    return Exporter(registry, port, pages=pages, ticks=ticks)


class _Interrupted(BaseException):
    """SIGTERM or Ctrl-C."""


def run_ingest(
    sources: Sequence[str], out: str, config: IngestConfig, *, as_json: bool, metrics_port: int | None, **how: Any
) -> int:
    """Ingest and print what became of the inputs; returns the exit code: 0, or 75 when it was interrupted."""
    stats: list[IngestStats] = []
    told: list[bool] = []

    def stop(*_: object) -> None:
        told.append(True)  # what is raised where Python cannot pass it on (in a callback of the collector) is lost
        raise _Interrupted

    unraisable = sys.unraisablehook

    def lost(what: Any) -> None:
        if what.exc_type is not _Interrupted:  # which the next look at `told` raises again
            unraisable(what)

    sys.unraisablehook = lost
    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    registry = CollectorRegistry()
    registry.register(IngestCollector(lambda: stats[0] if stats else None))
    exporter = nullcontext() if metrics_port is None else _exporter(registry, metrics_port)
    try:
        with exporter as serving, Meter("ingest", 0, unit="inputs", quiet=as_json) as meter:
            if serving is not None:
                meter.note(f"metrics: {serving.url}")

            def progress(now: IngestStats) -> None:
                if told:
                    raise _Interrupted
                if not stats:
                    stats.append(now)
                meter(now.decided, now.inputs, now.line())

            report = ingest(sources, out, config, progress=progress, **how)
    except (KeyboardInterrupt, _Interrupted):
        with suppress(OSError):
            Console(stderr=True).print(
                "interrupted: give the same command again, it goes on where it was", style="yellow"
            )
        return RESUMABLE
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        sys.unraisablehook = unraisable
    if as_json:
        print(json.dumps(report.as_dict()))
    else:
        show(report, out)
    return 0


def show(report: IngestReport, out: str) -> None:
    """The table at the end."""
    console = Console(highlight=False)
    table = Table(box=None, pad_edge=False)
    for name, justify in (("outcome", "left"), ("inputs", "right"), ("share", "right"), ("", "left")):
        table.add_column(name, justify=justify)  # pyright: ignore[reportArgumentType]
    for outcome, count in sorted(report.outcomes.items(), key=lambda item: (item[0] != Outcome.KEPT, -item[1])):
        table.add_row(outcome, f"{count:,}", f"{count / max(1, report.inputs):.1%}", _MEANING.get(Outcome(outcome), ""))
    table.add_row("sum", f"{report.inputs:,}", "100.0%", "every input is in the ledger")
    console.print(table)
    if report.colours:
        told = ", ".join(f"{count:,} {kind}" for kind, count in sorted(report.colours.items()))
        console.print(f"of them no plain RGB, and brought to it when decoded: {told}", soft_wrap=True)
    for reason, count in sorted(report.changed.items()):
        console.print(f"{count:,} of them not as they came: {reason}", soft_wrap=True)
    reasons = [f"{reason} ({count:,})" for reason, count in report.details.items()][:5]
    if reasons:
        console.print("largest reasons: " + "; ".join(reasons), soft_wrap=True)
    if report.hosts:
        worst = ", ".join(f"{host} ({count:,})" for host, count in list(report.hosts.items())[:5])
        console.print(f"hosts that failed most: {worst}", soft_wrap=True)
    where = f"{report.train:,} to train" + (f", {report.probe:,} to probe" if report.probe else "")
    console.print(
        f"{out}: {report.accepted:,} new images ({where}) in {report.shards:,} shards of {report.bytes / 1e6:,.1f} MB; "
        f"{report.samples:,} in all; {(report.inputs - report.earlier) / max(1e-9, report.seconds):,.0f} inputs/s",
        soft_wrap=True,
    )
