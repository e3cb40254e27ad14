"""What a data set of a billion samples costs before the first image: memory and time, in a process of its own.

`synthetic` is a stream over nothing but counts, at any size. `manifest` is the real way: a manifest of 100,000 shards
of 10,000 samples is opened, the stream is put at a cursor in its middle and asked for 2,048 ids, without and with a
filter, and the rows of the first batch are read. Its Parquet files are all real and whole, but 512 shards' rows are
written once and linked to for all others, for a billion rows would fill the disk.

    python -m gristmill.ops.bench.scale synthetic SAMPLES [SHARDS] | make DIR | manifest DIR [FILTER]

`--ranks` begins another one, of a whole cluster's ranks in one process (scale_ranks.py, docs/scale.md).

    python -m gristmill.ops.bench.scale --ranks 4096 --samples 1e10 --out R.jsonl --plot P.png
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import numpy as np

from ...pipeline.order import Ints
from ...pipeline.source import Source
from ...pipeline.stream import Stream
from ...shards.errors import GristmillError
from ...shards.manifest import DATASET, GROUPS, SAMPLES, SHARDS, Manifest, Rows, dataset_digest

SHARDS_AT_MOST = 100_000
PER_SHARD = 10_000
IDS, BATCH = 2048, 256


def synthetic(samples: int, shards: int = 0) -> dict[str, float]:
    """A data set of so many samples that has no files: seek to its middle, locate 2,048, and what memory that took."""
    shards = shards or min(SHARDS_AT_MOST, max(1, samples // 1000))
    before = memory("VmRSS")
    begin = time.perf_counter()
    sources = [Source("synthetic", np.full(shards, samples // shards, np.int64), lambda n: f"{n:032x}")]
    stream = Stream(sources, 0, cursor=Stream(sources, 0).cursor.advance(samples // 2 + 7, committed=True))
    made = time.perf_counter()
    stream.locate(np.arange(IDS) + stream.cursor.position)
    done = time.perf_counter()
    after = memory("VmHWM")
    return {
        "shards": shards,
        "set_up_s": made - begin,
        "seek_and_2048_ids_s": done - made,
        "added_MB": max(0.0, after - before),
        "peak_MB": after,
        "cursor_bytes": len(stream.cursor.to_json()),
    }


def from_manifest(root: Path, where: str = "") -> dict[str, float]:
    """The same of a manifest's folder, and then the rows of the first batch."""
    before, begin = memory("VmRSS"), time.perf_counter()
    manifest = Manifest.open(root)
    opened = time.perf_counter()
    source = Source.of(manifest, where=where)
    filtered = time.perf_counter()
    start = Stream([source], 0)
    stream = Stream([source], 0, cursor=start.cursor.advance(start.samples // 2 + 7, committed=True))
    made = time.perf_counter()
    shards, rows = stream.locate(np.arange(IDS) + stream.cursor.position)
    done = time.perf_counter()
    found = {
        "shards": len(manifest.counts),
        "samples": stream.samples,
        "open_s": opened - begin,
        "filter_s": filtered - opened,
        "set_up_s": made - filtered,
        "seek_and_2048_ids_s": done - made,
        "added_MB": max(0.0, memory("VmHWM") - before),
        "peak_MB": memory("VmHWM"),
    }
    begin = time.perf_counter()
    for shard, row in zip(shards[:BATCH].tolist(), rows[:BATCH].tolist(), strict=True):
        if not manifest.rows(shard).keys[row]:
            raise RuntimeError(f"row {row} of shard {shard} has no key")
    return found | {
        "shards_in_a_batch": len(np.unique(shards[:BATCH])),
        "rows_of_a_batch_s": time.perf_counter() - begin,
        "peak_with_rows_MB": memory("VmHWM"),
    }


def make(
    root: Path, shards: int = SHARDS_AT_MOST, per_shard: int = PER_SHARD, sizes: Ints | None = None, base: str = ""
) -> None:
    """Write the manifest of a data set that would have so many shards; there are no tars.

    sizes: bytes of the images of the first 512 shards, int64 [512, per_shard]; base: a url that all shards lie below.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    from ...shards.writer import write_manifest

    draw, once = np.random.default_rng(0), min(GROUPS, shards)
    starts = np.arange(per_shard, dtype=np.int64) * 28_672 + 512

    def rows(shard: int) -> Rows:
        width, height = draw.integers(100, 1000, (2, per_shard)).astype(np.int32)
        length = draw.integers(2_000, 28_000, per_shard) if sizes is None else sizes[shard]
        crc = draw.integers(0, 1 << 32, per_shard).astype(np.uint32)
        keys = [f"{shard:05d}{row:04d}" for row in range(per_shard)]
        return Rows(
            keys, starts if sizes is None else places(length)[0], length, crc, width, height, ["jpg"] * per_shard
        )

    size = per_shard * 28_672 + 1024
    bytes_of = [size if sizes is None else places(sizes[shard])[1] for shard in range(once)]
    write_manifest(root, ((f"{shard:06d}.tar", bytes_of[shard], rows(shard)) for shard in range(once)))
    table = pq.read_table(root / SHARDS)
    urls = [f"{base}{shard:06d}.tar" for shard in range(shards)]
    several = table.take(pa.array(np.arange(shards) % once)).set_column(0, table.schema.field(0), pa.array(urls))
    pq.write_table(several, root / SHARDS, compression="zstd")
    for number in range(1, -(-shards // GROUPS)):
        os.link(root / SAMPLES / "00000.parquet", root / SAMPLES / f"{number:05d}.parquet")
    about = json.loads((root / DATASET).read_text())
    about |= {"digest": dataset_digest(urls, several["digest"].to_pylist())}
    about |= {"shards": shards, "samples": shards * per_shard, "bytes": sum(several["bytes"].to_pylist())}
    (root / DATASET).write_text(json.dumps(about))


def places(lengths: Ints) -> tuple[Ints, int]:
    """(where each member's data begin int64 [n], bytes of the tar): headers of 512 bytes, data in blocks of 512."""
    ends = np.cumsum(512 + (lengths + 511) // 512 * 512)
    return ends - (lengths + 511) // 512 * 512, int(ends[-1]) + 1024


def memory(what: str, process: int | str = "self") -> float:
    """Of a process by the kernel, in MB; unlike getrusage's, its peak does not begin with the parent's."""
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith(what + ":"):
            return int(line.split()[1]) / 1024
    return float("nan")


def main(arguments: list[str]) -> None:
    """What the command line asks for."""
    kind, of, *rest = [*arguments, "", ""][: max(2, len(arguments))]
    if kind.startswith("-"):
        from .scale_ranks import main as simulate

        simulate(arguments)
    elif kind == "make" and of:
        make(Path(of))
    elif kind == "manifest" and of:
        print(json.dumps(from_manifest(Path(of), *rest)))
    elif kind == "synthetic" and of.isdigit():
        print(json.dumps(synthetic(int(of), *map(int, rest))))
    else:
        sys.exit("\n".join(line.strip() for line in (__doc__ or "").splitlines() if line.startswith("    ")))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except GristmillError as error:
        sys.exit(f"error: {error}")
