"""`gristmill bench ingest`: what taking in an image costs, against img2dataset and against a plain ShardWriter loop.

All in one run, on the same images: urls from a server on loopback (a process of its own), and files of a folder. CPU seconds
are those of a command and of all its children, start and imports included; the server's are not. img2dataset pulls other
releases of what Gristmill needs, so it lives in an environment of its own, and its command is named. Memory is what the
processes of an ingest hold for themselves (RssAnon), the highest that was seen, by number of candidates.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import simplejpeg
from rich.console import Console
from rich.table import Table

from ...shards.errors import GristmillError

_FEW = 10  # images that tell what a start takes
_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER
_SERVER = """
import sys
from aiohttp import web
app = web.Application()
app.router.add_static("/", sys.argv[1])
web.run_app(app, host="127.0.0.1", port=0, print=lambda text: print(text, flush=True))
"""
_LOOP = """
import io, sys
from pathlib import Path
from PIL import Image
from webdataset import ShardWriter
root, out = Path(sys.argv[1]), Path(sys.argv[2])
out.mkdir()
with ShardWriter(str(out / "%06d.tar"), maxcount=1000, verbose=0) as shards:
    for number, path in enumerate(sorted(root.iterdir())):
        data = path.read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            image.load()
        shards.write({"__key__": f"{number:09d}", "jpg": data})
"""


class IngestBenchError(GristmillError):
    """A benchmark that cannot be run, or a command of it that failed."""


def bench_ingest(
    images: Path,
    samples: int,
    img2dataset: str | None,
    candidates: tuple[int, ...],
    only: tuple[str, ...],
    as_json: bool,
) -> int:
    """Run the parts asked for (all by default) and print them; returns the exit code."""
    parts: dict[str, Callable[[Path], dict[str, Any]]] = {
        "urls": lambda root: _urls(root, img2dataset),
        "files": _files,
        "memory": lambda root: {str(count): _memory(root, count) for count in candidates},
    }
    if img2dataset is not None and shutil.which(img2dataset) is None:
        raise IngestBenchError(f"{img2dataset} cannot be run: name img2dataset's command, or leave --img2dataset out")
    ctypes.CDLL(None, use_errno=True).prctl(_SUBREAPER, 1)  # orphans of what is measured come to this process
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="gristmill-bench-") as folder:
        root = Path(folder)
        found["images"] = _gather(images, root / "web", samples)
        for name, part in parts.items():
            if not only or name in only:
                found[name] = part(root)
    if as_json:
        print(json.dumps(found))
    else:
        _show(found)
    return 0


def _gather(images: Path, out: Path, samples: int) -> dict[str, float]:
    out.mkdir()
    paths = [path for path in sorted(images.rglob("*")) if path.suffix.lower() in (".jpg", ".jpeg")][:samples]
    if len(paths) < _FEW:
        raise IngestBenchError(
            f"{images} holds {len(paths)} JPEGs and {_FEW} are needed: name a folder of photographs, or cut some with "
            "`python -m gristmill.ops.bench.photographs FOLDER`"
        )
    for number, path in enumerate(paths):
        shutil.copy(path, out / f"{number:06d}.jpg")
    return {"count": len(paths), "mean_bytes": sum(path.stat().st_size for path in paths) / max(1, len(paths))}


def _timed(command: list[str], count: int) -> dict[str, float]:
    """Seconds and CPU milliseconds an image of a command and its children."""
    others = _children()
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env=_environment(), check=False)
    seconds = time.perf_counter() - began
    _adopt(others)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise IngestBenchError(f"{command[0]} failed:\n{done.stdout[-1500:]}{done.stderr[-3000:]}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"images_per_second": count / seconds, "cpu_ms_per_image": 1e3 * cpu / count}


def _children() -> set[int]:
    return set(map(int, Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()))


def _adopt(others: set[int]) -> None:
    """Wait for what a command has left behind (its fork server, above all), so that its time is counted too."""
    while left := _children() - others:
        for pid in left:
            os.waitpid(pid, 0)


def _environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "NO_ALBUMENTATIONS_UPDATE": "1", "WANDB_MODE": "disabled"}


def _ours(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "gristmill.ops.cli", "ingest", *arguments, "--json"]


@contextmanager
def _served(folder: Path):
    server = subprocess.Popen([sys.executable, "-c", _SERVER, str(folder)], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        line = next(line for line in server.stdout if "http://" in line)
        yield line.partition("http://")[2].split()[0].rstrip("/")
    finally:
        server.terminate()
        server.wait()


def _compared(
    commands: dict[str, Callable[[str, str], list[str]]], few: str, all_: str, root: Path, count: int
) -> dict[str, Any]:
    """Each command on all images, and on ten, which tells what its start takes; `marginal` is the rest, an image."""
    found = {}
    out = Path(tempfile.mkdtemp(dir=root))
    for number, (name, command) in enumerate(commands.items()):
        start = _timed(command(few, str(out / f"few-{number}")), 1)
        whole = _timed(command(all_, str(out / f"all-{number}")), count)
        marginal = whole["cpu_ms_per_image"] - start["cpu_ms_per_image"] / count
        found[name] = {**whole, "start_cpu_seconds": start["cpu_ms_per_image"] / 1e3, "marginal_cpu_ms": marginal}
    return found


def _urls(root: Path, img2dataset: str | None) -> dict[str, Any]:
    count = len(os.listdir(root / "web"))
    workers = str(len(os.sched_getaffinity(0)))
    common = ("--allow-private", "--per-host", "64", "--workers", workers)
    commands: dict[str, Callable[[str, str], list[str]]] = {
        "ours, exact duplicates": lambda urls, out: _ours(urls, "--out", out, "--near", "off", *common),
        "ours, near duplicates": lambda urls, out: _ours(urls, "--out", out, *common),
    }

    def peer(*more: str) -> Callable[[str, str], list[str]]:
        plain = ["--output_format", "webdataset", "--processes_count", workers, "--thread_count", "64",
                 "--number_sample_per_shard", "1000", *more]  # fmt: skip
        return lambda urls, out: [str(img2dataset), "--url_list", urls, "--output_folder", out, *plain]

    if img2dataset is not None:
        commands["img2dataset, not decoded"] = peer("--disable_all_reencoding", "True")
        commands["img2dataset, decoded, bytes as they are"] = peer("--resize_mode", "no", "--skip_reencode", "True")
        commands["img2dataset, its defaults (256 x 256)"] = peer()
    with _served(root / "web") as address:
        for name, number in (("few.txt", _FEW), ("urls.txt", count)):
            (root / name).write_text("".join(f"http://{address}/{i:06d}.jpg\n" for i in range(number)))
        return _compared(commands, str(root / "few.txt"), str(root / "urls.txt"), root, count)


def _files(root: Path) -> dict[str, Any]:
    web, few = root / "web", root / "few"
    few.mkdir(exist_ok=True)
    for path in sorted(web.iterdir())[:_FEW]:
        shutil.copy(path, few)
    commands: dict[str, Callable[[str, str], list[str]]] = {
        "ours, one worker": lambda source, out: _ours(source, "--out", out, "--workers", "1", "--near", "off"),
        "ours, one worker, near duplicates": lambda source, out: _ours(source, "--out", out, "--workers", "1"),
        "ours, a worker a core": lambda source, out: _ours(source, "--out", out),
        "webdataset's ShardWriter and Pillow": lambda source, out: [sys.executable, "-c", _LOOP, source, out],
    }
    return _compared(commands, str(few), str(web), root, len(os.listdir(web)))


def _memory(root: Path, candidates: int) -> dict[str, float]:
    """Peak anonymous memory of the coordinator and of its largest worker, for so many small images in Parquet."""
    source = root / f"{candidates}.parquet"
    _draw(source, candidates)
    command = _ours(str(source), "--out", str(root / f"m{candidates}"), "--workers", "2")
    began = time.perf_counter()
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=_environment(), text=True)
    peaks: dict[int, int] = {}
    while run.poll() is None:
        for pid in _tree(run.pid):
            peaks[pid] = max(peaks.get(pid, 0), _anonymous(pid))
        time.sleep(0.25)
    assert run.stdout is not None
    report = json.loads(run.stdout.read())
    source.unlink()
    shutil.rmtree(root / f"m{candidates}")
    coordinator = peaks.pop(run.pid)
    return {
        "coordinator_mb": coordinator / 1e6,
        "largest_worker_mb": max(peaks.values()) / 1e6,
        "inputs_per_second": candidates / (time.perf_counter() - began),
        "kept": report["outcomes"]["kept"],
    }


def _draw(path: Path, count: int) -> None:
    """Small photographs of nothing, no two alike: smooth noise as JPEG, in row groups of 10,000."""
    noise = np.random.Generator(np.random.Philox(key=7))
    schema = pa.schema([("image", pa.binary())])
    with pq.ParquetWriter(path, schema) as writer:
        for first in range(0, count, 10_000):
            number = min(10_000, count - first)
            coarse = noise.integers(0, 256, (number, 8, 8, 3), np.uint8)
            pictures = coarse.repeat(4, 1).repeat(4, 2)
            encoded = [simplejpeg.encode_jpeg(np.ascontiguousarray(picture), quality=60) for picture in pictures]
            writer.write_table(pa.table({"image": pa.array(encoded, pa.binary())}, schema=schema))


def _tree(pid: int) -> list[int]:
    found, pending = [], [pid]
    while pending:
        one = pending.pop()
        found.append(one)
        try:
            pending += map(int, Path(f"/proc/{one}/task/{one}/children").read_text().split())
        except OSError:
            continue
    return found


def _anonymous(pid: int) -> int:
    try:
        line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("RssAnon"))
    except (OSError, StopIteration):
        return 0
    return int(line.split()[1]) * 1024


def _show(found: dict[str, Any]) -> None:
    console = Console(highlight=False)
    about = found["images"]
    console.print(f"{about['count']:.0f} photographs of {about['mean_bytes'] / 1e3:.0f} kB")
    for name in ("urls", "files"):
        if name in found:
            table = Table(title=name, title_justify="left", box=None)
            for head in ("", "images/s", "CPU ms an image", "CPU s of the start", "CPU ms without it"):
                table.add_column(head, justify="left" if not head else "right")
            for who, row in found[name].items():
                figures = (
                    row["images_per_second"],
                    row["cpu_ms_per_image"],
                    row["start_cpu_seconds"],
                    row["marginal_cpu_ms"],
                )
                table.add_row(
                    who, *(f"{figure:.{digits}f}" for figure, digits in zip(figures, (0, 2, 1, 2), strict=True))
                )
            console.print(table)
    for count, row in found.get("memory", {}).items():
        console.print(
            f"{int(count):,} candidates: coordinator {row['coordinator_mb']:.0f} MB, largest worker {row['largest_worker_mb']:.0f} MB, "
            f"{row['inputs_per_second']:.0f} inputs/s, {row['kept']:,} kept",
            soft_wrap=True,
        )
