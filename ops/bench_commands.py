"""`gristmill bench`: each part against its peer on this machine. Imports happen when a benchmark runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from .commands import FOLDER, example, main


class NewFile(click.Path):
    """A file to be written once all is measured; so its folder is looked for before."""

    def __init__(self) -> None:
        super().__init__(dir_okay=False, writable=True, path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        path = super().convert(value, param, ctx)
        if not path.absolute().parent.is_dir():
            self.fail(f"there is no folder {path.parent}; make it first", param, ctx)
        return path


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


@bench.command(
    "ingest",
    epilog=example(
        "gristmill bench ingest --images PHOTOS --img2dataset other-env/bin/img2dataset",
        "gristmill bench ingest --images PHOTOS --only memory --candidates 10000 --candidates 1000000",
    ),
)
@click.option("--images", type=FOLDER, required=True, help="Folder of JPEG photographs.")
@click.option("--samples", type=click.IntRange(10), default=4000, show_default=True, help="How many of them.")
@click.option("--img2dataset", metavar="COMMAND", help="img2dataset's command, from an environment of its own.")
@click.option(
    "--candidates", type=click.IntRange(100), multiple=True, default=(10_000,), show_default=True, help="For memory."
)
@click.option(
    "--only", type=click.Choice(["urls", "files", "memory"]), multiple=True, help="These parts (default: all)."
)
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def bench_ingest(
    images: Path,
    samples: int,
    img2dataset: str | None,
    candidates: tuple[int, ...],
    only: tuple[str, ...],
    as_json: bool,
) -> None:
    """Taking in an image, against img2dataset and a plain ShardWriter loop; memory by number of candidates."""
    from .bench.ingest import bench_ingest as run

    sys.exit(run(images, samples, img2dataset, candidates, only, as_json))


@bench.command(
    "objectives",
    epilog=example(
        "gristmill bench objectives", "gristmill bench objectives --only step --threads 1 --rounds 3 --json",
        "gristmill bench objectives --only growth --plot growth.png", "gristmill bench objectives --only parts --steps 2",
        "gristmill bench objectives --only step --device cuda batch=64",
    ),
)  # fmt: skip
@click.option(
    "--only", type=click.Choice(["forms", "step", "growth", "parts"]), multiple=True, help="These parts (default: all)."
)
@click.option("--steps", type=click.IntRange(1), default=3, show_default=True, help="Steps of each kind in a round.")
@click.option("--rounds", type=click.IntRange(1), default=1, show_default=True, help="Turns of all kinds of steps.")
@click.option("--threads", type=click.IntRange(0), default=0, show_default="one a core", help="Threads of each.")
@click.option("--bf16", is_flag=True, help="Measure steps in bf16 even where its products are slower than float32's.")
@click.option(
    "--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True, help="cuda: steps alone."
)
@click.option("--plot", type=NewFile(), help="Draw the growth into this PNG.")
@click.option("--tiny", is_flag=True, help="Networks and memories so small that the figures mean nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
def bench_objectives(
    only: tuple[str, ...], steps: int, rounds: int, threads: int, bf16: bool, device: str, plot: Path | None,
    tiny: bool, as_json: bool, overrides: tuple[str, ...],
) -> None:  # fmt: skip
    """A Mugs step and its parts against the way the official code computes it: time, memory, growth.

    And "parts": a step of multigrain, and what each of its objectives adds to it.
    """
    from .bench.objectives import bench_objectives as run

    if device == "cuda":
        if plot or only != ("step",):
            raise click.UsageError("--device cuda measures whole steps: add --only step, and leave --plot out")
        import torch

        if not torch.cuda.is_available():
            raise click.UsageError("--device cuda: torch sees no GPU here")

    sys.exit(
        run(
            as_json, only, plot=plot, threads=threads, steps=steps, rounds=rounds, bf16=bf16, tiny=tiny,
            device=device, overrides=overrides,
        )
    )  # fmt: skip


@bench.command(
    "learning",
    epilog=example(
        "gristmill bench learning --out results --tiny",
        "gristmill bench learning --out results --set procedural --seed 0 --arm Mugs --arm multigrain",
        "gristmill bench learning --out results --plot learning.png",
    ),
)
@click.option("--out", type=FOLDER, required=True, help="Results, data sets and runs; what is there is not made again.")
@click.option(
    "--set",
    "sets",
    type=click.Choice(["procedural", "fashion", "photographs"]),
    multiple=True,
    help="These data sets (default: all).",
)
@click.option(
    "--arm", "arms", multiple=True, metavar="ARM", help="These ways to learn (default: all; a wrong one lists them)."
)
@click.option("--seed", "seeds", type=click.IntRange(0), multiple=True, help="These seeds (default: 3, 4, 5).")
@click.option("--images", type=click.IntRange(32), default=12000, show_default=True, help="Images of each run.")
@click.option(
    "--tiny",
    is_flag=True,
    help="One seed, few images, small sets: the machinery in some minutes, figures mean nothing.",
)
@click.option("--plot", type=NewFile(), help="Draw the arms into this PNG.")
@click.option("--json", "as_json", is_flag=True, help="Print means and spreads as JSON.")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
def bench_learning(
    out: Path, sets: tuple[str, ...], arms: tuple[str, ...], seeds: tuple[int, ...], images: int, tiny: bool,
    plot: Path | None, as_json: bool, overrides: tuple[str, ...],
) -> None:  # fmt: skip
    """One granularity or several? The same student, crops and samples under each objective, on three data sets.

    Each arm is asked a probe for each granularity. Kill it and start it again: finished pieces stay. Start it twice, and
    two processes share the work. All of it takes some three hours of two cores.
    """
    from .bench.learning import ARMS, SEEDS, LearningError
    from .bench.learning import bench_learning as run

    if strange := [arm for arm in arms if arm not in ARMS]:
        raise LearningError(f"there is no arm {strange[0]!r}; there are {', '.join(ARMS)}")
    chosen = sets or ("procedural", "fashion", "photographs")
    pictures, seeds = (480, seeds or SEEDS[:1]) if tiny else (None, seeds or SEEDS)
    run_images = 256 if tiny else images
    sys.exit(run(out, chosen, arms or tuple(ARMS), seeds, run_images, pictures, overrides, as_json=as_json, plot=plot))


@bench.command(
    "scale",
    epilog=example(
        "gristmill bench scale --out scale.jsonl --plot scale.png",
        "gristmill bench scale --ranks 64 --samples 1e8 --only order --only elastic",
    ),
)
@click.option("--ranks", type=click.IntRange(16), default=4096, show_default=True, help="Ranks, in nodes of eight.")
@click.option("--samples", type=float, default=1e10, show_default="1e10", help="Samples of the data set.")
@click.option("--sampled", type=click.IntRange(16), default=2048, show_default=True, help="Batches to look at.")
@click.option(
    "--only",
    type=click.Choice(["order", "elastic", "cache", "process", "monitor", "checkpoints"]),
    multiple=True,
    help="These parts (default: all).",
)
@click.option("--out", type=NewFile(), help="Rows of JSON; other parts' are kept.")
@click.option("--plot", type=NewFile(), help="Draw the rows into this PNG.")
def bench_scale(
    ranks: int, samples: float, sampled: int, only: tuple[str, ...], out: Path | None, plot: Path | None
) -> None:
    """All ranks of a cluster in one process: exactly once, balance, caches, watching, checkpoints. Some minutes."""
    from .bench.scale_ranks import main as run

    given = [f"--ranks={ranks}", f"--samples={samples}", f"--sampled={sampled}", *(f"--only={part}" for part in only)]
    run([*given, *(f"--out={path}" for path in (out,) if path), *(f"--plot={path}" for path in (plot,) if path)])
