"""`gristmill stats`: what a census counted, as tables for people and JSON for machines, and a sheet of pictures."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..shards.census import ASPECTS, SIDES, Census, take_census
from ..shards.collection import open_collection
from ..shards.manifest import Manifest
from .progress import Meter


def run_stats(place: Path, *, sheet: Path | None, images: int, quarantine: Path | None, top: int, as_json: bool) -> int:
    """Count, print, and write the sheet if one is asked for. Returns 0, or 1 where rows or sums are not in order."""
    found = open_collection(place)
    if sheet is not None:
        from .specimens import check_target

        check_target(sheet)
    shards = sum(len(Manifest.open(part).urls) for part in found.parts)
    with Meter("stats", shards, unit="shards", quiet=as_json) as meter:
        census = take_census(found, quarantine=quarantine, progress=meter)
    about = as_dict(census, top)
    if sheet is not None:
        from .specimens import write_sheet

        about["sheet"] = {"out": str(sheet), "images": write_sheet(sheet, found, census, images, sections(census, top))}
    if as_json:
        click.echo(json.dumps(about))
    else:
        show(place, census, top)
        if sheet is not None:
            click.echo(f"written: {sheet}, {about['sheet']['images']} images")
    return 0 if not census.unreadable and (census.ledger is None or census.ledger.sums) else 1


def as_dict(census: Census, top: int) -> dict[str, Any]:
    """Everything for JSON."""
    about: dict[str, Any] = {
        "data": census.digests,
        "samples": census.samples,
        "removed": {"tombstones": census.removed.total(), "erased": census.erased.total()},
        "bytes": census.bytes,
        "shards": {"count": census.shards, "samples": census.shard_samples, "bytes": census.shard_bytes},
        "formats": dict(census.formats.most_common()),
        "image_bytes": census.lengths.as_dict(),
        "width": census.widths.as_dict(),
        "height": census.heights.as_dict(),
        "shorter_side": dict(zip(_bins(SIDES), census.sides.tolist(), strict=True)),
        "aspect": dict(zip(_bins(ASPECTS), census.aspects.tolist(), strict=True)),
        "orientation": dict(census.upright),
        "without_size": census.unsized,
        "not_decoded": census.undecoded,
        "unreadable": census.unreadable,
    }
    if census.quarantine is not None:
        about["quarantine"] = {"count": census.quarantine.total(), "reasons": dict(census.quarantine.most_common(top))}
    if (ledger := census.ledger) is not None:
        kept = ledger.kept.counts
        about["ledger"] = {
            "ingests": ledger.ingests,
            "inputs": ledger.inputs,
            "outcomes": dict(ledger.outcomes.most_common()),
            "sums": ledger.sums,
            "sources": [
                {"source": name, "inputs": count, "kept": kept.get(name, 0)}
                for name, count in ledger.sources.counts.most_common(top)
            ],
            "sources_found": len(ledger.sources.counts),
            "approximate": ledger.sources.cut,
            "changed": dict(ledger.changed.most_common()),
            "reasons": dict(ledger.details.counts.most_common(top)),
            "duplicates": _groups(ledger.duplicates.counts, top),
            "near_duplicates": {
                **_groups(ledger.near.counts, top),
                "distances": dict(sorted(ledger.distances.items())),
            },
            "forgotten": ledger.forgotten,
        }
    return about


def _groups(counts: Counter[str], top: int) -> dict[str, Any]:
    largest = [{"key": key, "copies": count} for key, count in counts.most_common(top)]
    return {"count": counts.total(), "groups": len(counts), "largest": largest}


def _bins(bounds: Sequence[float]) -> list[str]:
    inner = [f"{low:g} to {high:g}" for low, high in pairwise(bounds)]
    return [f"under {bounds[0]:g}", *inner, f"{bounds[-1]:g} and over"]


Section = tuple[str, list[str], list[list[str]]]  # title, heads, rows


def sections(census: Census, top: int) -> list[Section]:
    """What was counted, as tables of texts; those that would be empty are left out."""
    n = max(1, census.samples)
    tables: list[Section] = [
        ("images", ["", "min", "p1", "p10", "p25", "median", "p75", "p90", "p99", "max", "mean"], _quantiles(census)),
        ("shards", ["", "min", "median", "max"], [_row("samples", census.shard_samples), _row("bytes", census.shard_bytes)]),
        ("formats", ["", "images", "share"], _shares(census.formats.most_common(), n)),
        ("shorter side, pixels", ["", "images", "share"], _shares(zip(_bins(SIDES), census.sides.tolist(), strict=True), n)),
        ("longer over shorter side", ["", "images", "share"], _shares(zip(_bins(ASPECTS), census.aspects.tolist(), strict=True), n)),
        ("orientation", ["", "images", "share"], _shares(census.upright.most_common(), n)),
        ("removed, by reason", ["", "images", "share"], _shares(census.removed.most_common(top), n)),
        ("erased, by reason", ["", "images", "share"], _shares(census.erased.most_common(top), n)),
        ("in quarantine, by reason", ["", "images", "share"], _shares((census.quarantine or Counter()).most_common(top), n)),
    ]  # fmt: skip
    if (ledger := census.ledger) is not None:
        inputs, kept = max(1, ledger.inputs), max(1, ledger.outcomes.get("kept", 0))
        outcomes = _shares(ledger.outcomes.most_common(), inputs)
        outcomes.append(
            ["sum", f"{ledger.outcomes.total():,}", "every input has its row" if ledger.sums else "NOT THE INPUTS"]
        )
        sources = [
            [name, f"{count:,}", f"{ledger.kept.counts.get(name, 0):,}"]
            for name, count in ledger.sources.counts.most_common(top)
        ]
        tables += [
            (f"outcomes of {ledger.inputs:,} inputs in {ledger.ingests} ingests", ["", "inputs", "share"], outcomes),
            (f"sources, {'at least ' if ledger.sources.cut else ''}{len(ledger.sources.counts):,}", ["", "inputs", "kept"], sources),
            ("not as they came", ["", "images", "of the kept"], _shares(ledger.changed.most_common(), kept)),
            ("why not kept", ["", "inputs", "share"], _shares(ledger.details.counts.most_common(top), inputs)),
            (f"most copies, of {len(ledger.duplicates.counts):,} images", ["", "copies left out", "of all"], _shares(ledger.duplicates.counts.most_common(top), inputs)),
            (f"most near duplicates, of {len(ledger.near.counts):,} images", ["", "left out", "of all"], _shares(ledger.near.counts.most_common(top), inputs)),
        ]  # fmt: skip
    return [(title, heads, rows) for title, heads, rows in tables if rows]


def _quantiles(census: Census) -> list[list[str]]:
    named = (("bytes", census.lengths), ("width", census.widths), ("height", census.heights))
    names = ("min", "p1", "p10", "p25", "p50", "p75", "p90", "p99", "max", "mean")
    return [[what, *(f"{q.as_dict()[name]:,.0f}" for name in names)] for what, q in named if q.count]


def _row(name: str, values: dict[str, float]) -> list[str]:
    return [name, *(f"{values[which]:,.0f}" for which in ("min", "median", "max"))]


def _shares(counts: Iterable[tuple[Any, int]], of: int) -> list[list[str]]:
    return [[str(name), f"{count:,}", f"{count / of:.1%}"] for name, count in counts if count]


def headline(census: Census) -> list[str]:
    """The most important in a few sentences."""
    lines = [f"{census.samples:,} images in {census.shards:,} shards, {_size(census.bytes)}"]
    if census.removed:
        lines.append(f"removed: {census.removed.total():,} of them, never read and still in the shards")
    if census.erased:
        lines.append(f"erased: {census.erased.total():,} more")
    if census.unsized:
        lines.append(f"{census.unsized:,} have no size yet: gristmill index --deep finds it")
    if census.undecoded:
        lines.append(f"{census.undecoded:,} do not decode and are replaced when read")
    if census.ledger is None:
        lines.append("no ledger: sources, duplicates and outcomes are not known")
    elif census.ledger.forgotten:
        lines.append(f"the origin of {census.ledger.forgotten:,} inputs was forgotten on request")
    return lines + [f"cannot be read: {text}" for text in census.unreadable]


def _size(count: int) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


def show(place: Path, census: Census, top: int) -> None:
    """Print it."""
    console = Console(highlight=False)
    for line in (f"{place}: {headline(census)[0]}", *headline(census)[1:]):
        console.print(line, markup=False, soft_wrap=True)
    for title, heads, rows in sections(census, top):
        table = Table(box=None, pad_edge=False)
        for number, head in enumerate(heads):
            table.add_column(head, justify="right" if number else "left", overflow="fold")
        for row in rows:
            table.add_row(*map(escape, row))
        console.print()
        console.print(f"[bold]{escape(title)}[/bold]", soft_wrap=True)
        console.print(table)


def spread_over(counts: np.ndarray, number: int) -> list[tuple[int, int]]:
    """(shard, row) of `number` samples at equal distances over all: the same ones every time."""
    total = int(counts.sum())
    number = min(number, total)
    places = (np.arange(number) * total + total // 2) // max(1, number)
    ends = np.cumsum(counts)
    shards = np.searchsorted(ends, places, "right")
    return [
        (int(shard), int(place - (ends[shard] - counts[shard]))) for shard, place in zip(shards, places, strict=True)
    ]
