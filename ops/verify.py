"""`gristmill verify`: the list of all that is wrong, or a new data set of all that is right."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import click

from ..shards.collection import Collection, open_collection
from ..shards.manifest import Manifest
from ..shards.repair import LOST, RepairReport, release, repair
from ..shards.rewrite import RewriteError, pending
from ..shards.verify import Finding, verify
from .progress import Meter


def run_verify(place: Path, *, deep: bool, into: Path | None, workers: int | None, again: bool, as_json: bool) -> int:
    """Check, or repair into a folder, and print what was found; returns the exit code, 0 or 1. Raises GristmillError."""
    found = open_collection(place)
    for part in found.parts:
        if pending(part) is not None:
            raise RewriteError(
                f"{part} is in the middle of being written anew: finish that by `gristmill remove {place} --rewrite --reason ...`"
            )
    if into is not None:
        return _repair(found, into, workers, as_json)
    findings: list[Finding] = []
    samples = 0
    for part in found.parts:
        manifest = Manifest.open(part)
        samples += manifest.samples
        with Meter("verify", len(manifest.urls), unit="shards", quiet=as_json) as meter:
            some = verify(part, deep, workers=workers, again=again, progress=meter, note=meter.note)
        findings += _named(found, part, some)
    if as_json:
        click.echo(json.dumps({"samples": samples, "deep": deep, "findings": [asdict(one) for one in findings]}))
    else:
        _print(findings)
        click.echo(f"{place}: {len(findings)} findings" if findings else f"{place}: all in order")
        if findings:
            click.echo(f"what is sound can be written to a new folder: gristmill verify {place} --repair OUT")
    return 1 if findings else 0


def _repair(found: Collection, out: Path, workers: int | None, as_json: bool) -> int:
    reports: list[RepairReport] = []
    findings: list[Finding] = []
    targets = [out / part.name for part in found.parts] if len(found.parts) > 1 else [out]
    for part, target in zip(found.parts, targets, strict=True):
        with Meter("repair", len(Manifest.open(part).urls), unit="shards", quiet=as_json) as meter:
            reports.append(repair(part, target, workers=workers, progress=meter, last=False))
        findings += _named(found, part, reports[-1].findings)
    for target in targets:
        release(target)
    if as_json:
        told = [asdict(one) for one in findings]
        click.echo(json.dumps({"repaired": [report.as_dict() for report in reports], "findings": told}))
        return 1 if findings else 0
    _print(findings)
    for report in reports:
        notes = [f"{report.copied} of {report.shards} shards as they were"]
        notes += [f"{report.changed} images encoded anew"] if report.changed else []
        notes += [f"{report.removed} removed samples left out"] if report.removed else []
        click.echo(
            f"{report.out}: {report.samples} of {report.before} samples saved, {report.lost} lost ({', '.join(notes)}); "
            f"the list is in {LOST}"
        )
    return 1 if findings else 0


def _named(found: Collection, part: Path, findings: list[Finding]) -> list[Finding]:
    return [replace(finding, shard=found.name(part, finding.shard)) for finding in findings]


def _print(findings: list[Finding]) -> None:
    for finding in findings:
        click.echo(f"{finding.shard}  {finding.key or '-'}  {finding.problem}")
