"""Commands about runs: demo, train, weights in and out, replay, report. Imports happen when they run."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from .commands import FOLDER, example, main


@contextmanager
def at_once() -> Iterator[None]:
    """A Ctrl-C that did not wait: said in a line, exit code 130."""
    try:
        yield
    except KeyboardInterrupt:
        click.echo("ended at once; the same command goes on from what is there", err=True)
        sys.exit(130)


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
@click.option("--tiny", is_flag=True, help="Shrink everything: a look at the machinery in about a minute.")
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

    with at_once():
        code = run_demo(out, images, tiny=tiny, seed=seed, overrides=overrides)
    sys.exit(code)


@main.command(
    epilog=example(
        "gristmill train demo data=shards/train --out runs/first",
        "gristmill train my.yaml optimizer.lr=0.001 --out runs/b",
        "gristmill train my.yaml --out runs/b log.tensorboard=true",
        "gristmill train my.yaml --out runs/b --json | jq -c 'select(.kind == \"step\") | [.position, .loss]'",
    )
)
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option(
    "--out", type=FOLDER, required=True, help="Run folder; if it has a checkpoint, training goes on from there."
)
@click.option("--tiny", is_flag=True, help="Shrink the recipe to run on a laptop CPU in minutes.")
@click.option(
    "--json", "as_json", is_flag=True, help="Write JSON lines on standard output; docs/training.md has the fields."
)
@click.option("--quiet", is_flag=True, help="Show nothing but warnings and errors.")
def train(recipe: str, overrides: tuple[str, ...], out: Path, tiny: bool, as_json: bool, quiet: bool) -> None:
    """Train RECIPE (a shipped name or a YAML file), or go on where the run folder's newest checkpoint stands.

    Ctrl-C once stops after a checkpoint (exit code 130), and the same command goes on from there.
    """
    with at_once():
        from .recipe import load_recipe

        resolved = load_recipe(recipe, overrides, tiny=tiny)
        from .train import train as run

        ending = run(resolved, out, form="json" if as_json else "quiet" if quiet else "auto")
    if ending.code:
        click.echo(f"stopped at image {ending.position}; the same command goes on from there", err=True)
    sys.exit(ending.code)


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
@click.option(
    "--teacher/--student", default=None, help="Which of two networks.  [default: the one that its authors evaluate]"
)
@click.option("--everything", is_flag=True, help="Both networks, heads, queues, memories (Mugs, MoCo, DenseCL, HCSC).")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def import_(checkpoint: Path, out: Path, teacher: bool | None, everything: bool, as_json: bool) -> None:
    """Take weights of others, from .pth or .safetensors: CHECKPOINT of a method below, or any plain ViT or ResNet.

    Mugs, DINO, iBOT; MoCo v1 to v3, DenseCL, HCSC, SwAV, DeepCluster v2, BYOL, SimCLR, SimSiam, torchvision, timm.

    Nothing in the file is executed. What is used, left out, missing or reshaped is printed. OUT holds a backbone under
    timm's names, or with --everything what a run goes on from (student.init=OUT).
    """
    from .importing import run_import

    who = None if teacher is None else "teacher" if teacher else "student"
    sys.exit(run_import(checkpoint, out, who, everything=everything, as_json=as_json))


@main.command(
    epilog=example(
        "gristmill export runs/first --out first.safetensors",
        "gristmill export runs/first/checkpoints/000000036000 --student --out student.safetensors",
        "gristmill export runs/first --size 96x96 --out first-96.safetensors",
        "gristmill export runs/first --format huggingface --out first-hf",
        "gristmill export runs/first --format onnx --out first.onnx",
        "gristmill export runs/dense --student --format detectron2 --out dense.pth",
        "gristmill export runs/first --format card --out README.md",
    )
)
@click.argument("checkpoint", metavar="RUN|CHECKPOINT")
@click.option("--out", type=FOLDER, required=True, help="What to write; see the table above for its ending.")
@click.option("--teacher/--student", default=True, help="Which network.  [default: teacher]")
@click.option(
    "--format",
    "form",
    type=click.Choice(["timm", "huggingface", "onnx", "torch-export", "detectron2", "mmdetection", "official", "card"]),
    default="timm",
    show_default=True,
    help="What is written; see above.",
)
@click.option("--size", metavar="HxW", help="Carry a ViT's position embedding over to images of this size.")
@click.option("--json", "as_json", is_flag=True, help="Print the metadata as JSON.")
def export(checkpoint: str, out: Path, teacher: bool, form: Any, size: str | None, as_json: bool) -> None:
    """Give weights to others: the teacher of a run's newest checkpoint, or of the one named.

    Any number of ranks and any ZeRO stage may have written it. It prints the line of Python that loads OUT, or for a
    detector the lines for its configuration, and writes a model card beside it (OUT.md, README.md in a folder).

    \b
      timm                     *.safetensors  backbone, timm's names
      huggingface              a new folder   backbone, transformers' ViTModel or ResNetModel
      onnx                     *.onnx         backbone as a program, checked against torch
      torch-export             *.pt2          the same for torch.export.load
      detectron2, mmdetection  *.pth          backbone, a detector's names
      official                 *.safetensors  backbone and heads, the official Mugs code's names
      card                     *.md           the model card alone
    """
    from .export import export_checkpoint, usage

    height, by, width = (size or "0x0").partition("x")
    if not (by and height.isdecimal() and width.isdecimal()) or (size and not int(height) * int(width)):
        raise click.BadParameter(f"{size!r} is no HEIGHTxWIDTH, for example 96x96", param_hint="--size")
    wanted = (int(height), int(width)) if size else None
    path, about = export_checkpoint(checkpoint, out, "teacher" if teacher else "student", format=form, size=wanted)
    if as_json:
        click.echo(json.dumps({"out": str(path), **about}))
    else:
        click.echo(f"written: {path}, the {about['gristmill.network']} after {about['gristmill.position']} images")
        if difference := about.get("gristmill.difference"):
            click.echo(f"checked: it differs from torch by at most {difference} of the largest number")
        if form != "card":
            click.echo(f"card: {about['gristmill.card']}")
            click.echo("\n".join(usage(form, about, path)))


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


@main.command(epilog=example("gristmill report runs/first", "gristmill report runs/first --no-draw"))
@click.argument("run", type=FOLDER)
@click.option(
    "--draw/--no-draw",
    default=True,
    show_default=True,
    help="Bring the drawings that need a network up to date: seconds; wants the newest checkpoint and the data.",
)
def report(run: Path, draw: bool) -> None:
    """Write RUN/report.html: one page that needs no network and no other file.

    Probes, neighbours, attention, matches, local groups, the tree of prototypes, curves, crops, data, speed, events. It may
    be made at any time of a run; what cannot be drawn is said on the page.
    """
    from .report import write_report

    click.echo(f"{write_report(run, draw=draw)}")
