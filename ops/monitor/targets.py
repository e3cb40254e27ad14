"""A file for each rank that tells Prometheus where it is (file_sd), in a folder that Prometheus reads.

The file is the run's word that something should answer there. A run that ends well takes it away; one that is killed or
fails leaves it, so that `up == 0` says so; its next attempt writes the same file anew. Ranks that a smaller next
attempt does not have are taken away by rank 0. Labels name the target (`run`, `rank`, `node`), since the process does not
know them better than whoever looks for it; labels that begin with `__` are Prometheus' own or dropped after relabelling.
Source of the format: Prometheus, Configuration, <file_sd_config>.
"""

from __future__ import annotations

import hashlib
import json
import re
from contextlib import suppress
from pathlib import Path

from ...shards.storage import published

JOB = "gristmill"
FOLDER = "targets"  # of a run folder, where the recipe names no other
LONGEST = 120  # characters of a label's value


class Target:
    """The file of one rank of the run in `run`, a folder; `folder` holds the files of any number of runs.

    Names of files are made of the run folder's name and a hash of its whole path, so that no run takes another's.
    """

    def __init__(self, folder: Path, run: Path, rank: int) -> None:
        self.folder = folder
        self._run = run.resolve()
        mark = hashlib.sha256(str(self._run).encode(errors="surrogateescape")).hexdigest()[:8]
        plain = re.sub(r"[^A-Za-z0-9.-]+", "-", self._run.name)[:60].strip(".-") or "run"
        self._stem = f"{plain}-{mark}-rank"
        self._rank = rank
        self.path = folder / f"{self._stem}{rank:05d}.json"
        self._text = ""

    def write(self, host: str, port: int, *, node: str, local_rank: int = 0, https: bool = False) -> None:
        """Tell where this rank answers. host: as Prometheus reaches it, an IPv6 address in brackets. Raises OSError."""
        labels = {
            "job": JOB,
            "run": run_label(self._run),
            "rank": str(self._rank),
            "node": label(node),
            "__local_rank__": str(local_rank),  # `keep` those of 0 to scrape /node once a node
        }
        if https:
            labels["__scheme__"] = "https"
        self._text = json.dumps([{"targets": [f"{host}:{port}"], "labels": labels}]) + "\n"
        self.folder.mkdir(parents=True, exist_ok=True)
        with published(self.path) as draft:
            draft.write(self._text.encode())

    def only(self, world: int) -> None:
        """Take away this run's files of ranks that are not among the `world` of now. Raises OSError."""
        for path in self.folder.glob(f"{self._stem}*.json"):
            number = path.stem.removeprefix(self._stem)
            if number.isdecimal() and int(number) >= world:
                path.unlink(missing_ok=True)

    def remove(self) -> None:
        """At a clean end; a file that another attempt has written since is left to it."""
        with suppress(OSError):
            if self._text and self.path.read_text() == self._text:
                self.path.unlink()
            if self.folder.resolve().parent == self._run:
                self.folder.rmdir()  # the last of them


def run_label(folder: Path) -> str:
    """What a run in `folder` is called at Prometheus."""
    return label(folder.resolve().name) or "run"


def label(text: str) -> str:
    """A value that Prometheus, terminals and alerts take: printable, and not long."""
    return "".join(c if c.isprintable() else "?" for c in text[:LONGEST])
