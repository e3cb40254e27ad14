"""Commands about runs: demo, train, eval, weights in and out, replay, report, status. Imports happen when they run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from .commands import FOLDER, example, main


@main.command(
    epilog=example(
        "gristmill demo",
        "gristmill demo --images ~/Pictures --out runs/pictures",
        "gristmill demo optimizer.lr=0.002 images=20000",
    )
)
@click.option(
    "--out",
    type=FOLDER,
    default=Path("gristmill-demo"),
    show_default=True,
    help="Run folder; go on there if it exists.",
)
@click.option(
    "--images", type=FOLDER, help="A folder of JPEG, PNG or WebP; subfolders are labels, read by probes only."
)
@click.option("--tiny", is_flag=True, help="Shrink everything: a look at the machinery in under a minute.")
@click.option(
    "--seed",
    type=click.IntRange(0, 2**32 - 1),
    default=0,
    show_default=True,
    help="Of the data set made, and of the run.",
)
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
def demo(out: Path, images: Path | None, tiny: bool, seed: int, overrides: tuple[str, ...]) -> None:
    """The whole way in minutes: make shards, train, probe, report.

    Without --images a data set of drawn things is made, whose coarse, fine and instance labels are known. Kill it and
    start it again: it goes on where it was.
    """
    from .demo import run_demo

    sys.exit(run_demo(out, images, tiny=tiny, seed=seed, overrides=overrides))


@main.command(
    epilog=example(
        "gristmill train demo data=shards/train --out runs/first",
        "gristmill train my.yaml optimizer.lr=0.001 --out runs/b",
    )
)
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option(
    "--out", type=FOLDER, required=True, help="Run folder; if it has a checkpoint, training goes on from there."
)
@click.option("--tiny", is_flag=True, help="Shrink the recipe to run on a laptop CPU in minutes.")
def train(recipe: str, overrides: tuple[str, ...], out: Path, tiny: bool) -> None:
    """Train RECIPE (a shipped name or a YAML file), or go on where the run folder's newest checkpoint stands."""
    from .recipe import load_recipe

    resolved = load_recipe(recipe, overrides, tiny=tiny)
    from .train import train as run

    ending = run(resolved, out)
    if ending.code:
        click.echo(f"stopped at image {ending.position}; the same command goes on from there", err=True)
    sys.exit(ending.code)


@main.command(epilog=example("gristmill eval runs/first", "gristmill eval runs/first --query shards/probe --json"))
@click.argument("run", type=FOLDER)
@click.option("--reference", type=FOLDER, help="Data set that neighbours come from (default: the recipe's).")
@click.option("--query", type=FOLDER, help="Held-out data set (default: the recipe's).")
@click.option("--json", "as_json", is_flag=True, help="Print the table as JSON.")
def eval(run: Path, reference: Path | None, query: Path | None, as_json: bool) -> None:
    """Probe the teacher of a run's newest checkpoint: k-NN at each label level, instance retrieval."""
    from .evaluate.online import evaluate_run

    sys.exit(evaluate_run(run, reference, query, as_json=as_json))


@main.command(
    "import",
    epilog=example(
        "gristmill import dino_vitbase16_pretrain_full_checkpoint.pth --out dino.safetensors",
        "gristmill import mugs/checkpoint.pth --student --out student.safetensors --json",
        "gristmill import mugs/checkpoint.pth --everything --out mugs.safetensors",
        "gristmill train my.yaml student.init=mugs.safetensors --out runs/c",
    ),
)
@click.argument("checkpoint", type=FOLDER)
@click.option("--out", type=FOLDER, required=True, help="A file to write, *.safetensors.")
@click.option("--teacher/--student", default=True, help="Which network of a full checkpoint.  [default: teacher]")
@click.option("--everything", is_flag=True, help="Both networks with heads, memories, queues, centre (Mugs).")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def import_(checkpoint: Path, out: Path, teacher: bool, everything: bool, as_json: bool) -> None:
    """Take weights of others: CHECKPOINT of Mugs, DINO or iBOT, or any plain ViT; .pth or .safetensors.

    Nothing in the file is executed. What is used, left out, missing or reshaped is printed. OUT holds a backbone under
    timm's names, or with --everything what a run goes on from (student.init=OUT).
    """
    from .importing import run_import

    sys.exit(run_import(checkpoint, out, "teacher" if teacher else "student", everything=everything, as_json=as_json))


@main.command(
    epilog=example(
        "gristmill export runs/first --out first.safetensors",
        "gristmill export runs/first/checkpoints/000000036000 --student --out student.safetensors",
        "gristmill export runs/first --size 96x96 --out first-96.safetensors",
    )
)
@click.argument("checkpoint", metavar="RUN|CHECKPOINT")
@click.option("--out", type=FOLDER, required=True, help="A file to write, *.safetensors.")
@click.option("--teacher/--student", default=True, help="Which network.  [default: teacher]")
@click.option(
    "--format",
    "form",
    type=click.Choice(["timm", "official"]),
    default="timm",
    show_default=True,
    help="Backbone for timm, or backbone and heads under the official Mugs code's names.",
)
@click.option("--size", metavar="HxW", help="Carry the position embedding over to images of this size.")
@click.option("--json", "as_json", is_flag=True, help="Print the metadata as JSON.")
def export(checkpoint: str, out: Path, teacher: bool, form: Any, size: str | None, as_json: bool) -> None:
    """Give weights to others: the teacher of a run's newest checkpoint, or of the one named, as safetensors.

    Any number of ranks and any ZeRO stage may have written it. It prints the line of Python that loads OUT.
    """
    from .export import call, export_checkpoint

    height, by, width = (size or "0x0").partition("x")
    if not (by and height.isdecimal() and width.isdecimal()) or (size and not int(height) * int(width)):
        raise click.BadParameter(f"{size!r} is no HEIGHTxWIDTH, for example 96x96", param_hint="--size")
    wanted = (int(height), int(width)) if size else None
    path, about = export_checkpoint(checkpoint, out, "teacher" if teacher else "student", format=form, size=wanted)
    if as_json:
        click.echo(json.dumps({"out": str(path), **about}))
    else:
        click.echo(f"written: {path}, the {about['gristmill.network']} after {about['gristmill.position']} images")
        click.echo(call(about, path) if form == "timm" else "its names are the official Mugs code's")


@main.command(
    epilog=example(
        "gristmill replay runs/first",
        "gristmill replay runs/first/captures/000000012288 --json",
        "gristmill replay runs/first/captures/000000012288 --rank 3",
    )
)
@click.argument("capture", type=FOLDER)
@click.option("--rank", "ranks", type=click.IntRange(0), multiple=True, help="Only this rank's share (default: all).")
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def replay(capture: Path, ranks: tuple[int, ...], as_json: bool) -> None:
    """Feed a bad step again that a run left out, and say what is not finite: rank, objective, sample, module, gradients.

    CAPTURE is RUN/captures/POSITION, or RUN if it holds just one. It runs on the CPU, in one process, and changes
    nothing. Exit 0 if what was wrong is wrong again, so that the cause is in the data, the weights or the recipe; 1 if
    not, which points to the hardware or software of the rank that is named.
    """
    from .replay import show_replay

    sys.exit(show_replay(capture, ranks, as_json=as_json))


@main.command(epilog=example("gristmill report runs/first"))
@click.argument("run", type=FOLDER)
def report(run: Path) -> None:
    """Write RUN/report.html: curves, the crops that were fed, probes, nearest neighbours."""
    from .report import write_report

    click.echo(f"{write_report(run)}")


@main.command(epilog=example("gristmill status runs/first", "gristmill status http://127.0.0.1:9464/metrics --once"))
@click.argument("target", default="gristmill-demo")
@click.option("--once", is_flag=True, help="Print one view and leave.")
@click.option("--json", "as_json", is_flag=True, help="Print the values as JSON and leave.")
def status(target: str, once: bool, as_json: bool) -> None:
    """Live view of a run, from its metrics: TARGET is a run folder or a URL."""
    from .monitor.status import show_status

    sys.exit(show_status(target, once, as_json))
