"""Sources of an ingest: folders, tars, tables and lists of urls, here or far away, as one numbered sequence of inputs.

`plan` lists them once and freezes what it found, so that an ingest that was killed goes on with the same inputs, even
where a folder has grown meanwhile; `read_unit` reads a thousand of them, on any process or machine that sees the plan.
The order is that of the sources as they were given, of the paths within a folder (by their parts), of the members
within a tar, and of the rows within tables and lists.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from ..addresses import scheme_of
from ..places import find_shards
from ..storage import claimed
from .archives import Contents, list_tar, read_members
from .candidate import Candidate, Unit
from .errors import IngestError
from .folders import IMAGES, TEXTS, Found, kind_of, read_files, walk
from .frozen import PLAN, Freezer, read_group, write_roots
from .lists import URLS, list_candidates, lost, read_list
from .places import absolute, fingerprint, is_folder, join, name_of, show
from .plan import Plan, roots_of
from .tables import Columns, Table, cut, image_column, kept_scalars, read_rows, url_column
from .trouble import DAMAGE, problem_of

FILES = pa.schema([("path", pa.binary())])  # relative to the source; empty for a source that is a file itself
UNIT = 1000
_RECORD = {"url", "key", "status", "error_message"}  # columns of img2dataset's report on a shard
_PASSED = {"": "files of other kinds", "text": "text files in folders", "ours": "files of Gristmill's own"}
_PACKED = "a compressed tar: unpack it, for members in the middle of it cannot be reached"


def plan(
    sources: Sequence[str | Path],
    work: str | Path,
    *,
    unit: int = UNIT,
    keep: Sequence[str] = (),
    image: str | None = None,
    url: str | None = None,
) -> Plan:
    """Freeze the inputs of `sources` into the folder `work`, or open the plan that is there.

    A unit holds `unit` inputs at most. `keep` names columns of tables and lists that go along (`*`: all), `image` and
    `url` the columns that hold those. Raises IngestError, for another plan than asked for too; storage that does not
    answer raises StorageError. Afterwards there is a whole plan or none.
    """
    folder, given = Path(work), [absolute(str(source)) for source in sources]
    if not given:
        raise IngestError("name at least one source: a folder, a tar, a Parquet file or a list of urls")
    columns = Columns(tuple(keep), image, url)
    asked: dict[str, Any] = {
        "sources": [show(source) for source in given],
        "prints": [fingerprint(source) for source in given],
        "unit": unit,
        "keep": list(keep),
        "image": image,
        "url": url,
    }
    roots = [root for source in given for root in _expanded(source)]
    try:
        with claimed(folder, IngestError(f"{folder} is being planned by another ingest: wait for it")):
            if (folder / PLAN).exists():
                found = Plan.open(folder)
                found.require(asked)
                if roots != roots_of(folder):  # signed anew
                    write_roots(folder, roots)
                return found
            _freeze(folder, roots, asked, columns)
    except OSError as error:
        raise IngestError(
            f"the inputs cannot be written down in {folder} ({error.strerror or error}): make room or rights there; "
            "nothing half-written was left"
        ) from error
    return Plan.open(folder)


def _freeze(folder: Path, roots: list[str], asked: dict[str, Any], columns: Columns) -> None:
    freezer = Freezer(folder, asked["unit"])
    try:
        for number, root in enumerate(roots):
            before = freezer.inputs
            _Source(freezer, number, root, columns).freeze()
            if freezer.inputs == before:
                raise IngestError(f"no image, tar, table or list in {show(root)}: {_looked()}")
        freezer.publish(asked, roots)
    except BaseException:
        freezer.discard()
        raise


def _expanded(source: str) -> list[str]:
    """A source, or all that a pattern as `x-{000..127}.tar` stands for. Raises PlacesError."""
    # Google's storage is none that find_shards knows, and a folder may have a brace in its name.
    braces = "{" in source and scheme_of(source) != "gs" and not os.path.lexists(source)
    return find_shards([source]) if braces else [source]


def _looked() -> str:
    return f"sources are folders, {', '.join(IMAGES)}, .tar, .parquet and lists ({', '.join(TEXTS)}, also .gz)"


class _Source:
    """One source on its way into the plan."""

    def __init__(self, freezer: Freezer, number: int, root: str, columns: Columns) -> None:
        self.freezer, self.number, self.root, self.columns = freezer, number, root, columns

    def freeze(self) -> None:
        if not is_folder(self.root):
            self._file("", kind_of(name_of(self.root)), named=True)
            return
        for images, found in groupby(walk(self.root), key=lambda one: one.kind == "image"):
            if images:
                self._images(found)
            else:
                for one in found:
                    self._file(one.inside, one.kind, named=False)

    def _detail(self, inside: str) -> dict[str, Any]:
        return {"root": self.number, "inside": inside}

    def _images(self, found: Iterable[Found]) -> None:
        def batches() -> Iterator[pa.RecordBatch]:
            names = (os.fsencode(one.inside) for one in found)
            while part := list(islice(names, self.freezer.unit)):
                yield pa.RecordBatch.from_pydict({"path": part}, schema=FILES)

        self.freezer.rows("files", batches(), show(self.root), self._detail(""))

    def _file(self, inside: str, kind: str, *, named: bool) -> None:
        """Take up a file that is no image of a folder. `named`: the user meant this one, so what is wrong is an error."""
        place = join(self.root, inside)
        if kind == "tar":
            self._tar(inside, place, named)
        elif kind in ("parquet", "record"):
            self._parquet(inside, place, kind == "record", named)
        elif kind == "packed":
            self._refuse(inside, place, _PACKED, named)
        elif not named:
            self.freezer.passed[_PASSED[kind]] += 1
        elif kind == "text":
            self._list(inside, place)
        elif kind == "image" and scheme_of(place) in ("http", "https"):
            row = {"row": [0], "url": [place], "meta": [None], "problem": [None]}
            one = pa.RecordBatch.from_pydict(row, schema=URLS)
            self.freezer.rows("urls", [one], show(place), self._detail(inside))
        elif kind == "image":
            self._images([Found("", "image")])
        else:
            raise IngestError(f"{show(place)} is no source that is known: {_looked()}")

    def _tar(self, inside: str, place: str, named: bool) -> None:
        found: Contents = list_tar(place)
        if not found.images and found.problem is not None:
            self._refuse(inside, place, found.problem, named)
            return
        if not found.images and not named:
            self.freezer.passed["tars without an image"] += 1
        self.freezer.passed += found.passed
        detail = {**self._detail(inside), "identity": found.identity}
        self.freezer.rows("tar", found.batches(self.freezer.unit), show(place), detail)

    def _parquet(self, inside: str, place: str, record: bool, named: bool) -> None:
        try:
            with Table(place) as table:
                schema, groups, identity = table.schema, table.groups(), table.identity
        except (OSError, *DAMAGE) as error:
            self._refuse(inside, place, problem_of(error)[1], named)
            return
        if record and _RECORD.issubset(schema.names):
            self.freezer.passed["img2dataset's reports on its shards"] += 1
            return
        columns = self.columns
        column = image_column(schema, columns.image, place)
        asked_for_urls = columns.image is None and columns.url is not None and columns.url in schema.names
        if column is not None and not asked_for_urls:
            keep = kept_scalars(schema, columns.keep, column, place)
            detail = {**self._detail(inside), "identity": identity, "column": column, "keep": keep}
            for start, count in cut(groups, self.freezer.unit):
                self.freezer.stretch("table", show(place), start, count, detail)
        elif named or url_column(schema.names, columns.url, place) is not None:
            self._list(inside, place)
        else:
            self.freezer.passed["Parquet files without a column of images or urls"] += 1

    def _list(self, inside: str, place: str) -> None:
        self.freezer.rows("urls", read_list(place, self.columns, self.freezer.unit), show(place), self._detail(inside))

    def _refuse(self, inside: str, place: str, problem: str, named: bool) -> None:
        """A file that cannot be read: one input stands for it, unless the user named just this one."""
        if named:
            raise IngestError(f"{show(place)} cannot be taken in ({problem}): restore it, or leave it out")
        self.freezer.rows("urls", [lost(0, problem)], show(place), self._detail(inside))


def read_unit(unit: Unit, work: str | Path) -> Iterator[Candidate]:
    """The candidates of a unit of the plan in `work`, in order, `unit.count` of them, one at a time.

    What is wrong with an input is its `problem`. Raises IngestError if the plan is damaged, StorageError if storage does
    not answer, and OSError and MemoryError where this machine has no more of something.
    """
    folder, detail = Path(work), unit.detail
    root = roots_of(folder)[detail["root"]]
    place = join(root, detail["inside"])
    if unit.kind == "table":
        found = read_rows(place, detail["identity"], detail["column"], detail["keep"], unit.start, unit.count)
    else:
        rows = read_group(folder, unit)
        if unit.kind == "files":
            found = read_files(root, (os.fsdecode(row["path"]) for row in rows))
        elif unit.kind == "tar":
            found = read_members(place, detail["identity"], rows)
        else:
            found = list_candidates(place, rows)
    for number, candidate in enumerate(found, start=unit.first):
        candidate.number = number
        yield candidate
