"""Ingest: a folder of images becomes shards and a manifest.

Files are checked in threads (intake.py) and come back in the order of their paths; this thread drops doubles, by
content, and writes. So the output depends on the source alone, and a second ingest gives the same bytes. Nothing is a
data set before all of it is: `train` is published last, after `probe` and the files beside them, and an ingest that
fails takes everything back. One that was killed leaves whole shards at most, which the next one clears away.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .errors import GristmillError
from .intake import Checked, check_files, file_size
from .labels import LABELS, write_labels
from .manifest import DATASET
from .parallel import cores
from .sources import find_images
from .storage import NO_SPACE, PARTIAL, claimed, published
from .tars import TarsWriter, clear_leftovers

SKIPPED = "skipped.tsv"
TRAIN, PROBE = "train", "probe"


class IngestError(GristmillError):
    """An ingest that cannot be done; nothing of it is left."""


@dataclass
class IngestReport:
    """What became of the candidates: `accepted + duplicates + len(skipped)` is their number.

    `bytes` counts the accepted images as stored. `reencoded` counts, for each reason, the accepted ones whose own bytes
    DALI would have failed on or misread. `train` and `probe` say how the accepted ones were divided. Paths are relative
    to the source.
    """

    accepted: int = 0
    duplicates: int = 0
    skipped: list[tuple[Path, str]] = field(default_factory=list)
    bytes: int = 0
    train: int = 0
    probe: int = 0
    reencoded: dict[str, int] = field(default_factory=dict)

    def summary(self) -> str:
        """The counts in words, one line each."""
        lines = [
            f"{self.accepted} images taken ({self.bytes / 1e6:.1f} MB): {self.train} to train, {self.probe} to probe"
        ]
        lines += [f"{count} of them re-encoded: {reason}" for reason, count in sorted(self.reencoded.items())]
        if self.duplicates:
            lines.append(f"{self.duplicates} exact duplicates left out")
        if self.skipped:
            first, why = self.skipped[0]
            lines.append(f"{len(self.skipped)} files skipped, listed in {SKIPPED}; the first: {first} ({why})")
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """The counts for JSON; skipped files as [path, reason]."""
        return {**asdict(self), "skipped": [[str(path), reason] for path, reason in self.skipped]}


def ingest(
    source_dir: str | Path,
    out: str | Path,
    *,
    shard_samples: int = 1024,
    holdout: float = 0.0,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    threads: int | None = None,
) -> IngestReport:
    """Turn a folder of JPEG, PNG and WebP files into the data set `out/train`, and `out/probe` if `holdout` > 0.

    Beside them go `labels.parquet` (classes from the folders' names) and `skipped.tsv` (files left out, and why). A
    sample's key is the blake2b-128 of the source file; the first of equal files, by path, is kept. `holdout` is the
    share of the images that goes to the probe, chosen by (seed, key) alone. `progress(done, total)` counts files.

    Raises IngestError (no image left, no space, an output that is in use), SourceError, TarsError.
    """
    source, out = Path(source_dir), Path(out)
    if shard_samples < 1:
        raise IngestError(f"shards of {shard_samples} samples cannot be written: ask for at least 1")
    if not 0 <= holdout < 1:
        raise IngestError(f"a holdout of {holdout} cannot be made: give a share from 0 up to, but not including, 1")
    paths = find_images(source)
    if (out / TRAIN / DATASET).exists():
        raise IngestError(f"{out} holds a data set already: name another folder, or remove it first")
    taken = IngestError(f"another ingest is writing to {out}: wait for it, or name another folder")
    try:
        with claimed(out, taken), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's remarks on single files; what matters is in the report
            return _Ingest(source, out, shard_samples, holdout, seed).run(paths, progress, threads or cores())
    except OSError as error:
        raise _explained(error, out, 0) from error


class _Ingest:
    """The state of one ingest: its writers, and what it has accepted."""

    def __init__(self, source: Path, out: Path, shard_samples: int, holdout: float, seed: int) -> None:
        self.source, self.out = source, out
        self.seed, self.bound = seed, int(holdout * 2**64)
        self.report = IngestReport()
        self.known: set[bytes] = set()
        self.accepted: list[tuple[str, Path]] = []
        self.shard_samples = shard_samples
        self.writers: dict[str, TarsWriter] = {}

    def run(self, paths: list[Path], progress: Callable[[int, int], None] | None, threads: int) -> IngestReport:
        try:
            self._start()
            for done, checked in enumerate(check_files(self.source, paths, self.known, threads), start=1):
                self._take(checked)
                if progress is not None:
                    progress(done, len(paths))
            self._publish(paths)
        except OSError as error:
            needed = sum(file_size(self.source, path) + 1024 for path in paths)  # a tar's header and padding
            self._discard()
            raise _explained(error, self.out, needed) from error
        except BaseException:
            self._discard()
            raise
        return self.report

    def _start(self) -> None:
        """Clear away what a killed ingest left, then open the writers."""
        for name in (TRAIN, PROBE):
            clear_leftovers(self.out / name)
        self._remove_sides()
        for name in (TRAIN, PROBE) if self.bound else (TRAIN,):
            self.writers[name] = TarsWriter(self.out / name, shard_samples=self.shard_samples)

    def _take(self, checked: Checked) -> None:
        report, digest, image = self.report, checked.digest, checked.image
        if checked.problem is not None:
            report.skipped.append((checked.path, checked.problem))
            return
        if digest in self.known or image is None:
            report.duplicates += 1
            return
        self.known.add(digest)
        name = PROBE if self.bound and _fraction(self.seed, digest) < self.bound else TRAIN
        self.writers[name].add(digest.hex(), image)
        self.accepted.append((digest.hex(), checked.path))
        report.accepted += 1
        report.bytes += len(image.data)
        if image.reencoded is not None:
            report.reencoded[image.reencoded] = report.reencoded.get(image.reencoded, 0) + 1

    def _publish(self, paths: list[Path]) -> None:
        report = self.report
        if not report.accepted:
            path, reason = report.skipped[0]
            raise IngestError(
                f"none of the {len(paths)} images below {self.source} can be used; the first, {path}: {reason}"
            )
        for name, writer in self.writers.items():
            if writer.samples == 0:
                raise IngestError(
                    f"the holdout leaves no image to {name} out of {report.accepted}: change it, or bring more images"
                )
        report.train = self.writers[TRAIN].samples
        report.probe = report.accepted - report.train
        write_labels(self.out, [key for key, _ in self.accepted], [path for _, path in self.accepted])
        with published(self.out / SKIPPED) as file:
            file.write(b"path\treason\n")
            for path, reason in report.skipped:
                file.write(os.fsencode(f"{_escaped(str(path))}\t{_escaped(reason)}\n"))
        for name in (PROBE, TRAIN):  # train last: its presence says that the ingest is complete
            if name in self.writers:
                self.writers[name].publish()

    def _discard(self) -> None:
        for writer in self.writers.values():
            writer.discard()
        self._remove_sides()

    def _remove_sides(self) -> None:
        for name in (LABELS, SKIPPED):
            (self.out / name).unlink(missing_ok=True)
            (self.out / (name + PARTIAL)).unlink(missing_ok=True)


def _explained(error: OSError, out: Path, needed: int) -> IngestError:
    if error.errno not in NO_SPACE:
        return IngestError(f"{out} cannot be written ({error.strerror}): mend that or name another folder")
    place = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    free = shutil.disk_usage(place).free
    return IngestError(
        f"no space in {out} ({error.strerror}): it needs about {needed:,} bytes and {free:,} are free now; make room or "
        "name another folder. Nothing half-written was left"
    )


def _fraction(seed: int, digest: bytes) -> int:
    """A number below 2**64 out of the sample's content and the seed: what decides on the holdout."""
    key = seed.to_bytes(16, "little", signed=True)
    return int.from_bytes(hashlib.blake2b(digest, digest_size=8, key=key).digest(), "little")


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\t", "\\t").replace("\n", "\\n").replace("\r", "\\r")
