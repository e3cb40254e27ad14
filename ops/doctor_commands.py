"""The command `gristmill doctor`. Imports happen when it runs."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import click

from .commands import FOLDER, example, main
from .doctor.finding import PORT


@main.command(
    epilog=example(
        "gristmill doctor",
        "gristmill doctor --data shards/train --out runs/first",
        "gristmill doctor --data https://host/set --cache /scratch/cache --peers node2,node3",
        "gristmill doctor --only dali --only communication --timeout 300",
        "gristmill doctor --json | jq '.findings[] | select(.state == \"bad\") | .remedy'",
        "torchrun --nproc-per-node 8 -m gristmill.ops.cli doctor --out /shared/runs/first",
        "srun gristmill doctor --out /shared/runs/first         all ranks look, rank 0 prints",
    )
)
@click.option("--data", metavar="URL|DIR", help="Data set: does it open, and how fast do its bytes come?")
@click.option(
    "--out", type=FOLDER, help="Run folder: room, speed and locks of its disk; in a group, do all ranks see it?"
)
@click.option("--cache", type=FOLDER, help="Folder of stream.cache: the same.")
@click.option("--peers", metavar="HOST[:PORT],...", help="Other hosts: do they answer?")
@click.option(
    "--port", type=click.IntRange(1, 65535), default=PORT, show_default=True, help="Where metrics would be served."
)
@click.option(
    "--only", multiple=True, metavar="NAME", help="One check only, by its name in the table; can be given again."
)
@click.option(
    "--timeout", type=click.FloatRange(1, 3600), default=120.0, show_default=True, help="Seconds for one check."
)
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def doctor(
    data: str | None, out: Path | None, cache: Path | None, peers: str | None, port: int, only: tuple[str, ...],
    timeout: float, as_json: bool,
) -> None:  # fmt: skip
    """Look whether this machine can train, and say what to do where not: versions, GPUs, disks, network, limits.

    Inside torchrun, srun and the like all ranks look and talk to each other, and rank 0 prints for all. Exit code 0 if
    nothing is bad, 1 if something is, 2 for a mistake.
    """
    from rich.console import Console

    from .doctor import Asked, Finding, worst
    from .doctor.runner import NAMES, chosen, examine
    from .doctor.table import show
    from .launch_place import environment

    if strange := list(chosen(only)):
        raise click.UsageError(f"--only {strange[0]}: there is no such check; there are {', '.join(NAMES)}")
    place = environment(os.environ)
    folders = {"out": str(out) if out else None, "cache": str(cache) if cache else None}
    hosts = tuple(filter(None, (host.strip() for host in (peers or "").split(","))))
    asked = Asked(
        data=data,
        peers=hosts,
        port=port,
        seconds=timeout,
        local_world=place.local_world,
        grouped=place.world > 1,
        **folders,
    )

    def tell(findings: list[Finding]) -> None:
        if as_json:
            trees = [finding.as_dict() for finding in findings]
            click.echo(json.dumps({"state": worst(findings), "world": place.world, "findings": trees}))
        else:
            show(findings, Console(), place.world)

    if place.world > 1:
        from .doctor.group import examine_group

        code, stuck = examine_group(place, asked, only, tell)
        if stuck:  # a thread that waits for somebody who never comes would keep this process
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        sys.exit(code)
    console = Console(stderr=True)
    with console.status("looking") as status:
        told = lambda name: status.update(f"looking at {name}") if name else None  # noqa: E731
        findings = examine(asked, only, told=told)
    tell(findings)
    sys.exit(int(worst(findings) == "bad"))
