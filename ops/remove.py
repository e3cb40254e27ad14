"""`gristmill remove`: takedown requests from the command line, and what was done about them, in words or JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import click

from ..shards.takedown import Removal, Wanted, parse_hash, parse_lines, take_down
from .progress import Meter

_UNITS = {"hash": "shards read", "rewrite": "shards written"}


def run_remove(
    place: Path,
    keys: tuple[str, ...],
    urls: tuple[str, ...],
    hashes: tuple[str, ...],
    listed: Iterable[str] | None,
    reason: str,
    *,
    rewrite: bool,
    as_json: bool,
) -> int:
    """Remove and print what was done; returns the exit code, 0. Raises GristmillError for what a user can mend."""
    wanted = Wanted(list(keys), list(urls), [parse_hash(text) for text in hashes])
    if listed is not None:
        more = parse_lines(listed)
        wanted = Wanted(wanted.keys + more.keys, wanted.addresses + more.addresses, wanted.hashes + more.hashes)
    if not wanted and not rewrite:
        raise click.UsageError("name at least one key, --url or --hash, or a list of them with --from")
    meters: dict[str, Meter] = {}

    def progress(what: str, done: int, total: int) -> None:
        if what not in meters:
            meters[what] = Meter(f"remove: {what}", total, unit=_UNITS[what], quiet=as_json)
            meters[what].__enter__()
        meters[what](done, total)
        if done == total:
            meters.pop(what).__exit__(None, None, None)

    try:
        report = take_down(place, wanted, reason, erase=rewrite, progress=progress)
    finally:
        for meter in meters.values():
            meter.__exit__(None, None, None)
    if as_json:
        click.echo(json.dumps(as_dict(report, rewrite)))
    else:
        click.echo("\n".join(told(place, report, rewrite)))
    return 0


def as_dict(report: Removal, rewrite: bool) -> dict[str, object]:
    """The report for JSON."""
    about: dict[str, object] = {"removed": report.removed, "total": report.total}
    if report.notes:
        about["notes"] = report.notes
    if rewrite or report.digests:
        about["rewritten"] = {
            **{"samples": report.erased, "shards": report.shards, "bytes": report.freed},
            **{"forgotten": report.forgotten, "digests": [list(pair) for pair in report.digests]},
        }
    return about


def told(place: Path, report: Removal, rewrite: bool) -> list[str]:
    """The report in lines."""
    lines = list(report.notes)
    lines.append(f"{place}: {report.removed} newly removed, {report.total} of {report.samples} in all")
    if report.digests:
        lines.append(
            f"rewritten: {report.erased} samples erased from {report.shards} shards, {report.freed / 1e6:,.1f} MB freed, "
            f"{report.forgotten} rows of the ledger forgotten"
        )
        lines += [
            f"the data set is another one now: {before[:12]} was, {after[:12]} is. Runs that were started on the old one "
            "cannot be resumed on it"
            for before, after in report.digests
        ]
        lines.append("copies elsewhere are not reached: sources, caches, backups, run folders (captures, crops)")
    elif rewrite:
        lines.append(f"nothing to rewrite; {report.forgotten} rows of the ledger forgotten")
    elif report.total:
        lines.append("their bytes are still in the shards: --rewrite erases them")
    return lines
