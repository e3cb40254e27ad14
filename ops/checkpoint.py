"""Checkpoints that are complete or absent, and hold no pickle. DESIGN 3.7.

A checkpoint is a folder `<position>/` of safetensors files and one `state.json` with their digests. It is written
beside its final name, synced, and renamed, so a kill or a full disk leaves the older ones as they were. Loading takes
the newest one whose digests hold, and says which ones it passed over. DeepSpeed's own files are never read or written.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..shards.errors import GristmillError

VERSION = 1


class CheckpointError(GristmillError):
    """A checkpoint that cannot be written, or does not belong to this run."""


@dataclass
class Checkpoint:
    """What a checkpoint holds: groups of named tensors, and plain values (cursor, recipe, topology, versions)."""

    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]
    path: Path | None = None


def save(folder: Path, position: int, checkpoint: Checkpoint, keep: int) -> Path:
    """Write `folder/<position>`, then drop all but the newest `keep`. Raises CheckpointError when the disk says no."""
    folder.mkdir(parents=True, exist_ok=True)
    _sweep(folder)
    final = folder / f"{position:012d}"
    beside = folder / f".writing-{position:012d}"
    try:
        beside.mkdir()
        digests = {}
        for name, tensors in checkpoint.tensors.items():
            path = beside / f"{name}.safetensors"
            save_file({key: value.detach().contiguous().cpu() for key, value in tensors.items()}, path)
            digests[path.name] = _digest(path)
        document = {"version": VERSION, "position": position, "digests": digests, **checkpoint.state}
        text = json.dumps(document, indent=1, sort_keys=True)
        # The document's own digest makes a flipped bit in the cursor as visible as one in the weights.
        (beside / "state.json").write_text(text)
        (beside / "state.digest").write_text(hashlib.blake2b(text.encode(), digest_size=16).hexdigest())
        for path in [*beside.iterdir(), beside]:
            _sync(path)
        if final.exists():
            shutil.rmtree(final)
        beside.rename(final)
        _sync(folder)
    except (OSError, SafetensorError) as error:  # the latter wraps a full disk
        shutil.rmtree(beside, ignore_errors=True)
        free = shutil.disk_usage(folder).free
        raise CheckpointError(
            f"could not write the checkpoint {final}: {getattr(error, 'strerror', None) or error} ({free / 1e6:.0f} MB free there). "
            f"Older checkpoints are untouched; make room, and start the same command again."
        ) from error
    for old in complete(folder)[keep:]:
        shutil.rmtree(old)
    return final


def complete(folder: Path) -> list[Path]:
    """Finished checkpoints, newest first; their contents are not verified."""
    if not folder.is_dir():
        return []
    return sorted((p for p in folder.iterdir() if p.name.isdigit() and (p / "state.json").is_file()), reverse=True)


def load_newest(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint whose digests hold, and one line for each newer one that was passed over."""
    passed: list[str] = []
    for path in complete(folder):
        problems = list(damage(path))
        if not problems:
            return load(path), passed
        passed.append(f"checkpoint {path} is damaged ({'; '.join(problems)}) and was passed over")
    if passed:
        raise CheckpointError(
            "no checkpoint is readable: " + "; ".join(passed) + f". Remove {folder} to start from the beginning."
        )
    return None, passed


def load(path: Path) -> Checkpoint:
    """Read one checkpoint folder (verify it with `damage` first)."""
    document = json.loads((path / "state.json").read_text())
    if document.get("version") != VERSION:
        raise CheckpointError(f"{path} has version {document.get('version')!r}; this Gristmill reads {VERSION}")
    tensors = {Path(name).stem: load_file(path / name) for name in document["digests"]}
    return Checkpoint(tensors, document, path)


def damage(path: Path) -> Iterator[str]:
    """What is wrong with a checkpoint folder, one line a file; nothing when it is whole."""
    try:
        text = (path / "state.json").read_text()
        if hashlib.blake2b(text.encode(), digest_size=16).hexdigest() != (path / "state.digest").read_text():
            yield "state.json does not match its digest"
            return
        digests = json.loads(text)["digests"]
    except (OSError, ValueError, KeyError) as error:
        yield f"state.json cannot be read: {error}"
        return
    for name, digest in digests.items():
        if not (path / name).is_file():
            yield f"{name} is missing"
        elif _digest(path / name) != digest:
            yield f"{name} does not match its digest"


def _sweep(folder: Path) -> None:
    """Remove what a killed writer left; there is one writer a run folder (the run holds its lock)."""
    for rest in folder.glob(".writing-*"):
        shutil.rmtree(rest, ignore_errors=True)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
