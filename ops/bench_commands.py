"""`gristmill bench`: each part against its peer on this machine. Imports happen when a benchmark runs."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from .commands import FOLDER, example, main


@main.group()
def bench() -> None:
    """What each part costs on this machine, against its peer, as ratios in one run."""


@bench.command("train", epilog=example("gristmill bench train", "gristmill bench train --only guard --only ema --json"))
@click.option("--steps", type=click.IntRange(4), default=12, show_default=True, help="Steps of each run.")
@click.option(
    "--only",
    type=click.Choice(["step", "guard", "ema", "teacher", "ranks"]),
    multiple=True,
    help="These parts (default: all).",
)
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
def bench_train(steps: int, only: tuple[str, ...], as_json: bool, overrides: tuple[str, ...]) -> None:
    """Shares of a training step, the cost of verdict and guard, of the EMA with and without gather, one process and two."""
    from .bench.train import bench_train as run

    sys.exit(run(steps, as_json, only, overrides))


@bench.command(
    "stream", epilog=example("gristmill bench stream", "gristmill bench stream --images PHOTOS --only reader --json")
)
@click.option("--images", type=FOLDER, help="A folder of photographs, 10 to 100 kB each (default: drawn ones).")
@click.option("--samples", type=click.IntRange(64), default=4000, show_default=True, help="Images to read with each.")
@click.option(
    "--only",
    type=click.Choice(["reader", "resume", "scale"]),
    multiple=True,
    help="These parts (default: all).",
)
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def bench_stream(images: Path | None, samples: int, only: tuple[str, ...], as_json: bool) -> None:
    """The reader alone against webdataset and others, each with its own format; resuming; memory up to 1e9 samples."""
    from .bench.stream import bench_stream as run

    sys.exit(run(images, samples, as_json, only))


@bench.command(
    "views", epilog=example("gristmill bench views --images PHOTOS", "gristmill bench views --only multi-crop --json")
)
@click.option("--images", type=FOLDER, help="A folder of photographs, 10 to 100 kB each (default: drawn ones).")
@click.option("--samples", type=click.IntRange(64), default=1024, show_default=True, help="Images through each loader.")
@click.option("--only", type=click.Choice(["multi-crop", "mugs"]), multiple=True, help="These settings (default: all).")
@click.option("--filter", type=click.Choice(["bilinear", "bicubic"]), default="bicubic", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def bench_views(images: Path | None, samples: int, only: tuple[str, ...], filter: str, as_json: bool) -> None:
    """Shards to augmented views against webdataset with torchvision and others, and what each stage of ours takes."""
    from .bench.views import bench_views as run

    sys.exit(run(images, samples, as_json, only, filter))
