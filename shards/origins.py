"""Where a data set's images came from, and what became of all the others: the ledger, counted a unit at a time."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from .forgetting import FORGOTTEN
from .frequent import Frequent
from .ingest.candidate import Outcome
from .ingest.ledger import generations, last_rows

_COLUMNS = ["input", "locator", "outcome", "detail", "duplicate_of", "distance", "changed"]
# Of a locator: the host of a url, the tar before `::`, the table or list before `#`, else the folder.
_RULES = (r"^[a-z][a-z0-9+.-]*://(?P<s>[^/?#]+)", r"^(?P<s>.+?)::", r"^(?P<s>.+)#[0-9]+$", r"^(?P<s>.*)/[^/]*$")
NOWHERE = "(forgotten on request)"


@dataclass
class Origins:
    """The ledger in numbers. `inputs` by the reports of each ingest; `outcomes` by rows: the two must agree."""

    inputs: int = 0
    ingests: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    sources: Frequent = field(default_factory=Frequent)  # inputs by source
    kept: Frequent = field(default_factory=Frequent)  # kept ones by source
    changed: Counter[str] = field(
        default_factory=Counter
    )  # kept images with other bytes than their source's, by reason
    details: Frequent = field(default_factory=lambda: Frequent(10_000))
    duplicates: Frequent = field(default_factory=Frequent)  # by key of the kept one
    near: Frequent = field(default_factory=Frequent)
    distances: Counter[int] = field(default_factory=Counter)  # bits, of near duplicates
    forgotten: int = 0  # rows without an address on request

    @property
    def sums(self) -> bool:
        """Whether every input has exactly one outcome."""
        return self.outcomes.total() == self.inputs


def take_origins(root: Path) -> Origins:
    """Count the ledger of an ingest. Of an input that was taken up again, the last row counts: 8 bytes are held for each.

    Raises IngestError for a ledger that cannot be read.
    """
    found = Origins()
    for generation in generations(root):
        found.ingests += 1
        found.inputs += 0 if generation.about["kind"] == "retry" else generation.inputs
    for table in last_rows(root, _COLUMNS):
        _count(found, table)
    return found


def _count(found: Origins, table: pa.Table) -> None:
    outcome = table["outcome"]
    found.outcomes.update(_counts(outcome))
    source = sources_of(table["locator"].combine_chunks())
    kept = pc.equal(outcome, Outcome.KEPT)
    found.sources.update(_counts(source))
    found.kept.update(_counts(source.filter(kept.combine_chunks())))
    found.changed.update(_counts(table["changed"].filter(kept)))
    found.forgotten += pc.sum(pc.equal(table["detail"], FORGOTTEN)).as_py() or 0
    told = table.filter(pc.and_(pc.invert(kept), pc.is_valid(table["detail"])))
    reasons = pc.call_function("binary_join_element_wise", [told["outcome"], told["detail"], pa.scalar(": ")])
    found.details.update(_counts(reasons))
    for kind, groups in ((Outcome.DUPLICATE, found.duplicates), (Outcome.NEAR_DUPLICATE, found.near)):
        groups.update(_counts(table["duplicate_of"].filter(pc.equal(outcome, kind))))
    near = table["distance"].filter(pc.equal(outcome, Outcome.NEAR_DUPLICATE))
    found.distances.update({int(bits): count for bits, count in _counts(near).items()})


def _counts(column: pa.Array | pa.ChunkedArray) -> dict:
    counts = pc.value_counts(column)
    pairs = zip(counts.field(0).to_pylist(), counts.field(1).to_pylist(), strict=True)
    return {name: count for name, count in pairs if name is not None}


def sources_of(locator: pa.Array) -> pa.Array:
    """Host, tar, list or folder of locators: strings [n]; `NOWHERE` where there is none."""
    found = pa.nulls(len(locator), pa.string())
    for rule in _RULES:
        taken = pc.call_function("struct_field", [pc.extract_regex(locator, rule)], pc.StructFieldOptions([0]))
        found = pc.coalesce(found, taken)
    return pc.coalesce(found, locator, pa.scalar(NOWHERE))
