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


@look.command(
    "matches",
    epilog=example(
        "gristmill look matches runs/densecl",
        "gristmill look matches runs/multigrain --grid 7 --out matches.png --json",
    ),
)
@click.argument("run", type=click.Path(exists=True, file_okay=False, path_type=Path), metavar="RUN")
@click.option(
    "--out", type=FOLDER, default=Path("matches.html"), show_default=True, help="File to write, .html or .png."
)
@click.option(
    "--images", type=click.IntRange(1, 64), default=6, show_default=True, help="So many pairs of crops drawn."
)
@click.option("--measured", type=click.IntRange(1), default=64, show_default=True, help="So many pairs counted.")
@click.option("--position", type=click.IntRange(0), default=0, show_default=True, help="Place of the first image.")
@click.option("--best", type=click.IntRange(1), default=24, show_default=True, help="Lines a pair: the surest matches.")
@click.option("--grid", type=click.IntRange(1), help="Places a side (default: as the dense head has them).")
@click.option("--json", "as_json", is_flag=True, help="Print what was counted as JSON.")
def look_matches(run: Path, out: Path, **options: Any) -> None:
    """Which place of one crop a run's networks match with which place of another, drawn, and counted against the truth.

    Any run can be asked, whatever it learned from. Where two crops overlap, their geometry says which matches are right.
    """
    from .matches import matches_of

    sys.exit(matches_of(run, out, **options))
