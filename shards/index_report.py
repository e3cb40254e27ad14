"""What an index found in shards made by others, in words, for JSON, and as a list of all that was left out.

The list lies beside the manifest, so that what was passed over can be looked up later and `gristmill verify` knows it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .storage import published

SKIPPED = "index.skipped.tsv"


@dataclass
class IndexReport:
    """What an index found. `counts` says what was passed over, by kind; `left_out` are shards (place, reason)."""

    out: str
    digest: str = ""
    shards: int = 0
    samples: int = 0
    bytes: int = 0
    deep: bool = False
    reused: int = 0  # shards whose rows were taken over, since they have not changed
    idx: int = 0  # files for DALI's reader
    counts: Counter[str] = field(default_factory=Counter)
    empty: list[str] = field(default_factory=list)  # whole tars without a sample that has an image
    left_out: list[tuple[str, str]] = field(default_factory=list)
    damaged: list[tuple[str, str, str]] = field(default_factory=list)  # shard, key, reason: images that do not decode
    odd: Counter[str] = field(default_factory=Counter)

    def summary(self) -> str:
        """The counts in words, one line each."""
        how = "checksums, sizes and decoding checked" if self.deep else "headers alone: add --deep for checksums"
        lines = [f"{self.samples} samples in {self.shards} shards ({self.bytes / 1e6:.1f} MB), {how}: {self.out}"]
        if self.reused:
            lines.append(f"{self.reused} shards unchanged since the last index, taken over and not counted below")
        lines += [f"{count} {kind}" for kind, count in sorted(self.counts.items())]
        if self.idx:
            lines.append(f"{self.idx} .idx files written for DALI's reader")
        lines += [f"{count} images that DALI may fail on or misread: {why}" for why, count in sorted(self.odd.items())]
        if self.damaged:
            shard, key, why = self.damaged[0]
            lines.append(
                f"{len(self.damaged)} images do not decode (substituted when read), listed in {SKIPPED}; the first: "
                f"{key} in {shard} ({why})"
            )
        if self.empty:
            lines.append(f"{len(self.empty)} shards without an image, listed in {SKIPPED}; the first: {self.empty[0]}")
        if self.left_out:
            shard, why = self.left_out[0]
            lines.append(f"{len(self.left_out)} shards left out, listed in {SKIPPED}; the first: {shard} ({why})")
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """The same for JSON."""
        return {**vars(self), "counts": dict(self.counts), "odd": dict(self.odd)}


def write_skipped(root: Path, report: IndexReport) -> None:
    """List shards and images that are left out; without any, take away the list of the index before."""
    lines = [*report.left_out, *((url, "no sample with an image") for url in report.empty)]
    lines += [(f"{url} {key}", reason) for url, key, reason in report.damaged]
    if not lines:
        (root / SKIPPED).unlink(missing_ok=True)
        return
    with published(root / SKIPPED) as file:
        file.write(b"what\treason\n")
        for line in lines:
            file.write("\t".join(" ".join(part.split()) for part in line).encode() + b"\n")


def read_skipped(root: Path) -> set[str]:
    """What the list names; empty where there is none. OSError passes through."""
    try:
        text = (root / SKIPPED).read_text(encoding="utf-8")
    except FileNotFoundError:
        return set()
    return {line.partition("\t")[0] for line in text.splitlines()[1:]}
