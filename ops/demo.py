"""`gristmill demo`: from images to a trained, probed backbone and a report, in one command on any machine.

Each stage is skipped when its result is complete, so that a killed demo goes on where it was: images (made beside and
renamed), shards (published by their manifest), training (its newest checkpoint), report (made anew).
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ..shards.demo import MASKS, make_demo_images
from ..shards.errors import GristmillError
from ..shards.ingest import ingest_folder
from ..shards.manifest import Manifest
from ..shards.storage import published
from .evaluate.masks import PARTS
from .evaluate.online import shown
from .progress import Meter
from .recipe import load_recipe
from .report import write_report
from .runlog import read_log, writable
from .train import train

WIDE = 6  # columns of probes that a terminal still shows
HOLDOUT = 0.2  # of the images are kept from training; probes ask with them
TINY_IMAGES = 1024


class DemoError(GristmillError):
    """A demo folder that holds something else."""


def run_demo(out: Path, images: Path | None, *, tiny: bool, seed: int, overrides: Sequence[str]) -> int:
    """Make, train, probe, report into `out`; returns the exit code (0, or the training's when it was interrupted)."""
    console = Console(stderr=True, highlight=False)
    start = time.monotonic()
    data = ["data=" + str(out / "data" / "train"), "probes.query=" + str(out / "data" / "probe")]
    recipe = load_recipe("demo", [f"seed={seed}", *data, *overrides], tiny=tiny)  # refuse a mistake before any work
    _same_source(out, {"images": str(images.resolve()) if images else None, "seed": seed, "tiny": tiny})
    _prepare(out, images, seed=seed, tiny=tiny)
    manifest = Manifest.open(out / "data" / "train")
    console.print(f"{manifest.samples} images in {len(manifest.urls)} shards: {out / 'data' / 'train'}")
    ending = train(recipe, out)
    if ending.code:
        console.print(f"stopped at image {ending.position}; the same command goes on from there")
        return ending.code
    page = write_report(out)
    Console().print(probe_table(out))
    console.print(f"report: {page}   ({time.monotonic() - start:.0f} s)", soft_wrap=True)
    return 0


def _same_source(out: Path, source: dict) -> None:
    note = out / "source.json"
    if note.is_file():
        before = json.loads(note.read_text())
        differing = [
            f"{key} was {before.get(key)!r} and is {source[key]!r}" for key in source if before.get(key) != source[key]
        ]
        if differing:
            raise DemoError(
                f"{out} holds another demo ({'; '.join(differing)}); name another folder with --out, or remove it"
            )
        return
    if out.is_dir() and any(out.iterdir()):
        raise DemoError(f"{out} is not empty and holds no demo; name another folder with --out")
    with writable(out):
        out.mkdir(parents=True, exist_ok=True)
        note.write_text(json.dumps(source))


def _prepare(out: Path, images: Path | None, *, seed: int, tiny: bool) -> None:
    if (out / "data" / "train" / "dataset.json").is_file():
        _lay_masks(out)
        return
    if images is None:
        images = out / "images"
        if not images.is_dir():
            beside = out / ".images"
            shutil.rmtree(beside, ignore_errors=True)
            with Meter("drawing", 0) as meter:
                make_demo_images(beside, seed=seed, progress=meter, **({"images": TINY_IMAGES} if tiny else {}))
            beside.rename(images)
    with Meter("packing", 0) as meter:
        report = ingest_folder(images, out / "data", holdout=HOLDOUT, progress=meter)
        meter.note(report.summary())
    _lay_masks(out)


def _lay_masks(out: Path) -> None:
    """The drawn images' parts, which segmentation is probed with, go beside the shards, where `gristmill eval` looks."""
    masks, there = out / "images" / MASKS, out / "data" / PARTS
    if masks.is_file() and not there.exists():
        with published(there) as file, masks.open("rb") as source:
            shutil.copyfileobj(source, file)


def probe_table(folder: Path) -> Table:
    """Probes by who was probed: chance, raw pixels, the untrained network, the teacher on its way."""
    rows = [line for line in read_log(folder / "metrics.jsonl") if line["kind"] == "probe"]
    names = [name for name in (rows[-1] if rows else {}) if name not in ("kind", "who", "position", "seconds")]
    if len(names) > WIDE:  # many probes: one a line
        table = Table("", *(_who(row) for row in rows), title="probes", title_justify="left")
        for name in names:
            table.add_row(name.replace("_", " "), *(_score(name, row) for row in rows))
        return table
    table = Table("", title="probes", title_justify="left")
    for name in names:
        table.add_column(name.replace("_", " "), justify="right")
    for row in rows:
        table.add_row(_who(row), *(_score(name, row) for name in names))
    return table


def _who(row: dict) -> str:
    return row["who"] if row["who"] != "teacher" else f"teacher after {row['position']} images"


def _score(name: str, row: dict) -> str:
    return "-" if row.get(name) is None else shown(name, row[name])
