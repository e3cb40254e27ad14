"""`gristmill bench views`: encoded shards to augmented views, ours against what a user would write instead.

Each loader has a process of its own, the same tars in the page cache, as many threads or workers as there are cores, and
makes the same crops with the same probabilities; batches of 64 are counted until `samples` images came, from when what
is prefetched is full. Given are images a second and CPU time an image, workers included: on a busy machine the second is the steadier
one. "Decode alone" is what no loader that decodes can beat. Then the CPU executor's stages on one thread, by leaving
off the last one more and more: the code that is timed is the code that runs. What is missing is named with the reason.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from ...pipeline.views import StreamConfig, View
from ...shards.demo import make_demo_images
from ...shards.ingest import ingest_folder
from ...shards.manifest import Manifest

BATCH = 64
CORES = len(os.sched_getaffinity(0))
BASE = "webdataset + torchvision, PIL"
SETTINGS = {"multi-crop": "2 x 224 + 8 x 96, weak", "mugs": "Mugs' 14 crops, half of the student's strong"}
_WARM = 2 + 2 * CORES  # batches, until what is prefetched is full and as much is made as is taken
_PATIENCE = 600  # seconds for one row
_ROUNDS = 9  # of a profile; the median counts
TICK = 1e6 / os.sysconf("SC_CLK_TCK")  # microseconds, by which CPU time of other processes is told


def views_of(setting: str, filter: str) -> list[View]:
    """The views of a setting, all with one resampling filter."""
    from ...pipeline.groups import named_views

    entries = named_views("mugs")
    if setting == "multi-crop":
        entries = named_views("ibot")
        entries[1]["count"] = 8
    return [View.model_validate(entry | {"filter": filter}) for entry in entries]


def bench_views(images: Path | None, samples: int, as_json: bool, only: tuple[str, ...] = (), filter="bicubic") -> int:
    """Run the settings asked for (all by default) and print them; returns the exit code."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="gristmill-bench-") as folder:
        root = Path(folder)
        if images is None:
            images = root / "images"
            make_demo_images(images, images=1000, size=400)
        ingest_folder(images, root / "data", shard_samples=250)
        for setting in only or SETTINGS:
            rows = {name: _apart(name, setting, filter, root, samples) for name in LOADERS}
            base = rows[BASE]
            for row in rows.values():
                if "missing" not in row and "missing" not in base:
                    row["speed"] = row["images_per_s"] / base["images_per_s"]
                    # What took less than a tick of the clock may have taken one.
                    least = TICK / samples
                    row["per_cpu"] = max(base["cpu_us"], least) / max(row["cpu_us"], least)
            profile = _apart("profile", setting, filter, root, samples)
            found[setting] = {"filter": filter, "cores": CORES, "loaders": rows, "profile_us": profile}
            if not as_json:
                _show(setting, found[setting])
    if as_json:
        print(json.dumps(found))
    return 0


def _apart(what: str, setting: str, filter: str, root: Path, samples: int) -> dict[str, Any]:
    """One measurement in a process of its own; {"missing": why} if it cannot be made here."""
    command = [sys.executable, "-m", __name__, what, setting, filter, str(root), str(samples), str(BATCH)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    how: dict[str, Any] = {"capture_output": True, "text": True, "check": False, "env": environment}
    try:
        done = subprocess.run(command, timeout=_PATIENCE, **how)
    except subprocess.TimeoutExpired:
        return {"missing": f"did not come to an end within {_PATIENCE} s"}
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        return {"missing": (done.stderr.strip().splitlines() or ["no answer"])[-1][:200]}
    return json.loads(lines[-1])


Batches = Generator[list[Any], None, None]  # endless; a tensor [B, n, 3, H, W] a view


def _shards(root: Path) -> list[str]:
    return sorted(str(path) for path in (root / "data" / "train").glob("*.tar"))


def _webdataset(root: Path, views: list[View], form: str) -> Batches:
    import torch
    import webdataset

    from .croppers import crops_of_pil, crops_of_tensor

    crops = crops_of_pil(views) if form == "pil" else crops_of_tensor(views)
    # Shards are dealt out to the workers again and again: an epoch's end is nothing to measure.
    data = webdataset.WebDataset(_shards(root), resampled=True, shardshuffle=False)  # pyright: ignore
    data = data.decode("pil") if form == "pil" else data
    encoded = (lambda jpg: jpg) if form == "pil" else (lambda jpg: torch.frombuffer(bytearray(jpg), dtype=torch.uint8))
    data = data.to_tuple("jpg").map(lambda sample: crops(encoded(sample[0])))
    loader = torch.utils.data.DataLoader(
        data, batch_size=BATCH, num_workers=CORES, collate_fn=_collate, multiprocessing_context="fork"
    )
    yield from loader


def _collate(samples: list[list[Any]]) -> list[Any]:
    import torch

    return [torch.stack(view) for view in zip(*samples, strict=True)]


def _spdl(root: Path, views: list[View]) -> Batches:
    import torch
    import webdataset
    from spdl.pipeline import PipelineBuilder  # pyright: ignore[reportMissingImports]

    from .croppers import crops_of_tensor

    torch.set_num_threads(1)
    crops = crops_of_tensor(views)
    data = webdataset.WebDataset(_shards(root), resampled=True, shardshuffle=False)  # pyright: ignore
    encoded = (torch.frombuffer(bytearray(sample["jpg"]), dtype=torch.uint8) for sample in data)
    builder = PipelineBuilder().add_source(encoded).pipe(crops, concurrency=CORES).aggregate(BATCH).pipe(_collate)
    pipeline = builder.add_sink(2).build(num_threads=CORES + 1)
    with pipeline.auto_stop():
        yield from pipeline


def _ours(root: Path, views: list[View], augment: str) -> Batches:
    from ...pipeline.standalone import images

    how = {"augment": augment, "augment_threads": CORES, "lanes": 1, "window": 1 << 22}
    with images(root / "data" / "train", BATCH, views=views, config=StreamConfig.model_validate(how)) as stream:
        for batch in stream:
            yield list(batch.views.values())


def _decoded(root: Path, views: list[View]) -> Batches:
    from ...pipeline.augment.cpu import DECODED, CpuExecutor
    from ...pipeline.draws import Plan, draw

    plan = Plan(views)
    executor = CpuExecutor(plan, threads=CORES, upto=DECODED)
    data, sizes = _encoded(root)
    while True:
        for first in range(0, len(data) - BATCH + 1, BATCH):
            draws = draw(plan, 0, np.arange(first, first + BATCH), sizes[first : first + BATCH])
            yield list(executor.run(data[first : first + BATCH], draws).values())


def _encoded(root: Path) -> tuple[list[np.ndarray], np.ndarray]:
    """Up to 1,024 encoded images and their (width, height), in memory."""
    from ...pipeline.order import Sequential
    from ...pipeline.reader import Reader
    from ...shards.quarantine import Quarantine

    manifest = Manifest.open(root / "data" / "train")
    reader = Reader(manifest, Quarantine(root / "q.jsonl"), order=Sequential(manifest.counts), seed=0, threads=1)
    read = reader.read(np.arange(min(1024, manifest.samples)))
    data, sizes = [image.copy() for image in read.data], read.sizes
    reader.close()
    return data, sizes


LOADERS: dict[str, Callable[[Path, list[View]], Batches]] = {
    BASE: partial(_webdataset, form="pil"),
    "webdataset + torchvision v2": partial(_webdataset, form="tensor"),
    "SPDL + torchvision v2": _spdl,
    "gristmill, CPU executor": partial(_ours, augment="cpu"),
    "gristmill, DALI": partial(_ours, augment="dali"),
    "decode alone": _decoded,
}


def _measure(loader: Callable[[Path, list[View]], Batches], root: Path, views: list[View], samples: int) -> dict:
    import psutil

    def spent() -> float:
        """CPU seconds of this process and its workers."""
        mine = psutil.Process()
        return sum(sum(process.cpu_times()[:2]) for process in [mine, *mine.children(recursive=True)])

    batches = loader(root, views)
    for _ in range(_WARM):
        first = next(batches)
    shapes = [tuple(view.shape) for view in first]
    if shapes != [(BATCH, view.count, 3, view.size, view.size) for view in views]:
        raise RuntimeError(f"gave {shapes}")
    count, cpu, begin = 0, spent(), time.perf_counter()
    while count < samples:
        count += len(next(batches)[0])
    found = {"images_per_s": count / (time.perf_counter() - begin), "cpu_us": (spent() - cpu) / count * 1e6}
    batches.close()  # workers that outlive this process would keep its output open
    return found


def profile(root: Path, views: list[View], images: int = 4 * BATCH) -> dict[str, float]:
    """CPU microseconds an image of each stage of the CPU executor, on one thread."""
    from ...pipeline.augment import cpu, kernels
    from ...pipeline.draws import Plan, draw

    stages = {
        "decode": cpu.DECODED,
        "strong": cpu.STRENGTHENED,
        "cut and resize": kernels.RESIZED,
        "blur": kernels.BLURRED,
        "colours, solarise, normalise": kernels.FINISHED,
    }
    plan = Plan(views)
    data, sizes = _encoded(root)
    data, sizes = data[:BATCH], sizes[:BATCH]
    executors = {name: cpu.CpuExecutor(plan, upto=level) for name, level in stages.items()}
    taken: dict[str, list[float]] = {name: [] for name in ("draw", *stages)}
    for turn in range(_ROUNDS * max(1, images // BATCH // 4)):
        begin = time.thread_time()
        draws = draw(plan, turn, np.arange(len(data)), sizes)
        taken["draw"].append(time.thread_time() - begin)
        for name, executor in executors.items():
            executor.run(data, draws)  # again, so that no stage finds the caches of another
            begin = time.thread_time()
            executor.run(data, draws)
            taken[name].append(time.thread_time() - begin)
    total = {name: statistics.median(times) / len(data) * 1e6 for name, times in taken.items()}
    before, found = 0.0, {"draw": total["draw"]}
    for name in stages:
        found[name], before = max(0.0, total[name] - before), max(before, total[name])
    return found


def _show(setting: str, found: dict[str, Any]) -> None:
    console = Console()
    title = f"{SETTINGS[setting]}, {found['filter']}, {found['cores']} cores"
    table = Table(title=title, title_justify="left")
    for column in ("loader", "images/s", f"{BASE} = 1", "CPU us/image", "per CPU-second"):
        table.add_column(column, justify="left" if column == "loader" else "right")
    for name, row in found["loaders"].items():
        if "missing" in row:
            table.add_row(name, "-", row["missing"], "-", "-")
        else:
            ratios = [f"{row[key]:.2f}" if key in row else "-" for key in ("speed", "per_cpu")]
            table.add_row(name, f"{row['images_per_s']:.0f}", ratios[0], f"{row['cpu_us']:.0f}", ratios[1])
    console.print(table)
    shares = found["profile_us"]
    if "missing" in shares:
        console.print(f"no profile: {shares['missing']}")
        return
    table = Table(title="CPU executor, one thread, by stage", title_justify="left")
    for column in ("stage", "us/image", "share"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    total = sum(shares.values())
    for name, value in [*shares.items(), ("all", total)]:
        table.add_row(name, f"{value:.0f}", f"{value / total:.0%}")
    console.print(table)


def _main(what: str, setting: str, filter: str, root: Path, samples: int) -> dict[str, float]:
    views = views_of(setting, filter)
    return profile(root, views) if what == "profile" else _measure(LOADERS[what], root, views, samples)


if __name__ == "__main__":
    what, setting, filter, folder, samples, batch = sys.argv[1:]
    BATCH = int(batch)
    answer = json.dumps(_main(what, setting, filter, Path(folder), int(samples)))
    sys.stdout.write(f"\n{answer}\n")
    sys.stdout.flush()
    os._exit(0)  # some of these leave processes or threads behind that would not end
