"""`gristmill index`: a manifest for shards that others made, which stay where and as they are.

The manifest goes into the folder of the shards, so that they can be moved together, or wherever `--out` says: the only
way for urls, lists and folders that cannot be written.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import click

from ..shards.foreign import IndexingError, index_dataset
from ..shards.places import find_shards
from .progress import Meter


def run_index(
    sources: Sequence[str],
    out: Path | None,
    *,
    deep: bool = False,
    idx: bool = False,
    leave_out: bool = False,
    as_json: bool = False,
    threads: int | None = None,
) -> int:
    """Index the shards named by `sources` (folders, tars, lists, patterns, urls) and print what was found.

    Returns the exit code, 0. Raises GristmillError for what a user can mend; shards that cannot be indexed are all named
    in one error, unless `leave_out`.
    """
    places = find_shards(sources)
    if out is None:
        if len(sources) != 1 or not Path(sources[0]).is_dir():
            raise IndexingError("where should the manifest go? Name a folder with --out, or give one folder of shards")
        out = Path(sources[0])
    with Meter("index", len(places), unit="shards", quiet=as_json) as meter:
        report = index_dataset(places, out, deep=deep, idx=idx, leave_out=leave_out, threads=threads, progress=meter)
    click.echo(json.dumps(report.as_dict()) if as_json else report.summary())
    return 0
