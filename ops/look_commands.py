"""`gristmill look ...`: what training sees, as pictures."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from .commands import FOLDER, example, main


@main.group()
def look() -> None:
    """What training sees, as pictures."""


@look.command(
    "views",
    epilog=example(
        "gristmill look views mugs --data shards/train",
        "gristmill look views my.yaml --data shards/train --position 100000 --out views.png",
    ),
)
@click.argument("name", metavar="RECIPE|VIEWS")
@click.option("--data", required=True, help="Data set whose images are shown: a folder or a URL.")
@click.option("--images", type=click.IntRange(1, 64), default=4, show_default=True, help="So many images.")
@click.option("--out", type=FOLDER, default=Path("views.html"), show_default=True, help="File to write, .html or .png.")
@click.option("--seed", type=click.IntRange(0, 2**64 - 1), help="Of order and draws (default: the recipe's, or 0).")
@click.option("--position", type=click.IntRange(0), default=0, show_default=True, help="Place of the first image.")
@click.option("--json", "as_json", is_flag=True, help="Print what was written as JSON.")
def look_views(name: str, data: str, out: Path, **options: Any) -> None:
    """A contact sheet: what each view of some images looks like, by the CPU executor, by DALI, and their difference.

    Views are those of a recipe (a shipped name or a YAML file) or a set by name (mugs, dino, ibot, moco-v2 ...).
    Order and draws are training's: a recipe's sheet shows what a run on this data is fed at these positions.
    """
    from .contact import show_views

    sys.exit(show_views(name, data, out, **options))
