"""Commands that keep data in order: remove, stats, verify. Imports happen when they run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from .commands import FOLDER, example, main


@main.command(
    epilog=example(
        "gristmill remove shards/train 000123 000456 --reason 'asked for by their owner'",
        "gristmill remove crawl --url https://example.org/me.jpg --reason 'ticket 17' --rewrite",
        "gristmill remove crawl --hash sha256:9f86d081884c7d65...f00a08 --reason 'ticket 18'",
        "gristmill remove crawl --from list.txt --reason 'opt-outs of May' --json",
        "gristmill remove crawl --rewrite --reason 'erase all that was removed so far'",
    )
)
@click.argument("data", type=FOLDER)
@click.argument("keys", nargs=-1, metavar="[KEY]...")
@click.option("--url", "urls", multiple=True, help="What came from there, by the ledger; a locator does, too.")
@click.option(
    "--hash", "hashes", multiple=True, metavar="HEX",
    help="32 digits: blake2b-128 of the source's bytes, the key; 40: sha1, 64: sha256 of the stored bytes, md5:HEX too. "
    "All but the first read every shard.",
)  # fmt: skip
@click.option("--from", "listed", type=click.File(), help="A text file: a key, a url or kind:hash a line.")
@click.option("--reason", required=True, help="Why; it is kept beside each.")
@click.option(
    "--rewrite", is_flag=True, help="Erase: write shards anew without all that is removed, forget where it came from."
)
@click.option("--json", "as_json", is_flag=True, help="Print the counts as JSON.")
def remove(data: Path, **given: Any) -> None:
    """Remove samples for good: no run reads them from its next start on, and others take their slots.

    DATA is a data set, or the folder above (train and probe). All is found before anything is removed: a key, url or hash
    that is not known is an error. The shards stay as they are, and every run goes on.

    With --rewrite no byte of a removed image stays in DATA, and the ledger forgets its address, captions and classes; key
    and fingerprint stay, so that it never comes in again. The data set is ANOTHER ONE then: positions shift, cursors of runs
    that read it no longer fit, and runs under way lose shards under their hands: stop them first, and start new ones.
    Killed, the same command finishes it.
    """
    from .remove import run_remove

    sys.exit(run_remove(data, **given))


@main.command(
    epilog=example(
        "gristmill stats shards",
        "gristmill stats shards/train --sheet look.html --images 200",
        "gristmill stats crawl --quarantine runs/today --json",
    )
)
@click.argument("data", type=FOLDER)
@click.option("--sheet", type=click.Path(path_type=Path), help="Write a contact sheet, *.html or *.png.")
@click.option("--images", type=click.IntRange(1, 2000), default=60, show_default=True, help="Pictures on it.")
@click.option("--quarantine", type=FOLDER, help="A run, or its quarantine.jsonl: what it found damaged.")
@click.option(
    "--top", type=click.IntRange(1), default=10, show_default=True, help="Sources, groups and reasons to list."
)
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def stats(data: Path, **given: Any) -> None:
    """What is in there: counts, sizes, formats, shards, sources, duplicates, what was removed, and pictures.

    DATA is a data set, or the folder above (train and probe). Sources, duplicates and outcomes come from the ledger that
    `gristmill ingest` left; other data sets have the rest. Sizes in pixels need a deep index.
    """
    from .stats import run_stats

    sys.exit(run_stats(data, **given))


@main.command(
    epilog=example(
        "gristmill verify shards/train",
        "gristmill verify crawl --deep --workers 8 --json",
        "gristmill verify crawl/train --repair repaired",
    )
)
@click.argument("data", type=FOLDER)
@click.option("--deep", is_flag=True, help="Read every image: checksum and decode.")
@click.option("--repair", "into", type=FOLDER, metavar="OUT", help="Write all that is sound into this new folder.")
@click.option("--workers", type=click.IntRange(1), help="Shards looked at together (default: one a core).")
@click.option("--again", is_flag=True, help="Start over where an interrupted check would be gone on with.")
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def verify(data: Path, **given: Any) -> None:
    """Compare shards with their manifest; exit 1 with a list when something is wrong.

    DATA is a data set, or the folder above (train and probe). Shallow: files, sizes, headers. Deep: every image too. An
    interrupted check goes on where it was; one that came to its end starts anew.

    --repair looks deep, and writes to OUT what can be saved: sound shards as they are, of damaged ones the sound samples,
    without removed ones. OUT/repair.json and lost.tsv say what was lost; DATA is never touched; exit 1 all the same if
    something was wrong. Killed, the same command goes on.
    """
    from .verify import run_verify

    sys.exit(run_verify(data, **given))
