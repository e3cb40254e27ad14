"""What an ingest remembers of inputs, and how it forgets them: where an image came from, its captions, its classes.

A ledger keeps a row for every input for ever. Of one that is to be forgotten the locator goes, and all that came along with
it; key and fingerprint stay, which tell nobody anything but that these bytes, or a picture that looks like them, must not
come back. Each file is replaced whole, and forgetting twice is forgetting once, so that a kill leaves work, no damage.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from .addresses import redact
from .errors import GristmillError
from .ingest.candidate import PASSING, Outcome
from .ingest.ledger import LEDGER, close_generation, folder_of, generations, rows_of
from .ingest.lists import check_url
from .ingest.plan import Plan
from .ingest.workplace import Workplace
from .labels import LABELS
from .storage import published

FORGOTTEN = "removed on request"
_ORIGIN = ("locator", "labels", "meta")


@dataclass
class Known:
    """What the ledger knows of one address: a row for each input that it names, the last one of each."""

    asked: str
    rows: list[dict[str, Any]] = field(default_factory=list)


def look_up(root: Path, addresses: Iterable[str]) -> list[Known]:
    """Rows of the ledger by url, or by locator as it stands there. Memory holds the rows found, and a unit at a time.

    A url with a query is told from others of the same path by the frozen inputs; GristmillError where those are gone.
    """
    known = [Known(address) for address in addresses]
    safe = {one.asked: _safe(one.asked) for one in known}
    wanted = pa.array(sorted({*safe, *safe.values()}), pa.string())
    found: dict[str, dict[int, dict[str, Any]]] = {}
    columns = ["input", "locator", "outcome", "detail", "key", "duplicate_of", "distance"]
    for generation in generations(root):
        for table in rows_of(root, generation.number, columns):
            locator = table["locator"].combine_chunks()
            # A url that lost its query is followed by the list and the row that it came from.
            parts = pc.split_pattern(locator, " (", max_splits=1)
            bare = pc.call_function("list_element", [parts, pa.scalar(0)])
            hits = pc.or_(pc.is_in(locator, wanted), pc.is_in(bare, wanted))
            if not pc.any(hits).as_py():
                continue
            for row in table.filter(hits).to_pylist():
                for name in {row["locator"], row["locator"].partition(" (")[0]}:
                    found.setdefault(name, {})[row["input"]] = row
    for one in known:
        rows = found.get(one.asked, {})
        if not rows and (alike := found.get(safe[one.asked])):
            rows = _exactly(root, one.asked, alike)
        one.rows = [rows[number] for number in sorted(rows)]
    return known


def by_key(root: Path, key: str) -> list[dict[str, Any]]:
    """Rows of the ledger with this key: what became of an image."""
    found = []
    for generation in generations(root):
        for table in rows_of(root, generation.number, ["input", "outcome", "key", "duplicate_of", "distance"]):
            hits = pc.equal(table["key"], key)
            if pc.any(hits).as_py():
                found += table.filter(hits).to_pylist()
    return found


def forget(root: Path, keys: Iterable[str], inputs: Iterable[int]) -> int:
    """Forget all inputs with these keys or numbers, in frozen inputs, labels and ledger; how many rows of the ledger.

    What had failed in a way that may pass becomes `opted_out`, so that no retry fetches it. The ledger comes last, for
    by it an address is known. OSError passes through.
    """
    gone, numbers = pa.array(sorted(set(keys)), pa.string()), set(inputs)
    known = generations(root)
    paths = [sorted(folder_of(root, generation.number).glob("*.parquet")) for generation in known]
    for path in [path for some in paths for path in some]:
        numbers |= _inputs_of(path, gone)
    for generation in known:
        if generation.about["kind"] != "retry":
            own = {n - generation.base for n in numbers if generation.base <= n < generation.base + generation.inputs}
            _forget_urls(Workplace(root, generation.number).inputs, own)
    if (root / LABELS).is_file():
        _forget_labels(root / LABELS, gone)
    count, named = 0, pa.array(sorted(numbers), pa.int64())
    for generation, some in zip(known, paths, strict=True):
        count += sum(_forget_rows(path, named) for path in some)
        outcomes: Counter[str] = Counter()
        for table in rows_of(root, generation.number, ["outcome"]):
            outcomes.update(table["outcome"].to_pylist())
        if dict(outcomes) != generation.about.get("outcomes"):
            close_generation(root, generation.number, {**generation.about, "outcomes": dict(sorted(outcomes.items()))})
    return count


def unfinished(root: Path) -> bool:
    """Whether an ingest to `root` is under way, or was interrupted."""
    return (root / LEDGER).is_dir() and Workplace(root, len(generations(root))).begun


def _safe(address: str) -> str:
    """An address as a locator shows it."""
    if not address.lower().startswith(("http://", "https://")):
        return address
    return redact(address.strip().replace(" ", "%20"))


def _exactly(root: Path, url: str, rows: dict[int, dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """Those of the rows whose url, secret parts included, is this one."""
    wanted = check_url(url)
    exact = {}
    for generation in generations(root):
        if generation.about["kind"] == "retry":
            continue
        own = [number for number in rows if generation.base <= number < generation.base + generation.inputs]
        if not own:
            continue
        folder = Workplace(root, generation.number).inputs
        try:
            there = dict(_urls(folder, [number - generation.base for number in own]))
        except (GristmillError, OSError) as error:
            raise GristmillError(
                f"the ledger shows addresses without what follows the question mark, and {folder}, which has all of them, "
                f"cannot be read ({error}): name the locator instead, one of "
                + ", ".join(repr(rows[number]["locator"]) for number in own[:5])
            ) from error
        exact |= {number: rows[number] for number in own if there.get(number - generation.base) == wanted}
    return exact


def _urls(folder: Path, numbers: Iterable[int]) -> Iterator[tuple[int, str | None]]:
    for number, (path, group, row) in _places(folder, numbers):
        with pq.ParquetFile(path) as file:
            url = file.read_row_group(group, columns=["url"], use_threads=False)["url"][row].as_py()
        yield number, url and url.strip().replace(" ", "%20")


def _places(folder: Path, numbers: Iterable[int]) -> Iterator[tuple[int, tuple[Path, int, int]]]:
    """Where the urls of these inputs of a plan are written down: file, row group, row."""
    plan = Plan.open(folder)
    firsts: list[int] = []
    for number in sorted(numbers):
        firsts = firsts or plan_firsts(folder)
        unit = plan.unit(bisect_right(firsts, number) - 1)
        if unit.kind == "urls":
            yield number, (folder / str(unit.detail["list"]), int(unit.detail["group"]), number - unit.first)


def plan_firsts(folder: Path) -> list[int]:
    """The first input of every unit of the plan in a folder."""
    from .ingest.frozen import UNITS

    return pq.read_table(folder / UNITS, columns=["first"], use_threads=False)["first"].to_pylist()


def _inputs_of(path: Path, keys: pa.Array) -> set[int]:
    """Inputs of one file of the ledger with these keys."""
    found: set[int] = set()
    with pq.ParquetFile(path) as file:
        for group in range(file.num_row_groups):
            table = file.read_row_group(group, columns=["input", "key"], use_threads=False)
            found |= set(table["input"].filter(pc.is_in(table["key"], keys)).to_pylist())
    return found


def _forget_rows(path: Path, numbers: pa.Array) -> int:
    """Rows of one file of the ledger that were forgotten now."""
    count = 0
    with pq.ParquetFile(path) as file:
        for group in range(file.num_row_groups):
            table = file.read_row_group(group, columns=["input", "detail"], use_threads=False)
            fresh = pc.not_equal(table["detail"], FORGOTTEN).fill_null(True)
            count += pc.sum(pc.and_(pc.is_in(table["input"], numbers), fresh)).as_py() or 0
        if count:
            with published(path) as out, pq.ParquetWriter(out, file.schema_arrow, compression="zstd") as writer:
                for group in range(file.num_row_groups):
                    table = file.read_row_group(group, use_threads=False)
                    hits = pc.is_in(table["input"], numbers)
                    writer.write_table(_without(table, hits), row_group_size=max(1, len(table)))
    return count


def _without(table: pa.Table, hits: pa.ChunkedArray) -> pa.Table:
    for name in _ORIGIN:
        at, kind = table.column_names.index(name), table.schema.field(name).type
        values = [None if hit else value for hit, value in zip(hits.to_pylist(), table[name].to_pylist(), strict=True)]
        table = table.set_column(at, table.schema.field(at), pa.array(values, kind))
    detail = pc.if_else(hits, pa.scalar(FORGOTTEN), table["detail"])
    table = table.set_column(table.column_names.index("detail"), table.schema.field("detail"), detail)
    passing = pc.and_(hits, pc.is_in(table["outcome"], pa.array([str(one) for one in PASSING])))
    outcome = pc.if_else(passing, pa.scalar(str(Outcome.OPTED_OUT)), table["outcome"])
    return table.set_column(table.column_names.index("outcome"), table.schema.field("outcome"), outcome)


def _forget_urls(folder: Path, numbers: set[int]) -> None:
    """Take urls out of the frozen inputs; a row stays, as one without a url. Nothing where the inputs are gone."""
    if not numbers or not (folder / "plan.json").is_file():
        return
    files: dict[Path, dict[int, set[int]]] = {}
    for _, (path, group, row) in _places(folder, numbers):
        files.setdefault(path, {}).setdefault(group, set()).add(row)
    for path, groups in files.items():
        with pq.ParquetFile(path) as file:
            tables = (file.read_row_group(group, use_threads=False) for group in range(file.num_row_groups))
            with published(path) as out, pq.ParquetWriter(out, file.schema_arrow, compression="zstd") as writer:
                os.chmod(out.beside, 0o600)
                for group, table in enumerate(tables):
                    gone = pa.array([row in groups.get(group, ()) for row in range(len(table))])
                    for name in ("url", "meta"):
                        left = pc.if_else(gone, pa.scalar(None, pa.string()), table[name])
                        table = table.set_column(table.column_names.index(name), table.schema.field(name), left)
                    writer.write_table(table, row_group_size=max(1, len(table)))


def _forget_labels(path: Path, keys: pa.Array) -> None:
    with pq.ParquetFile(path) as file:
        groups = range(file.num_row_groups)
        if not any(pc.any(pc.is_in(file.read_row_group(g, columns=["key"])["key"], keys)).as_py() for g in groups):
            return
        with published(path) as out, pq.ParquetWriter(out, file.schema_arrow, compression="zstd") as writer:
            for group in groups:
                table = file.read_row_group(group, use_threads=False)
                writer.write_table(table.filter(pc.invert(pc.is_in(table["key"], keys))))
