"""Which drawings a run's report has, and bringing them up to date with its newest checkpoint.

Each lies as one file of arrays in RUN/report/, with the position of the checkpoint that it shows. A drawing that fails costs
itself: its section says why, and the others are drawn. Torch is imported only when there is something to draw.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .crops import BROKEN
from .folder import RunFolder

FOLDER = "report"
VERSION = 1  # of the arrays; a drawing of another is made anew
NAMES = ("attention", "tree", "groups", "matches")
OBJECTIVE = {"tree": "hierarchy", "groups": "local_group", "matches": "dense"}


def drawings_of(recipe: Mapping[str, Any]) -> list[str]:
    """Names of the drawings that apply to a recipe, read as plain YAML."""
    if not isinstance(recipe.get("student"), dict):
        return []
    objectives = recipe.get("objectives")
    wanted = objectives if isinstance(objectives, dict) else {}
    return [name for name in NAMES if name not in OBJECTIVE or wanted.get(OBJECTIVE[name]) is not None]


def path_of(run: Path, name: str) -> Path:
    """Where a drawing lies."""
    return run / FOLDER / f"{name}.npz"


def shown_position(run: Path, name: str) -> int | None:
    """Of which checkpoint a drawing is; None if there is none that can be read here."""
    try:
        with np.load(path_of(run, name), allow_pickle=False) as archive:
            return int(archive["position"]) if int(archive["version"]) == VERSION else None
    except BROKEN:
        return None


def draw(run: RunFolder) -> dict[str, str]:
    """Draw what is missing or older than the newest checkpoint; why not, for each that could not be drawn."""
    wanted = drawings_of(run.recipe)
    if not wanted:
        return {}
    try:
        newest = _newest(run)
        if newest is None:
            return dict.fromkeys(wanted, "there is no checkpoint to draw from")
        return _draw(run.path, [name for name in wanted if shown_position(run.path, name) != newest])
    except Exception as error:  # whatever is wrong with checkpoint, data or network, the rest of the page is wanted
        return dict.fromkeys(wanted, _said(error))


def _newest(run: RunFolder) -> int | None:
    """Position of the newest checkpoint, or None."""
    checkpoint = run.recipe.get("checkpoint")
    store = checkpoint.get("store") if isinstance(checkpoint, dict) else None
    if not store and not (run.path / "checkpoints").is_dir():
        return None
    from ..stores import open_store

    return max(open_store(store or run.path / "checkpoints").positions(), default=None)


def _draw(folder: Path, names: list[str]) -> dict[str, str]:
    if not names:
        return {}
    from ..recipe import load_recipe
    from .draw.attention import draw_attention
    from .draw.groups import draw_groups
    from .draw.matches import draw_match_pictures
    from .draw.source import open_source
    from .draw.tree import draw_tree

    makers = {"attention": draw_attention, "tree": draw_tree, "groups": draw_groups, "matches": draw_match_pictures}
    source = open_source(folder, load_recipe(folder / "recipe.yaml"))
    failed: dict[str, str] = {}
    for name in names:
        try:
            save(path_of(folder, name), source.position, makers[name](source))
        except Exception as error:  # as above
            failed[name] = _said(error)
    return failed


def save(path: Path, position: int, arrays: Mapping[str, np.ndarray]) -> None:
    """Write a drawing, whole or not at all."""
    path.parent.mkdir(exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            np.savez_compressed(
                file, allow_pickle=False, version=np.array(VERSION), position=np.array(position), **arrays
            )
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _said(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 500 else f"{text[:500]}…"
