"""Takedown: images named by key, by address or by hash are found, removed at once, and on request erased.

All that is asked for is found before anything is removed: one name that nobody knows, and nothing happens. Removal is a
tombstone; erasing writes the shards anew (rewrite.py) and makes the ledger forget where the images came from
(forgetting.py). A killed takedown is finished by the same command; what an earlier one has left half done goes first.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import rewrite
from .collection import Collection, open_collection
from .deep import images
from .errors import GristmillError
from .foreign import close_blob, open_place
from .manifest import Manifest
from .parallel import cores, in_order
from .storage import claimed
from .tombstones import TombstoneError, Tombstones, no_sample, places_of

BY_LENGTH = {32: "blake2b", 40: "sha1", 64: "sha256"}
_HASHES: dict[str, Callable[[bytes], Any]] = {
    "blake2b": lambda data: hashlib.blake2b(data, digest_size=16),
    "md5": lambda data: hashlib.md5(data, usedforsecurity=False),
    "sha1": lambda data: hashlib.sha1(data, usedforsecurity=False),
    "sha256": hashlib.sha256,
}
_LENGTHS = {"blake2b": 32, "md5": 32, "sha1": 40, "sha256": 64}
Entries = list[tuple[tuple[str, int], str]]  # (url of the shard, row), key
Progress = Callable[[str, int, int], None]  # what is done, how much of it, of how much


class TakedownError(GristmillError):
    """A request that cannot be met as it stands. Nothing was removed."""


@dataclass
class Wanted:
    """What is to be removed. `hashes`: (algorithm, hex)."""

    keys: list[str] = field(default_factory=list)
    addresses: list[str] = field(default_factory=list)
    hashes: list[tuple[str, str]] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.keys or self.addresses or self.hashes)

    @property
    def digest(self) -> str:
        """blake2b-128 hex: equal for equal requests."""
        text = json.dumps([sorted(set(self.keys)), sorted(set(self.addresses)), sorted(set(self.hashes))])
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


@dataclass
class Removal:
    """What was done. `removed`: new tombstones; `total`: samples removed and still in the tars; `samples`: all there are."""

    removed: int = 0
    total: int = 0
    samples: int = 0
    notes: list[str] = field(default_factory=list)  # what a person should know about single requests
    erased: int = 0  # samples whose bytes are gone
    shards: int = 0  # written anew
    freed: int = 0  # bytes
    forgotten: int = 0  # rows of the ledger
    digests: list[tuple[str, str]] = field(default_factory=list)  # of each data set written anew: before, after


def parse_hash(text: str) -> tuple[str, str]:
    """`sha256:HEX`, or HEX alone, whose length tells which. Raises TakedownError."""
    kind, mark, digits = text.strip().lower().rpartition(":")
    kind = kind if mark else BY_LENGTH.get(len(digits), "")
    if _LENGTHS.get(kind) != len(digits) or set(digits) - set("0123456789abcdef"):
        raise TakedownError(
            f"{text!r} is no hash: write 32 hex digits (blake2b-128 of the source's bytes, the key), 40 (sha1) or 64 (sha256 "
            "of the stored bytes), or md5: and 32 of them"
        )
    return kind, digits


def parse_lines(lines: Iterable[str]) -> Wanted:
    """A list: a key, an address (with ://) or a hash (with its name and a colon, as sha256:) a line."""
    wanted = Wanted()
    for line in filter(None, map(str.strip, lines)):
        if "://" in line:
            wanted.addresses.append(line)
        elif line.partition(":")[0].lower() in _HASHES and ":" in line:
            wanted.hashes.append(parse_hash(line))
        else:
            wanted.keys.append(line)
    return wanted


def take_down(
    place: str | Path, wanted: Wanted, reason: str, *, erase: bool = False, progress: Progress | None = None
) -> Removal:
    """Remove what is wanted from the data sets at `place`; with `erase`, the bytes of all that was ever removed too.

    Raises TakedownError, TombstoneError, RewriteError, ManifestError; OSError passes through.
    """
    tell = progress or (lambda *_: None)
    found = open_collection(place)
    with ExitStack() as stack:
        half_done = any(rewrite.pending(part) for part in found.parts)
        if erase or half_done:
            for folder in dict.fromkeys((found.root, *found.parts)):
                busy = TakedownError(f"{folder} is being written by another ingest, index or removal: wait for it")
                stack.enter_context(claimed(folder, busy))
        report = Removal()
        if half_done and _finish(found, wanted.digest, report):
            return _counted(found, report)
        if erase:
            _possible(found)
        manifests = [Manifest.open(part) for part in found.parts]
        try:
            entries, inputs = _resolve(found, manifests, wanted, report, tell)
        except (TakedownError, TombstoneError):
            if not any(one.get("request") == wanted.digest for part in found.parts for one in rewrite.removed(part)):
                raise
            entries, inputs, report.notes = [[] for _ in manifests], set(), ["this very request was carried out before"]
        for manifest, some in zip(manifests, entries, strict=True):
            report.removed += Tombstones.of(manifest).add(some, reason)
        if erase:
            _erase(found, wanted.digest, inputs, report, tell)
        return _counted(found, report)


def _counted(found: Collection, report: Removal) -> Removal:
    for part in found.parts:
        manifest = Manifest.open(part)
        report.samples += manifest.samples
        report.total += len(Tombstones.of(manifest).places(manifest.urls))
    return report


def _possible(found: Collection) -> None:
    if found.ledger:
        from .forgetting import unfinished

        if unfinished(found.root):
            raise TakedownError(
                f"an ingest to {found.root} is not finished: finish it, or throw it away by --restart, then rewrite. Without "
                "--rewrite the samples can be removed at once"
            )


def _finish(found: Collection, request: str, report: Removal) -> bool:
    """Finish what was committed before; whether it was this very request."""
    committed = {one.request for part in found.parts if (one := rewrite.pending(part)) is not None}
    for part in found.parts:  # all halves were staged before the first was committed
        if (one := rewrite.staged(part)) is not None and one.request in committed:
            rewrite.commit(part)
    for part in found.parts:
        if (decided := rewrite.pending(part)) is not None:
            _carry_out(found, part, decided, report)
    for part in found.parts:
        rewrite.release(part)
    return request in committed


def _erase(found: Collection, request: str, inputs: set[int], report: Removal, tell: Progress) -> None:
    decided = []
    for part in found.parts:
        one = rewrite.stage(part, request, inputs, lambda done, total: tell("rewrite", done, total))
        if one is not None:
            decided.append((part, one))
    for part, _ in decided:
        rewrite.commit(part)
    for part, one in decided:
        _carry_out(found, part, one, report)
    if inputs and not decided:
        _forget(found, (), inputs, report)
    for part in found.parts:
        rewrite.release(part)


def _carry_out(found: Collection, part: Path, decided: rewrite.Rewritten, report: Removal) -> None:
    rewrite.finish(part, decided)
    _forget(found, decided.keys, decided.inputs, report)
    report.erased += decided.samples
    report.shards += len(decided.gone)
    report.freed += decided.bytes
    report.digests.append((decided.before, decided.after))
    if decided.linked:
        report.notes.append(
            f"{decided.linked} of the old shards of {part} have other names too (hard links): those still hold the images"
        )


def _forget(found: Collection, keys: Iterable[str], inputs: Iterable[int], report: Removal) -> None:
    if found.ledger:
        from .forgetting import forget

        report.forgotten += forget(found.root, keys, inputs)


def _resolve(
    found: Collection, manifests: list[Manifest], wanted: Wanted, report: Removal, tell: Progress
) -> tuple[list[Entries], set[int]]:
    """What to remove of each data set, and inputs of the ledger to forget. Raises where anything is not known at all."""
    keys, inputs = set(wanted.keys), set()
    if wanted.addresses:
        addressed, inputs = _addressed(found, wanted.addresses, report)
        keys |= addressed
    keys |= {digits for kind, digits in wanted.hashes if kind == "blake2b"}
    entries = [places_of(manifest, keys) if keys else [] for manifest in manifests]
    there = {key for some in entries for _, key in some}
    erased = {one["key"] for part in found.parts for one in rewrite.removed(part)}
    report.notes += [f"{key} was erased before" for key in sorted((keys - there) & erased)]
    if missing := set(wanted.keys) - there - erased:
        raise no_sample(str(found.root), missing)
    scanned = {
        (kind, digits)
        for kind, digits in wanted.hashes
        if kind != "blake2b" or not (digits in there | erased or _told_by_ledger(found, digits, report))
    }
    for number, pair, entry in _hashed(manifests, scanned, tell) if scanned else ():
        entries[number].append(entry)
        scanned.discard(pair)
    if scanned:
        raise no_sample(str(found.root), {f"with {kind} {digits}" for kind, digits in scanned})
    return entries, inputs


def _addressed(found: Collection, addresses: list[str], report: Removal) -> tuple[set[str], set[int]]:
    """Keys of the images that came from these addresses, and the inputs that name them."""
    if not found.ledger:
        raise TakedownError(
            f"{found.root} has no ledger, so nobody knows what came from where: name keys or hashes (nothing was removed)"
        )
    from .forgetting import look_up

    keys: set[str] = set()
    inputs: set[int] = set()
    for known in look_up(found.root, addresses):
        images_of = {row["key"] for row in known.rows if row["outcome"] in ("kept", "duplicate")}
        if not known.rows:
            raise TakedownError(
                f"no input of {found.root} came from {known.asked}: nothing was removed; check the address"
            )
        locators = sorted({row["locator"] for row in known.rows})
        if len(locators) > 1 and len(images_of) > 1:
            raise TakedownError(
                f"{len(locators)} inputs of {found.root} came from {known.asked}, with other queries: nothing was removed; "
                f"give the whole url, or one of these: {'; '.join(locators[:5])}"
            )
        keys |= images_of
        inputs |= {row["input"] for row in known.rows}
        if not images_of:
            report.notes.append(f"{known.asked}: {_fate(known.rows[-1])}")
    return keys, inputs


def _told_by_ledger(found: Collection, key: str, report: Removal) -> bool:
    """Whether the ledger knows why this image is not there."""
    if not found.ledger:
        return False
    from .forgetting import by_key

    rows = [row for row in by_key(found.root, key) if row["outcome"] not in ("kept", "duplicate")]
    if rows:
        report.notes.append(f"{key}: {_fate(rows[-1])}")
    return bool(rows)


def _fate(row: dict[str, Any]) -> str:
    if row["outcome"] == "near_duplicate":
        return (
            f"was left out, for it looks like {row['duplicate_of']} ({row['distance']} bits of 256 apart), which is kept: "
            "name that key to remove it too"
        )
    return f"was never taken in ({row['outcome']})"


def _hashed(
    manifests: list[Manifest], wanted: set[tuple[str, str]], tell: Progress
) -> list[tuple[int, tuple[str, str], tuple[tuple[str, int], str]]]:
    """The samples whose stored bytes have these hashes: number of the manifest, hash, entry. Every image is read."""
    kinds = sorted({kind for kind, _ in wanted})

    def look(job: tuple[int, int]) -> list[tuple[int, tuple[str, str], tuple[tuple[str, int], str]]]:
        number, shard = job
        manifest = manifests[number]
        rows = manifest.rows(shard)
        blob = open_place(manifest.place(shard))
        try:
            return [
                (number, pair, ((manifest.urls[shard], row), rows.keys[row]))
                for row, data in images(blob, rows)
                for kind in kinds
                if (pair := (kind, _HASHES[kind](data).hexdigest())) in wanted
            ]
        finally:
            close_blob(blob)

    jobs = [(number, shard) for number, manifest in enumerate(manifests) for shard in range(len(manifest.urls))]
    found = []
    try:
        for done, some in enumerate(in_order(look, jobs, cores(), "gristmill-hash"), start=1):
            found += some
            tell("hash", done, len(jobs))
    except FileNotFoundError as error:
        raise TakedownError(f"{error.filename} is missing, so nobody knows what is in it: restore it first") from error
    return found
