"""Matches of places, drawn and counted: which place of one crop a network takes for which place of another.

Dense contrast (DenseCL, arXiv 2011.09157) learns from pairs of places whose backbone features are nearest, so whether these
show the same is what to look at first; any network with a map can be asked, whatever it learned from. Crops are the stream's
own, whose geometry tells which matches are right. As in training the student looks at one crop and the teacher at the
other. matches_page.py draws them.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ..models.dense import pool_places
from ..models.teacher import make_teacher
from ..objectives.correspondence import Counterparts, Matches, counterparts, match_features, side_of
from ..pipeline.standalone import images as stream_of
from ..pipeline.views import View
from ..shards.errors import GristmillError
from ..shards.storage import published
from .checkpoint import CheckpointError, newest
from .matches_page import as_page, draw_matches, stack
from .networks import build_student, saved_networks
from .recipe import Recipe, RecipeError, load_recipe
from .stores import open_store

BATCH = 32  # images at once


class MatchesError(GristmillError, ValueError):
    """Matches that cannot be drawn as asked for."""


@dataclass(frozen=True)
class Pairs:
    """Two crops of each of B images, [B, 3, H, W] each, with their geometry [B, 2, 3]."""

    keys: list[str]
    query: Tensor
    answer: Tensor
    query_geometry: Tensor
    answer_geometry: Tensor

    def head(self, count: int) -> Pairs:
        """Of the first images."""
        tensors = (self.query, self.answer, self.query_geometry, self.answer_geometry)
        return Pairs(self.keys[:count], *(t[:count] for t in tensors))

    def where(self, query_places: int, answer_places: int) -> Counterparts:
        return counterparts(
            self.query_geometry,
            self.answer_geometry,
            query_size=self.query.shape[-1],
            key_size=self.answer.shape[-1],
            query_places=query_places,
            key_places=answer_places,
        )


def draw_pairs(recipe: Recipe, images: int, position: int = 0) -> Pairs:
    """The student's and the teacher's first large crops that differ, of images from `position` of the recipe's stream on."""
    asked, answered = pair_of_views(recipe.views)
    places = [entry.model_dump(include={"path", "weight", "where"}) for entry in recipe.sources]
    with stream_of(places, images, views=recipe.views, config=recipe.stream) as stream:
        stream.seek(position)
        batch = next(stream)
    found = [table[view][:, copy] for table in (batch.views, batch.geometry) for view, copy in (asked, answered)]
    return Pairs(list(batch.keys), *found)


def pair_of_views(views: Sequence[View]) -> tuple[tuple[str, int], tuple[str, int]]:
    """(name, copy) of the student's crop and of the teacher's. MatchesError where there are no two large ones."""
    crops = {
        role: [(view, copy) for view in views if view.role in (role, "both") for copy in range(view.count)]
        for role in ("student", "teacher")
    }
    for view, copy in crops["teacher"][:1]:
        for other, number in sorted(crops["student"], key=lambda crop: -crop[0].size):
            if (other.name, number) != (view.name, copy) and 2 * other.size > view.size:
                return (other.name, number), (view.name, copy)
    raise MatchesError("the recipe's views have no two large crops of an image to match; give it a second one")


def map_of(network: nn.Module, crops: Tensor, grid: int | None = None) -> Tensor:
    """Unit backbone features of each place, [n, S2, d], pooled to `grid`; of square crops [n, 3, S, S]."""
    backbone: nn.Module = network.backbone  # pyright: ignore[reportAssignmentType]
    found = []
    with torch.no_grad():
        for part in crops.split(BATCH):
            places = backbone.norm(backbone(part))[:, 1:]  # pyright: ignore[reportCallIssue]
            side = side_of(places.shape[1])
            found.append(F.normalize(pool_places(places, (side, side), grid).float(), dim=-1))
    return torch.cat(found)


def grid_of(network: nn.Module) -> int | None:
    """To which grid the dense head pools, if there is one and it does."""
    heads: nn.ModuleDict = network.heads  # pyright: ignore[reportAssignmentType]
    return getattr(heads["dense"], "grid", None) if "dense" in heads else None


@dataclass(frozen=True)
class Seen:
    """What one pair of networks makes of `Pairs`: matches of all images, both ways, and where places really lie."""

    one_way: Matches
    mutual: Matches
    where: Counterparts

    def scores(self) -> dict[str, float]:
        """Shares from 0 to 1; of matches whose place the other crop shows, how many are within a cell of it."""
        found = {"overlap": _mean(self.where.inside)}
        for name, matches in (("features", self.one_way), ("mutual", self.mutual)):
            among = matches.kept & self.where.inside
            found[f"{name}_matched"] = _mean(matches.kept)
            found[f"{name}_correct"] = _mean(self.where.correct(matches.index)[among])
            found[f"{name}_chance"] = _mean(self.where.chance()[among])
            own = torch.arange(matches.index.shape[1])
            found[f"{name}_same_place"] = _mean((matches.index == own)[matches.kept])
        return found


def _mean(values: Tensor) -> float:
    return float(values.double().mean()) if values.numel() else 0.0


def see(student: nn.Module, teacher: nn.Module, pairs: Pairs, grid: int | None = None) -> Seen:
    """Match what the student sees in the one crop to what the teacher sees in the other."""
    query, key = map_of(student, pairs.query, grid), map_of(teacher, pairs.answer, grid)
    where = pairs.where(query.shape[1], key.shape[1])
    return Seen(match_features(query, key), match_features(query, key, mutual=True), where)


def matches_of(
    folder: Path,
    out: Path,
    *,
    images: int = 6,
    measured: int = 64,
    position: int = 0,
    best: int = 24,
    grid: int | None = None,
    as_json: bool = False,
) -> int:
    """Draw the matches of a run's newest checkpoint as `out`, *.html or *.png, whole or not at all; returns the exit code.

    `images` are drawn, each with its `best` mutual matches, and `measured` are counted, from `position` of the run's stream
    on. `grid`: places a side, instead of the dense head's grid or the backbone's map. Beside it stands the network before
    its first step, and chance.
    """
    kind = out.suffix.lower()
    if kind not in (".html", ".png"):
        raise MatchesError(f"--out {out}: name a file that ends in .html or .png")
    if not out.absolute().parent.is_dir():
        raise MatchesError(f"--out {out}: there is no folder {out.absolute().parent}; make it first")
    if not (folder / "recipe.yaml").is_file():
        raise RecipeError(f"{folder} holds no run (no recipe.yaml); name the folder that `gristmill train --out` wrote")
    recipe = load_recipe(folder / "recipe.yaml")
    student, teacher, reached = load_networks(folder, recipe)
    grid = grid if grid is not None else grid_of(student)
    pairs = draw_pairs(recipe, max(images, measured), position)
    untrained = build_student(recipe)
    seen = {
        "random": see(untrained.eval(), make_teacher(untrained).eval(), pairs, grid),
        "trained": see(student, teacher, pairs, grid),
    }
    scores = {who: each.scores() for who, each in seen.items()}
    pictures = pictures_of(pairs.head(images), seen["trained"], best)
    if kind == ".html":
        written = as_page(f"{folder} after {reached} images", pairs.keys, pictures, scores).encode()
    else:
        stack(pictures).save(whole := io.BytesIO(), "PNG")
        written = whole.getvalue()
    with published(out) as draft:
        draft.write(written)
    if as_json:
        click.echo(json.dumps({"out": str(out), "position": reached, "measured": len(pairs.keys), "matches": scores}))
        return 0
    click.echo(f"written: {out}, {len(pictures)} images of {folder} after {reached} images")
    for form in ("features", "mutual"):
        parts = [f"{who} {100 * row[f'{form}_correct']:.1f} %" for who, row in scores.items()]
        parts.append(f"chance {100 * scores['trained'][f'{form}_chance']:.1f} %")
        click.echo(f"{form} matches within a cell: {', '.join(parts)}")
    return 0


def load_networks(folder: Path, recipe: Recipe) -> tuple[nn.Module, nn.Module, int]:
    """Student and teacher of the newest whole checkpoint, in evaluation mode, and its position."""
    saved, _ = newest(open_store(recipe.checkpoint.store or folder / "checkpoints"))
    if saved is None:
        raise RecipeError(f"{folder} holds no checkpoint yet; it is written every {recipe.checkpoint.every} images")
    try:
        student, teacher = saved_networks(saved, recipe, "student", "teacher")
    except ValueError as error:
        raise CheckpointError(
            f"{saved.path} does not fit {folder / 'recipe.yaml'}: {error}; use the recipe that it was written with"
        ) from error
    finally:
        saved.close()
    return student.eval(), teacher.eval(), saved.position


def pictures_of(pairs: Pairs, seen: Seen, best: int) -> list[Image.Image]:
    correct, mutual, answer_places = seen.where.correct(seen.mutual.index), seen.mutual, seen.where.side**2
    assert mutual.similarity is not None
    return [
        draw_matches(
            pairs.query[n],
            pairs.answer[n],
            mutual.index[n],
            correct[n],
            key_places=answer_places,
            kept=mutual.kept[n],
            similarity=mutual.similarity[n],
            best=best,
        )
        for n in range(len(pairs.keys))
    ]
