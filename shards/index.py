"""From a tar's members to samples: grouped as webdataset groups them, one image a sample, all else counted.

Neighbours whose names agree up to the first dot of the last part are one sample: `a/b/key.jpg`, `a/b/key.json`. The
folder is part of the key, so equal file names in two folders are two samples. A key that comes again later in the shard
is a sample of its own, as it is for webdataset; a suffix that comes twice in one sample is an error, as it is there.
Names are only ever keys: nothing here, and nothing that reads a shard, uses one as a path, so that an absolute one or
one with `..` does no harm; they are counted.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from .archive import Members, ShardError, scan
from .blob import Blob
from .manifest import Rows

IMAGES = {"jpg": 0, "jpeg": 1, "png": 2, "webp": 3}  # the order of preference where a sample has several
_FORMATS = {suffix: "jpg" if suffix == "jpeg" else suffix for suffix in IMAGES}
_META = re.compile(r"__[^/]*__($|/)")  # webdataset's own entries

LINKS = "links, devices and pipes, never followed"
HIDDEN = "hidden files and names without a suffix"
SIDES = "members beside the image"
BARE = "samples without an image"
OUTSIDE = "names that are absolute or hold `..`, used as keys alone"
AGAIN = "keys that come again in their shard"


@dataclass
class Sampled:
    """The samples of a shard, which member is the image of each, and what was passed over."""

    rows: Rows
    members: Members
    images: list[int]
    counts: Counter[str] = field(default_factory=Counter)


def index_shard(source: Blob | str | Path) -> Rows:
    """The samples of a tar that hold an image, in order; `crc32`, `width` and `height` are left at zero.

    Members without an image beside them, and webdataset's own `__meta__` entries, are no samples. Raises ShardError for
    anything that is not a whole, plain tar with at least one image.
    """
    found = sample_shard(source)
    if not len(found.rows):
        looked = ", ".join(IMAGES)
        shard = source if isinstance(source, (str, Path)) else source.url
        raise ShardError(shard, 0, f"no sample with an image (looked for {looked})", "leave it out of the data set")
    return found.rows


def members(source: Blob | str | Path) -> list[tuple[str, int, int]]:
    """All regular files of a tar, in order: name, offset and length of the bytes. Raises ShardError."""
    found = scan(source)
    return list(zip(found.names, found.offsets.tolist(), found.lengths.tolist(), strict=True))


def split_name(name: str) -> tuple[str, str]:
    """Key and suffix of a member; the key is empty if it belongs to no sample."""
    at = name.rfind("/") + 1
    dot = name.find(".", at)
    if dot <= at or (name[:2] == "__" and _META.match(name)):
        return "", ""
    return name[:dot], name[dot + 1 :]


def sample_shard(source: Blob | str | Path) -> Sampled:
    """The samples with an image, perhaps none, the members behind them, and counts of the rest. Raises ShardError."""
    found = scan(source)
    if (alone := _images_alone(found.names)) is not None:
        keys, suffix = alone
        rows = _rows(found, keys, [_FORMATS[suffix]] * len(keys), np.arange(len(keys)))
        return Sampled(rows, found, list(range(len(keys))), +_counts(found))
    keys = []
    formats: list[str] = []
    images: list[int] = []
    groups = loose = 0
    current, rank, worst = "", 0, len(IMAGES)
    only, several = "", set()  # suffixes of the sample: a set only where there are several, for most have few
    for at, name in enumerate(found.names):
        if "/" in name or name[:2] == "__":
            key, suffix = split_name(name)
        else:  # the same, without a call for each member
            key, dot, suffix = name.partition(".")
            key = dot and key
        if not key:
            loose += 1
            continue
        suffix = suffix.lower()
        if key != current:
            current, only, rank = key, suffix, worst
            groups += 1
            if several:
                several = set()
        elif suffix == only or suffix in several:
            shard = source if isinstance(source, (str, Path)) else source.url
            raise ShardError(shard, int(found.offsets[at]), f"sample {key!r} has two members {suffix!r}")
        else:
            several.add(suffix)
        better = IMAGES.get(suffix, worst)
        if better < rank:
            if rank < worst:  # the sample has an image already, but this one goes before it
                del keys[-1], formats[-1], images[-1]
            rank = better
            keys.append(key)
            formats.append(_FORMATS[suffix])
            images.append(at)
    n, rows = len(keys), _rows(found, keys, formats, np.array(images, np.int64))
    counts = _counts(found)
    counts[HIDDEN] += loose
    counts[BARE] += groups - n
    counts[SIDES] += len(found) - loose - n
    counts[AGAIN] += n - len(set(keys))
    return Sampled(rows, found, images, +counts)


def _images_alone(names: list[str]) -> tuple[list[str], str] | None:
    """Keys and the one suffix, where every member is an image of a sample of its own, as plainly named as most are.

    The same as the loop above finds, by a few passes over one string: it would cost a third of the whole index.
    """
    if not names:
        return None
    n, text = len(names), "\0".join(names)
    suffix = names[0].rpartition(".")[2]
    end = f".{suffix}\0"
    plain = text.count(".") == n and text[0] != "." and "\0." not in text and "/" not in text and "__" not in text
    if suffix not in IMAGES or not plain or text.count(end) != n - 1 or not text.endswith(end[:-1]):
        return None
    keys = text[: 1 - len(end)].split(end)
    return (keys, suffix) if len(set(keys)) == n else None


def _rows(found: Members, keys: list[str], formats: list[str], chosen: np.ndarray) -> Rows:
    """Rows of the images that are members `chosen`, int64 [n]."""
    n = len(keys)
    return Rows(
        keys=keys,
        offset=found.offsets[chosen],
        length=found.lengths[chosen],
        crc32=np.zeros(n, np.uint32),
        width=np.zeros(n, np.int32),
        height=np.zeros(n, np.int32),
        format=formats,
        deep=False,
    )


def _counts(found: Members) -> Counter[str]:
    counts: Counter[str] = Counter()
    for kind, number in found.others.items():
        if kind != "folders":
            counts[LINKS if kind != "entries of an unknown kind" else kind] += number
    counts[OUTSIDE] = sum(name[:1] == "/" or ".." in name.split("/") for name in found.names if "/" in name)
    return counts
