"""`gristmill bench stream`: the reader alone against webdataset and others; resuming; memory up to 1e9 samples.

Every reader has a process of its own and the same images, encoded, each in its own format written from the same tars,
all in the page cache: one pass to warm up, then passes until about `samples` images were read, of which the one that
was disturbed least is shown. What counts is the CPU time of an image (user and system, children included), for training
wants the rest of it, and its ratio to webdataset's in the same run. Nothing is decoded; all readers give batches that
are held together (readers.py); ours checks every checksum, which no other does (with a quick index, which has none, it
reads every header); what a copy and a checksum cost by themselves stands beside. Readers that are not installed are
named with the reason, not left out.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from ...pipeline.reader import Reader
from ...pipeline.source import Source
from ...pipeline.stream import Stream
from ...shards.demo import make_demo_images
from ...shards.ingest import ingest_folder
from ...shards.manifest import Manifest
from ...shards.quarantine import Quarantine
from . import scale
from .readers import BATCH, READERS, SINGLY, ReadAll, read_all

SCALES = (1_000, 1_000_000, 1_000_000_000)
_SINGLY = ", one by one"


def bench_stream(images: Path | None, samples: int, as_json: bool, only: tuple[str, ...] = ()) -> int:
    """Run the parts asked for (all by default) and print them; returns the exit code."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="gristmill-bench-") as folder:
        root = Path(folder)
        if not only or {"reader", "resume"} & set(only):
            if images is None:
                images = root / "images"
                make_demo_images(images, images=1000, size=400)
            ingest_folder(images, root / "data", shard_samples=500)
        if not only or "reader" in only:
            found["reader"] = compare_readers(root, samples)
        if not only or "resume" in only:
            found["resume"] = _apart("resume", root, samples)
        if not only or "scale" in only:
            found["scale"] = {f"{n:.0e}": _run("scale", "synthetic", str(n)) for n in SCALES}
            scale.make(root / "scale")
            found["scale"]["real manifest of 1e5 shards"] = _run("scale", "manifest", str(root / "scale"))
            found["scale"]["with a filter"] = _run("scale", "manifest", str(root / "scale"), "width >= 256")
    if as_json:
        print(json.dumps(found))
    else:
        _show(found)
    return 0


def compare_readers(root: Path, samples: int) -> dict[str, Any]:
    """CPU microseconds and rate of every reader, and its samples a CPU-second over webdataset's."""
    manifest = Manifest.open(root / "data" / "train")
    found: dict[str, Any] = {}
    for name in READERS:
        found[name] = _apart(name, root, samples)
        if name.startswith(SINGLY) and "cpu_us" in found[name]:
            found[name]["singly_cpu_us"] = _apart(f"{name}{_SINGLY}", root, samples).get("cpu_us")
    base = found["webdataset"].get("cpu_us")
    for values in found.values():
        if base and "cpu_us" in values:
            values["over_webdataset"] = base / values["cpu_us"]
    return {"bytes_an_image": manifest.bytes / manifest.samples, "readers": found}


def _apart(what: str, root: Path, samples: int) -> dict[str, Any]:
    """One measurement in a process of its own; {"missing": why} if what it needs is not there."""
    return _run("stream", what, str(root), str(samples))


def _run(module: str, *arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-m", f"{__package__}.{module}", *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        reason = (done.stderr.strip().splitlines() or ["no answer"])[-1]
        return {"missing": reason[:200]}
    return json.loads(lines[-1])


def cpu_seconds() -> float:
    """Of this process and its children, user and system."""
    return sum(
        used.ru_utime + used.ru_stime
        for used in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


def _measure(reader: ReadAll, root: Path, samples: int, held: bool) -> dict[str, float]:
    expected = Manifest.open(root / "data" / "train")
    want = int(sum(expected.rows(shard).length.sum() for shard in range(len(expected.urls))))
    first = read_all(reader, root, held)
    if first != (expected.samples, want):
        raise RuntimeError(f"read {first} images and bytes instead of {(expected.samples, want)}")
    best: dict[str, float] = {"cpu_us": float("inf")}
    for _ in range(max(1, -(-samples // expected.samples))):
        cpu, wall = cpu_seconds(), time.perf_counter()
        read_all(reader, root, held)
        cpu, wall = cpu_seconds() - cpu, time.perf_counter() - wall
        if cpu / expected.samples * 1e6 < best["cpu_us"]:
            best = {"cpu_us": cpu / expected.samples * 1e6, "samples_per_s": expected.samples / wall}
    return best


def _resume(root: Path) -> dict[str, float]:
    """From nothing but a cursor to the first encoded batch."""
    manifest = Manifest.open(root / "data" / "train")
    cursor = Stream([Source.of(manifest)], 0).cursor.advance(10**8 + 1, committed=True)
    begin = time.perf_counter()
    manifest = Manifest.open(root / "data" / "train")
    stream = Stream([Source.of(manifest)], 0, cursor=cursor)
    opened = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        reader = Reader(manifest, Quarantine(Path(scratch) / "q"), order=stream, seed=0)
        reader.read(np.arange(cursor.position, cursor.position + BATCH))
        done = time.perf_counter()
        reader.close()
    return {"manifest_and_stream_s": opened - begin, "first_batch_s": done - begin}


def _show(found: dict[str, Any]) -> None:
    console = Console()
    if "reader" in found:
        size = found["reader"]["bytes_an_image"]
        table = Table(title=f"encoded images of {size / 1000:.1f} kB from the page cache", title_justify="left")
        columns = ("CPU us/image, in batches", "images/s", "per CPU-second, webdataset = 1", "CPU us/image, one by one")
        for column in ("reader", *columns):
            table.add_column(column, justify="left" if column == "reader" else "right")
        for name, values in found["reader"]["readers"].items():
            if "missing" in values:
                table.add_row(name, "-", "-", values["missing"], "")
            else:
                ratio, singly = (values.get(key) for key in ("over_webdataset", "singly_cpu_us"))
                shown = ("-" if number is None else f"{number:.2f}" for number in (ratio, singly))
                table.add_row(name, f"{values['cpu_us']:.2f}", f"{values['samples_per_s']:.0f}", *shown)
        console.print(table)
    for part in ("resume", "scale"):
        if part in found:
            rows = found[part] if part == "scale" else {"": found[part]}
            for name, values in rows.items():
                console.print(
                    f"{part} {name}: " + ", ".join(f"{k} {v:.4g}" if k != "missing" else v for k, v in values.items())
                )


def _main(what: str, root: Path, samples: int) -> dict[str, float]:
    if what == "resume":
        return _resume(root)
    return _measure(READERS[what.removesuffix(_SINGLY)], root, samples, held=not what.endswith(_SINGLY))


if __name__ == "__main__":
    answer = json.dumps(_main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])))
    sys.stdout.write(f"\n{answer}\n")
    sys.stdout.flush()
    os._exit(0)  # some of these leave processes or threads behind that would not end
