"""Commands about data at rest: index, and who sees what of it. Imports happen when they run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from .commands import FOLDER, example, main


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
