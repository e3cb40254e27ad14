"""A data set and what lies around it: the halves of one ingest (`train`, `probe`), its ledger, its labels.

A command about data at rest takes the folder of a data set or the one above; what concerns an image as such (a takedown,
a census) then reaches all halves. The ledger belongs to the folder above, however one of its halves was named.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .manifest import DATASET, Manifest

LEDGER = "ledger"
REWRITE = ".rewrite"  # in a data set: the work of rewrite.py
COMMITTED = "commit"


@dataclass(frozen=True)
class Collection:
    """`root` holds the ledger and the labels, if there are any; `parts` are the data sets that are meant."""

    root: Path
    parts: tuple[Path, ...]

    @property
    def ledger(self) -> bool:
        """Whether an ingest left its ledger here."""
        return (self.root / LEDGER / "000.json").is_file()

    def name(self, part: Path, url: str) -> str:
        """How a shard is called: by its data set too, where there are several."""
        return f"{part.name}/{url}" if len(self.parts) > 1 else url


def open_collection(place: str | Path) -> Collection:
    """The data set in a folder, or those right below it. Raises ManifestError if there is none."""
    folder = Path(place)
    if not _is_dataset(folder):
        parts = sorted((path for path in folder.glob("*") if _is_dataset(path)), key=lambda path: path.name != "train")
        if not parts:
            Manifest.open(folder)  # says what is missing
        return Collection(folder, tuple(parts))
    above = folder.absolute().parent
    return Collection(above if (above / LEDGER / "000.json").is_file() else folder, (folder,))


def _is_dataset(folder: Path) -> bool:
    """A rewriting that was killed has none of its files for a moment, and is finished by whoever comes next."""
    return (folder / DATASET).is_file() or (folder / REWRITE / COMMITTED).is_file()
