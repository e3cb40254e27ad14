"""Where an ingest keeps what it needs to go on: `.ingest` in its destination, a folder for each generation.

.ingest/known         what was kept so far, for finding duplicates: a cache of the ledger
.ingest/003/request   what was asked for, so that only the same command goes on
.ingest/003/inputs    the frozen inputs; they stay, for `--retry-failed` (urls may hold secrets: only the owner reads)
.ingest/003/first     numbers of its first shards
.ingest/003/spool     units that are done and not yet in shards
.ingest/003/rows      shards that are written and not yet in the manifest
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..addresses import redact
from ..storage import published, sync_folder
from .config import IngestConfig
from .errors import IngestError
from .frozen import PLAN
from .ledger import folder_of, generations

WORK = ".ingest"


class Workplace:
    """The folders of one generation of an ingest to `root`."""

    def __init__(self, root: Path, generation: int) -> None:
        self.root, self.generation = root, generation
        self.base = root / WORK
        self.folder = self.base / f"{generation:03d}"
        self.known = self.base / "known"
        self.inputs = self.folder / "inputs"
        self.spool = self.folder / "spool"
        self.rows = self.folder / "rows"
        self.before = self.folder / "before"
        self.hosts = self.base / "hosts"
        self.lock = self.base / "lock"  # held by workers while they live
        self.first = self.folder / "first"

    def known_of(self, near: int | None) -> Path:
        """The index of what was kept; one that knows digests alone does not do for near duplicates."""
        return self.known / ("exact" if near is None else f"near-{near}")

    @property
    def begun(self) -> bool:
        return (self.folder / "request").is_file()

    @property
    def planned(self) -> bool:
        """Whether there is work to go on with."""
        return (self.inputs / PLAN).exists() or any(self.spool.iterdir())

    def make(self) -> None:
        """Make the folder of all generations, which only its owner can read, and remove what was thrown away before."""
        self.base.mkdir(exist_ok=True, mode=0o700)
        os.chmod(self.base, 0o700)
        for rest in self.base.glob("*.gone"):
            shutil.rmtree(rest)

    def begin(self, kind: str, sources: Sequence[str], config: IngestConfig) -> None:
        """Make the folders, or go on in them. IngestError when they belong to another request."""
        asked = _request(kind, sources, config)
        if self.begun:
            before = self.asked()
            differing = [
                f"{name} was {before.get(name)!r} and is {asked.get(name)!r}"
                for name in sorted(before.keys() | asked.keys())
                if before.get(name) != asked.get(name)
            ]
            if before != asked:
                raise IngestError(
                    f"{self.root} holds an ingest that is not finished and was another one "
                    f"({'; '.join(differing)}): give the same command to finish it, "
                    "or add --restart to throw away what it has done"
                )
        for folder in (self.spool, self.rows, self.hosts):
            folder.mkdir(parents=True, exist_ok=True)
        if not self.begun:
            with published(self.folder / "request") as file:
                file.write(json.dumps(asked, indent=1).encode())

    def finished(self, kind: str, sources: Sequence[str], config: IngestConfig) -> bool:
        """Whether this request was met, and killed before it could say so. Nobody finds out twice."""
        return self.spool.exists() and self.asked() == _request(kind, sources, config)

    def asked(self) -> dict[str, Any]:
        """What was asked for."""
        return json.loads((self.folder / "request").read_text(encoding="utf-8"))

    def clear(self) -> None:
        """Remove what is needed no more once a generation is complete. The inputs stay."""
        for folder in (
            self.folder / "against",
            self.before,
            self.rows,
            self.spool,
        ):  # the last one says that all are gone
            shutil.rmtree(folder, ignore_errors=True)

    def throw_away(self) -> None:
        """Forget an unfinished generation: its rows of the ledger, its work."""
        shutil.rmtree(folder_of(self.root, self.generation), ignore_errors=True)
        shutil.rmtree(self.known, ignore_errors=True)
        gone = self.folder.with_suffix(".gone")  # as a whole: half of it would be taken for something to go on with
        self.folder.rename(gone)
        sync_folder(self.base)
        shutil.rmtree(gone)


def _request(kind: str, sources: Sequence[str], config: IngestConfig) -> dict[str, Any]:
    return {"kind": kind, "sources": [redact(source) for source in sources], **config.output()}


def workplace(root: Path) -> Workplace:
    """Of the generation that comes next, or that is not finished."""
    return Workplace(root, len(generations(root)))
