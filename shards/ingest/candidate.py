"""What passes through an ingest: units of work, candidates, and what became of each.

Every input ends in exactly one `Outcome`. Those in `PASSING` say something about the network on that day and not about
the image: `--retry-failed` takes them up again, and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class Outcome(StrEnum):
    """What became of an input. The values stand in ledgers and metrics, and never change."""

    KEPT = "kept"
    DUPLICATE = "duplicate"  # the same bytes came earlier
    NEAR_DUPLICATE = "near_duplicate"  # an earlier image looks the same
    FILTERED = "filtered"  # by the user's own filter
    TOO_SMALL = "too_small"
    TOO_LARGE = "too_large"  # bytes
    TOO_MANY_PIXELS = "too_many_pixels"
    ASPECT = "aspect"
    NOT_AN_IMAGE = "not_an_image"
    BROKEN = "broken"  # an image that does not decode
    UNREADABLE = "unreadable"  # a file, member or row that cannot be read
    BAD_URL = "bad_url"
    BLOCKED_ADDRESS = "blocked_address"  # private, loopback, link-local, metadata
    OPTED_OUT = "opted_out"  # X-Robots-Tag: noai, noimageai, noindex, noimageindex
    GONE = "gone"  # 4xx but for those below
    NO_HOST = "no_host"
    NO_CONNECTION = "no_connection"
    TIMED_OUT = "timed_out"
    CUT = "cut"  # the connection was lost, or fewer bytes came than were announced
    SERVER_ERROR = "server_error"  # 5xx, 429, 408, 425
    REDIRECTS = "redirects"  # too many, or in a circle


PASSING = frozenset(
    {Outcome.NO_HOST, Outcome.NO_CONNECTION, Outcome.TIMED_OUT, Outcome.CUT, Outcome.SERVER_ERROR, Outcome.UNREADABLE}
)


@dataclass(frozen=True)
class Unit:
    """A run of `count` consecutive inputs of one source, the first of which has number `first` in the whole plan."""

    number: int
    kind: str  # files, tar, table, urls
    place: str  # the file that is read: a frozen list under the work folder, a tar, a Parquet file; path or url
    start: int  # first row or member in it
    count: int
    first: int
    detail: dict[str, Any] = field(default_factory=dict)  # what reading this kind needs besides, JSON alone


@dataclass
class Candidate:
    """One input. Either `data` or `problem` is there once it was read (and, with a `url`, fetched)."""

    number: int  # in the whole plan
    locator: str  # how a person finds it: path, tar::member, file.parquet#row, url; no secret in it
    data: bytes | None = None
    url: str | None = field(default=None, repr=False)  # to fetch; may hold a secret
    meta: dict[str, Any] = field(default_factory=dict)  # what came along: JSON values
    labels: tuple[str, ...] = ()  # folders above a file, which may name classes
    problem: tuple[Outcome, str] | None = None


@dataclass
class Row:
    """What a worker found out about one input: the row of the ledger, before duplicates are known.

    `digest` is the blake2b-128 of the source's bytes, `fingerprint` the perceptual hash (fingerprint.py), `offset` and
    `length` the place of the sample's bytes in the unit's spool.
    """

    number: int
    locator: str
    outcome: Outcome
    detail: str = ""
    digest: bytes = b""
    fingerprint: bytes = b""
    offset: int = 0
    length: int = 0
    format: str = ""
    width: int = 0
    height: int = 0
    crc32: int = 0
    changed: str = ""  # why the bytes are not the source's own; empty if they are
    colours: str = ""  # how the source differs from plain RGB (refine.py)
    received: int = 0  # bytes of the source
    meta: dict[str, Any] = field(default_factory=dict)
    labels: tuple[str, ...] = ()
