"""`.idx` files for DALI's own `readers.webdataset`, as its `wds2idx` writes them, from an index that is at hand already.

First line `v1.2 <samples>`, then a line a sample: for each member its suffix, the offset and length of its bytes, and its
name. Listed are the samples of the manifest, in its order, so that DALI's sample i is ours; all their members are. DALI
splits a line at blanks, so a suffix with one cannot be asked for and is left away, and in a name, which only serves
messages, it becomes an underscore. Unlike `wds2idx`, members behind long names are given their right place.
"""

from __future__ import annotations

from pathlib import Path

from .index import Sampled, split_name
from .storage import published

_VERSION = "v1.2"


def idx_text(found: Sampled) -> str:
    """The index of one shard."""
    members = found.members
    offsets, lengths = members.offsets.tolist(), members.lengths.tolist()
    split = [split_name(name) for name in members.names]
    lines = [f"{_VERSION} {len(found.rows)}"]
    for key, image in zip(found.rows.keys, found.images, strict=True):
        # What belongs to no sample (its key is empty) may lie between the members of one.
        first, end = image, image + 1
        while first > 0 and split[first - 1][0] in ("", key):
            first -= 1
        while end < len(split) and split[end][0] in ("", key):
            end += 1
        parts: list[str] = []
        for at in range(first, end):
            suffix = split[at][1]
            if suffix and suffix.split() == [suffix]:
                parts.append(f"{suffix} {offsets[at]} {lengths[at]} {'_'.join(members.names[at].split())}")
        lines.append(" ".join(parts))
    return "\n".join(lines) + "\n"


def write_idx(path: Path, found: Sampled) -> None:
    """Write the index of one shard, whole or not at all. OSError passes through."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with published(path) as file:
        file.write(idx_text(found).encode())
