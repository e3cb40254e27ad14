"""Commands that watch runs: status, and what a Prometheus, an Alertmanager and a Grafana need to do so."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from .commands import FOLDER, example, main


@main.command(
    epilog=example(
        "gristmill status runs/first",
        "gristmill status                                   the newest run below this folder",
        "gristmill status node1:9464 node2:9464 --once",
        "gristmill status runs/first --json | jq '.runs[0].progress.ratio'",
        "gristmill status runs/first --check                for cron and probes: exit code 1 if it pages",
    )
)
@click.argument("targets", nargs=-1, metavar="[RUN|URL]...")
@click.option("--once", is_flag=True, help="Print one view and leave.")
@click.option("--json", "as_json", is_flag=True, help="Print the values as JSON and leave.")
@click.option("--check", is_flag=True, help="Like --once, and exit code 1 where an alert that pages would fire.")
@click.option(
    "--over",
    type=click.FloatRange(0, 3600),
    metavar="SECONDS",
    help="What the rates of one view are taken over; 0: the whole process.  [default: about five steps, 1 to 10 s]",
)
@click.option("--prometheus", metavar="URL", help="Show the alerts that this Prometheus has pending or firing, too.")
@click.option("--ca", type=click.Path(exists=True, dir_okay=False), help="Authority of the exporters' certificates.")
@click.option("--cert", type=click.Path(exists=True, dir_okay=False), help="Our own certificate, where they want one.")
@click.option("--key", type=click.Path(exists=True, dir_okay=False), help="Its key.")
def status(
    targets: tuple[str, ...],
    once: bool,
    as_json: bool,
    check: bool,
    over: float | None,
    prometheus: str | None,
    ca: str | None,
    cert: str | None,
    key: str | None,
) -> None:
    """Live view of runs, from their metrics: run folders, folders of Prometheus targets, URLs or host:port of exporters.

    All ranks of a run, the way of the data and what limits it, losses, probes, memories, stragglers, disks, goodput, and
    the alerts that would fire. Exit code 0 if every run answers, 1 if one does not, 2 for a mistake.
    """
    if key and not cert:
        raise click.UsageError("--key without --cert: a key is of no use without its certificate")
    from .monitor.asking import Tls
    from .monitor.status import show_status

    how = {"once": once, "as_json": as_json, "check": check, "over": over, "prometheus": prometheus}
    sys.exit(show_status(targets, **how, tls=Tls(ca, cert, key)))


@main.group()
def monitor() -> None:
    """What Prometheus, Alertmanager and Grafana need to watch runs."""


@monitor.command(epilog=example("gristmill monitor rules --out /etc/prometheus/rules"))
@click.option("--out", type=FOLDER, required=True, help="A folder for gristmill.yml and alertmanager.yml.")
@click.option("--scale", type=click.FloatRange(min=0, min_open=True), default=1.0, hidden=True)
def rules(out: Path, scale: float) -> None:
    """Write the alert rules for Prometheus (gristmill.yml) and the routes for Alertmanager (alertmanager.yml)."""
    from .monitor.alerts import render, render_routes

    _write(out, {"gristmill.yml": render(scale), "alertmanager.yml": render_routes()})


@monitor.command(epilog=example("gristmill monitor dashboards --out /var/lib/grafana/dashboards"))
@click.option("--out", type=FOLDER, required=True, help="A folder for the dashboards, one JSON each.")
def dashboards(out: Path) -> None:
    """Write the dashboards for Grafana."""
    from importlib.resources import files

    folder = files("gristmill.ops.monitor").joinpath("dashboards")
    _write(out, {file.name: file.read_text() for file in folder.iterdir() if file.name.endswith(".json")})


@monitor.command(epilog=example("gristmill monitor reference > metrics.md"))
def reference() -> None:
    """Print what every metric means, as Markdown."""
    from .monitor.reference import render

    click.echo(render(), nl=False)


@monitor.command(epilog=example("gristmill monitor alerts", "gristmill monitor alerts --json"))
@click.option("--json", "as_json", is_flag=True, help="Print them as JSON.")
def alerts(as_json: bool) -> None:
    """List the alerts: how bad each is, what it means, what is likely the cause."""
    import json
    import shutil

    from .monitor.alerts import ALERTS, duration

    if as_json:
        click.echo(json.dumps([alert._asdict() for alert in ALERTS], indent=2))
        return
    width = min(shutil.get_terminal_size((100, 24)).columns, 100)
    for alert in ALERTS:
        hold = f", after {duration(alert.hold)}" if alert.hold else ""
        click.secho(f"{alert.name}  ", bold=True, nl=False)
        click.secho(f"{alert.severity}{hold}", fg="red" if alert.severity == "page" else "yellow")
        for text in (alert.summary, f"Likely: {alert.cause}"):
            click.echo(click.wrap_text(text, width, initial_indent="  ", subsequent_indent="  "))


def _write(out: Path, texts: dict[str, str]) -> None:
    from ..shards.storage import published

    for name, text in sorted(texts.items()):
        try:
            out.mkdir(parents=True, exist_ok=True)
            with published(out / name) as file:
                file.write(text.encode())
        except OSError as error:
            raise click.UsageError(f"{out / name} cannot be written: {error.strerror or error}") from error
        click.echo(f"written: {out / name}")
