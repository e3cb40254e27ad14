"""The command `gristmill plan`. Imports happen when it runs."""

from __future__ import annotations

import json
import sys

import click

from .commands import example, main


@main.command(
    epilog=example(
        "gristmill plan mugs-vitl16-250 --gpus 32",
        "gristmill plan multigrain-vitg16 --gpus 128 --gpu a100-40 --json",
        "gristmill plan multigrain-vitb16 batch=1024 engine.recompute=true --gpus 8 --gpu 'h100-80 memory=60'",
        "gristmill plan my.yaml --gpus 16 --gpu 'custom memory=96,flops=500,bandwidth=3000,link=200' --network 50",
        "gristmill plan dino-vits16-100 --gpus 8 --assume efficiency=0.42 --assume bytes=60000",
    )
)
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--gpus", type=click.IntRange(1), required=True, help="How many, over all nodes.")
@click.option(
    "--gpu",
    default="h100-80",
    show_default=True,
    metavar="NAME [FIELD=NUMBER,...]",
    help="h100-80, a100-80, a100-40, h200, b200, l40s, v100-32 or custom; fields memory (GiB), flops, flops32 (TFLOP/s), "
    "bandwidth, link, network (GB/s), decoders (images/s).",
)
@click.option("--node-gpus", type=click.IntRange(1), default=8, show_default=True, help="GPUs of a node.")
@click.option("--network", type=float, help="GB/s of a node, all its adapters together.  [default: by the GPU]")
@click.option("--images", type=click.IntRange(2), help="Images of the data set.  [default: ImageNet-1k's]")
@click.option(
    "--assume",
    "assumed",
    multiple=True,
    metavar="NAME=NUMBER",
    help="Replace an assumption: efficiency, bandwidth, launch, "
    "wire, overlap, reserve, fragments, pixels, bytes, core or readers; see docs/plan.md.",
)
@click.option("--tiny", is_flag=True, help="Plan what the recipe's --tiny makes of it.")
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON.")
def plan(
    recipe: str,
    overrides: tuple[str, ...],
    gpus: int,
    gpu: str,
    node_gpus: int,
    network: float | None,
    images: int | None,
    assumed: tuple[str, ...],
    tiny: bool,
    as_json: bool,
) -> None:
    """Memory, time and what else RECIPE needs on so many GPUs, before they are booked.

    No GPU and no data are touched. Exit 0 if it fits; 2 if not, with the largest part, by how much it is over, and
    changes after which it would fit.
    """
    from rich.console import Console

    from .planning import Assumptions, Setting, hardware
    from .planning import plan as make
    from .planning.hollow import IMAGES
    from .planning.tables import show, verdict
    from .recipe import load_recipe

    resolved = load_recipe(recipe, overrides, tiny=tiny)
    machine = hardware(gpu, gpus, node_gpus, network)
    setting = Setting(machine, Assumptions().replaced(list(assumed)), images or IMAGES)
    with Console(stderr=True).status("following a step without memory"):
        found = make(resolved, setting)
    if as_json:
        click.echo(json.dumps(found.dump()))
    else:
        show(found, Console())
    if not found.fits and as_json:
        click.echo(verdict(found), err=True)
    sys.exit(0 if found.fits else 2)
