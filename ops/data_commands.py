"""Commands about data at rest: ingest, index, verify, remove, and who sees what of it. Imports happen when they run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from .commands import FOLDER, example, main


@main.command(
    epilog=example(
        "gristmill ingest ~/Pictures --out shards", "gristmill ingest ~/Pictures --out shards --holdout 0.2 --json"
    )
)
@click.argument("source", type=FOLDER)
@click.option("--out", type=FOLDER, required=True, help="Folder for the shards; `train` (and `probe`) are made inside.")
@click.option("--shard-samples", type=click.IntRange(1), default=1024, show_default=True, help="Images in a shard.")
@click.option(
    "--holdout", type=click.FloatRange(0, 0.9), default=0.0, show_default=True, help="Share kept apart for probes."
)
@click.option("--json", "as_json", is_flag=True, help="Print the counts as JSON.")
def ingest(source: Path, out: Path, shard_samples: int, holdout: float, as_json: bool) -> None:
    """A folder of images becomes WebDataset shards with a manifest.

    Every image is decoded once to check it; what does not decode is listed in OUT/skipped.tsv. Duplicates are kept once.
    """
    from ..shards.engine import ingest as run
    from .progress import Meter

    with Meter("ingest", 0, quiet=as_json) as meter:
        report = run(source, out, shard_samples=shard_samples, holdout=holdout, progress=meter)
    if as_json:
        click.echo(json.dumps(report.as_dict()))
    else:
        click.echo(report.summary())


@main.command(epilog=example("gristmill verify shards/train", "gristmill verify shards/train --deep --json"))
@click.argument("folder", type=FOLDER)
@click.option("--deep", is_flag=True, help="Read every image: checksum and decode.")
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def verify(folder: Path, deep: bool, as_json: bool) -> None:
    """Compare shards with their manifest; exit 1 with a list when something is wrong."""
    from ..shards.verify import verify as run

    findings = run(folder, deep=deep)
    if as_json:
        click.echo(json.dumps([vars(finding) for finding in findings]))
    else:
        for finding in findings:
            click.echo(f"{finding.shard}  {finding.key or '-'}  {finding.problem}")
        click.echo(f"{folder}: {len(findings)} findings" if findings else f"{folder}: all in order")
    sys.exit(1 if findings else 0)


@main.command(
    epilog=example(
        "gristmill order shards/train --step 1000 --batch 256 --ranks 8",
        "gristmill order shards/train --prove --quality",
        "gristmill order crawl archive --weight 3 --weight 1 --where 'width >= 256' --json",
    )
)
@click.argument("folders", type=FOLDER, nargs=-1, required=True, metavar="FOLDER...")
@click.option("--step", type=click.IntRange(0), default=0, show_default=True, help="Which step to show.")
@click.option("--batch", type=click.IntRange(1), default=64, show_default=True, help="Images a step, over all ranks.")
@click.option("--ranks", type=click.IntRange(1), default=1, show_default=True, help="Processes that share the batch.")
@click.option(
    "--ranks-per-node", type=click.IntRange(1), help="Of these on a node, for its working set (default: all)."
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="The recipe's seed.")
@click.option("--lanes", type=click.IntRange(1), help="The recipe's stream.lanes (default: as suits the data).")
@click.option("--window", type=click.IntRange(1), help="The recipe's stream.window (default: as suits the data).")
@click.option(
    "--where", default="", help="Only the samples for which this holds: 'width >= 256 and format == \"jpg\"'."
)
@click.option("--weight", "weights", type=click.FloatRange(0), multiple=True, help="One for each FOLDER, to mix them.")
@click.option("--prove", is_flag=True, help="Walk one epoch and show that every image comes exactly once.")
@click.option("--quality", is_flag=True, help="Measure the shuffling and the working set, beside the usual ways.")
@click.option("--cache", type=click.IntRange(1), help="Bytes of a node's cache; exit 1 if the working set exceeds it.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def order(
    folders: tuple[Path, ...], lanes: int | None, window: int | None, weights: tuple[float, ...], **options: Any
) -> None:
    """Who sees what: the images of one step, rank by rank; how well they are mixed, and proof of exactly-once."""
    from .look import show_order, suggested

    sys.exit(
        show_order(list(folders), weights=weights, **suggested(folders, lanes, window, options["cache"]), **options)
    )


@main.command(
    epilog=example(
        "gristmill index crawl",
        "gristmill index s3://bucket/{000..127}.tar --out manifest --deep",
        "gristmill index a --idx",
    )
)
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE...")
@click.option("--out", type=FOLDER, help="Folder for the manifest (default: SOURCE, if it is one folder).")
@click.option("--deep", is_flag=True, help="Read every image: checksums, sizes, and whether it decodes.")
@click.option("--idx", is_flag=True, help="Write an index for DALI's own webdataset reader too.")
@click.option("--leave-out", is_flag=True, help="Go on without shards that cannot be indexed, and list them.")
@click.option("--json", "as_json", is_flag=True, help="Print the counts as JSON.")
def index(sources: tuple[str, ...], out: Path | None, deep: bool, idx: bool, leave_out: bool, as_json: bool) -> None:
    """A manifest for WebDataset shards that others made; they stay where and as they are.

    SOURCE is a folder, a .tar, a pattern, a URL (http, https, s3) or a text file with one of these a line.
    """
    from .index import run_index

    sys.exit(run_index(sources, out, deep=deep, idx=idx, leave_out=leave_out, as_json=as_json))


@main.command(
    epilog=example(
        "gristmill remove shards/train 000123 000456 --reason 'asked for by their owner'",
        "gristmill remove shards/train --from keys.txt --reason 'ticket 17'",
    )
)
@click.argument("folder", type=FOLDER)
@click.argument("keys", nargs=-1, metavar="[KEY]...")
@click.option("--from", "listed", type=click.File(), help="A text file with one key a line.")
@click.option("--reason", required=True, help="Why; it is kept beside each.")
@click.option("--json", "as_json", is_flag=True, help="Print the counts as JSON.")
def remove(folder: Path, keys: tuple[str, ...], listed: Any, reason: str, as_json: bool) -> None:
    """Remove samples for good: no run reads them from its next start on, and others take their slots.

    The shards stay as they are. Keys that the data set does not have are an error, and then nothing is removed.
    """
    from ..shards.manifest import Manifest
    from ..shards.tombstones import Tombstones

    wanted = [*keys, *(line.strip() for line in listed or () if line.strip())]
    if not wanted:
        raise click.UsageError("name at least one key, or a file of keys with --from")
    manifest = Manifest.open(folder)
    tombstones = Tombstones.of(manifest)
    new = tombstones.remove(manifest, wanted, reason)
    if as_json:
        click.echo(json.dumps({"removed": new, "total": tombstones.count}))
    else:
        click.echo(f"{folder}: {new} newly removed, {tombstones.count} of {manifest.samples} in all")
