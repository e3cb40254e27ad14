"""The manifest: which sample lies where in which shard, as Parquet beside the tars.

A data set is a folder: `*.tar`, `shards.parquet` (a row a shard: url, samples, bytes, digest, and for shards made by
others the identity that their storage gave them: time of change, etag), `samples/*.parquet` (a
row a sample, one row group a shard, 512 groups a file, for a footer grows with its groups) and `dataset.json`, written
last, whose presence says that the rest is complete. The digest names the data set: the hash over each shard's name and
digest, which in turn hashes its keys, offsets and lengths. So opening costs O(shards), a shard's rows are read and
checked when first asked for, and checksums or sizes that are found later do not make it another data set.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import ArrayLike

from .addresses import SCHEMES, beside, scheme_of
from .errors import GristmillError
from .texts import Few, Texts

SCHEMA = 1
DATASET, SHARDS, SAMPLES = "dataset.json", "shards.parquet", "samples"
GROUPS = 512  # row groups a file: 5,000 of them made a footer of 4.5 MB
FOOTERS = 8  # files kept open: a footer of 512 groups takes 3 MB in memory, and shards are asked for in their order

SHARD_FIELDS = pa.schema(
    [
        ("url", pa.string()),
        ("samples", pa.int64()),
        ("bytes", pa.int64()),
        ("digest", pa.string()),
        ("identity", pa.string()),  # may be missing, and null: then checksums stand in for it
    ]
)
SAMPLE_FIELDS = pa.schema(
    [
        ("key", pa.string()),
        ("offset", pa.int64()),
        ("length", pa.int64()),
        ("crc32", pa.uint32()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("format", pa.string()),
    ]
)


class ManifestError(GristmillError):
    """A folder that is no data set, not a whole one, or one of another version."""


@dataclass(frozen=True)
class Rows:
    """The samples of one shard, in the order in which they lie in the tar; n of them.

    `offset` and `length` are those of the image member's bytes in the tar. `width` and `height` are upright: after the
    EXIF orientation was applied. `format` is the image member's suffix: "jpg", "png", "webp". Where `deep` is false
    only headers were read, and `crc32`, `width` and `height` are zeros that mean nothing. Where `deep` is true, a width
    of zero says that the image did not decode when it was indexed.
    """

    keys: Sequence[str]
    offset: np.ndarray  # int64 [n]
    length: np.ndarray  # int64 [n]
    crc32: np.ndarray  # uint32 [n]
    width: np.ndarray  # int32 [n], pixels
    height: np.ndarray  # int32 [n], pixels
    format: Sequence[str | None]
    deep: bool = True

    def __len__(self) -> int:
        return len(self.keys)

    @cached_property
    def places(self) -> np.ndarray:
        """int64 [n, 4] for whoever needs all of a sample at once: offset, length, crc32, width | height << 32."""
        return _placed(self.offset, self.length, self.crc32, self.width, self.height)

    @cached_property
    def undecoded(self) -> int:
        """How many of the rows have no width: of a deep index, those that did not decode."""
        return len(self) - int(np.count_nonzero(self.width))

    def digest(self) -> str:
        """Identity of the rows: keys, offsets and lengths, as blake2b-128 hex."""
        parts = ["\0".join(self.keys[:]).encode()]
        parts += [np.ascontiguousarray(column, dtype="<i8").tobytes() for column in (self.offset, self.length)]
        return _hash(parts)


def _hash(parts: Iterable[bytes]) -> str:
    state = hashlib.blake2b(digest_size=16)
    for part in parts:
        state.update(len(part).to_bytes(8, "little"))  # so that no two lists of parts run together alike
        state.update(part)
    return state.hexdigest()


def dataset_digest(urls: Iterable[str], digests: Iterable[str]) -> str:
    """Identity of a data set: its shards' names and digests, in order."""
    return _hash(text.encode() for pair in zip(urls, digests, strict=True) for text in pair)


class Manifest:
    """An opened data set. Safe to share between threads.

    Attributes: `root` (the folder), `digest` (hex, the data set's identity), `samples`, `bytes` (of all tars),
    `counts` int64 [S] and `shard_bytes` int64 [S] for the S shards, `urls` (relative to the root, or absolute where a
    shard lies outside of it), `digests`, `identities` (None where none was taken down).
    """

    def __init__(self, root: Path, digest: str, shards: pa.Table, cache_rows: int) -> None:
        self.root = root
        self.digest = digest
        self.urls: Sequence[str] = Texts(shards["url"])
        self.digests: Sequence[str] = Texts(shards["digest"])
        self.identities: Sequence[str | None] = (
            Few.of(shards["identity"]) if "identity" in shards.column_names else [None] * len(self.urls)
        )
        self.counts: np.ndarray = shards["samples"].to_numpy().astype(np.int64)
        self.shard_bytes: np.ndarray = shards["bytes"].to_numpy().astype(np.int64)
        self.samples = int(self.counts.sum())
        self.bytes = int(self.shard_bytes.sum())
        self._cache_rows = cache_rows
        self._cached = 0
        self._rows: OrderedDict[int, Rows] = OrderedDict()
        self._files: OrderedDict[int, pq.ParquetFile] = OrderedDict()
        self._lock = threading.Lock()

    @classmethod
    def open(cls, path: str | Path, *, cache_rows: int = 1 << 23) -> Manifest:
        """Open the data set in a folder, or raise ManifestError. `cache_rows` bounds the rows kept in memory, at about
        50 bytes each; the last shard asked for is kept whatever its size."""
        root = Path(path)
        about = _read_about(root)
        try:
            with pq.ParquetFile(root / SHARDS) as file:  # read_table would load Arrow's whole engine for data sets
                shards = file.read(use_threads=False)
        except (OSError, pa.ArrowException) as error:
            raise ManifestError(f"{root / SHARDS} cannot be read ({error}): make the data set again") from error
        if not shards.schema.equals(SHARD_FIELDS) and not shards.schema.equals(SHARD_FIELDS.remove(4)):
            raise ManifestError(f"{root / SHARDS} has other columns than a manifest's: make the data set again")
        try:
            found = dataset_digest(Texts(shards["url"]), Texts(shards["digest"]))
        except ValueError as error:
            raise ManifestError(f"{root / SHARDS} cannot be read ({error}): make the data set again") from error
        if found != about["digest"]:
            raise ManifestError(
                f"{root / SHARDS} describes data set {found[:12]}, but {DATASET} says {str(about['digest'])[:12]}: "
                "the folder mixes two data sets; make it again"
            )
        manifest = cls(root, found, shards, cache_rows)
        if manifest.samples == 0:
            raise ManifestError(f"the data set in {root} has no sample: make it again from a folder with images")
        return manifest

    base: str | None = None  # url of the folder that this manifest is a copy of, for shards beside it (mirror.py)

    def path(self, shard: int) -> Path:
        """Where a local shard lies."""
        return self.root / self.urls[shard]

    def place(self, shard: int) -> str:
        """Where a shard lies: a path or a url, which may hold a secret."""
        url = self.urls[shard]
        if scheme_of(url) in SCHEMES:
            return url
        return str(self.root / url) if self.base is None else beside(self.base, url)

    def rows(self, shard: int) -> Rows:
        """The samples of a shard, from memory or from Parquet. Raises ManifestError if they are not as written."""
        with self._lock:
            rows = self._rows.get(shard)
            if rows is not None:
                self._rows.move_to_end(shard)
                return rows
            rows = self._load(shard)
            self._rows[shard] = rows
            self._cached += len(rows)
            while self._cached > self._cache_rows and len(self._rows) > 1:
                _, old = self._rows.popitem(last=False)
                self._cached -= len(old)
            return rows

    def _load(self, shard: int) -> Rows:
        number, group = divmod(shard, GROUPS)
        path = self.root / SAMPLES / f"{number:05d}.parquet"
        try:
            if number not in self._files:
                self._files[number] = pq.ParquetFile(path)
                if len(self._files) > FOOTERS:
                    self._files.popitem(last=False)[1].close()
            self._files.move_to_end(number)
            rows = rows_of_table(self._files[number].read_row_group(group, use_threads=False))
        except (OSError, KeyError, IndexError, ValueError, pa.ArrowException) as error:
            raise ManifestError(
                f"rows of shard {self.urls[shard]} cannot be read from {path} ({error}): make the data set again"
            ) from error
        if rows.digest() != self.digests[shard]:
            raise ManifestError(
                f"rows of shard {self.urls[shard]} in {path} are not those of {SHARDS}: the folder mixes two data "
                "sets or is damaged; make it again"
            )
        return rows


def _read_about(root: Path) -> dict[str, Any]:
    if not root.is_dir():
        raise ManifestError(f"{root} is no folder: name one that `gristmill ingest` or `gristmill index` wrote")
    try:
        about = json.loads((root / DATASET).read_text(encoding="utf-8"))
    except FileNotFoundError:
        if (root / ".rewrite" / "commit").exists():  # rewrite.py
            raise ManifestError(
                f"{root} is being rewritten without removed samples, and that was interrupted: finish it by `gristmill remove "
                f"{root} --rewrite --reason ...`"
            ) from None
        # Right below it lie the halves of an ingest; below `data`, those of a demo's run.
        found = list(root.glob(f"*/{DATASET}")) or list(root.glob(f"data/*/{DATASET}"))
        inside = sorted(str(entry.parent.relative_to(root)) for entry in found)
        if inside:
            raise ManifestError(
                f"{root} is no data set but holds {', '.join(inside)}: name {root / inside[-1]}"
            ) from None
        raise ManifestError(
            f"{root} is no data set ({DATASET} is missing): either `gristmill ingest` never wrote it or it was "
            "interrupted; run it again. Tars that others made want `gristmill index` first"
        ) from None
    except (OSError, ValueError) as error:
        raise ManifestError(f"{root / DATASET} cannot be read ({error}): make the data set again") from error
    if not isinstance(about, dict) or not {"schema", "digest", "samples", "bytes"} <= about.keys():
        raise ManifestError(f"{root / DATASET} is not Gristmill's: name a folder that `gristmill ingest` wrote")
    if about["schema"] != SCHEMA:
        raise ManifestError(
            f"{root} was written with manifest version {about['schema']}, this Gristmill reads version {SCHEMA}: "
            "make the data set again, or use the release that wrote it"
        )
    return about


def rows_of_table(table: pa.Table) -> Rows:
    """The rows that `writer.table_of` wrote."""
    columns = [table[name].fill_null(0).to_numpy() for name in ("offset", "length", "crc32", "width", "height")]
    places = _placed(*columns)
    sizes, words = places.view("<i4"), places.view("<u4")
    rows = Rows(
        keys=Texts(table["key"]),
        offset=places[:, 0],
        length=places[:, 1],
        crc32=words[:, 4],
        width=sizes[:, 6],
        height=sizes[:, 7],
        format=Few.of(table["format"]),
        deep=table["crc32"].null_count == 0,
    )
    vars(rows)["places"] = places  # of which the columns are views
    return rows


def _placed(offset: ArrayLike, length: ArrayLike, crc32: ArrayLike, width: ArrayLike, height: ArrayLike) -> np.ndarray:
    places = np.zeros((len(np.asarray(offset)), 4), "<i8")
    places[:, 0], places[:, 1], places[:, 2] = offset, length, crc32
    sizes = places.view("<i4")
    sizes[:, 6], sizes[:, 7] = width, height
    return places
