"""What a contact sheet of views shows: some images of a stream, their crops by both executors, and what was drawn.

The crops are those that training makes of these positions: same order, same draws, same executors. Differences are
taken before anything is rounded for showing, in grey levels of 255. contact_page.py makes a page of it, contact_picture.py
one picture. An executor that cannot carry the views out is a finding, not an error: its reason is shown in its place.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..pipeline.augment.colour import MEAN, STD
from ..pipeline.augment.cpu import CpuExecutor
from ..pipeline.augment.reference import decode
from ..pipeline.draws import COLUMNS, NEVER, OPERATIONS, Draws, Plan, draw
from ..pipeline.groups import GROUPS, named_views
from ..pipeline.quality import suggest
from ..pipeline.reader import Reader
from ..pipeline.standalone import open_sources
from ..pipeline.stream import Stream
from ..pipeline.views import StreamConfig, View
from ..shards.errors import GristmillError, nearest
from ..shards.quarantine import Quarantine
from .recipe import RECIPES, load_recipe

_TO_LEVELS = 255 * np.array(STD)[:, None, None]
_IN_WORDS = {
    **{"AutoContrast": "", "Equalize": "", "Invert": "", "Rotate": " {:+.1f}°", "Posterize": " to {:.0f} bits"},
    **{"Solarize": " from {:.0f}", "SolarizeAdd": " +{:.0f}", "Color": " x{:.2f}", "Contrast": " x{:.2f}"},
    **{"Brightness": " x{:.2f}", "Sharpness": " x{:.2f}", "ShearX": " {:+.2f}", "ShearY": " {:+.2f}"},
    **{"TranslateXRel": " {:+.0%}", "TranslateYRel": " {:+.0%}"},
}


class ContactError(GristmillError, ValueError):
    """A contact sheet that cannot be made as asked for."""


@dataclass(frozen=True)
class Crop:
    """One crop of one image."""

    view: str
    form: str  # "weak" or "strong"; "" in a view that has one form only
    words: tuple[str, ...]  # what was drawn for it
    outline: NDArray[np.float64]  # [4, 2]: where its corners lie in the image, (x, y) from its upper left corner
    cpu: NDArray[np.uint8]  # [size, size, 3]
    dali: NDArray[np.uint8] | None  # None where DALI refuses
    apart: NDArray[np.float64] | None  # [size, size, 3]: distance between both, grey levels

    @property
    def mean(self) -> float:
        return 0.0 if self.apart is None else float(self.apart.mean())

    @property
    def largest(self) -> float:
        return 0.0 if self.apart is None else float(self.apart.max())


@dataclass(frozen=True)
class Shot:
    """One image of the stream."""

    position: int
    key: str
    substituted: bool
    image: NDArray[np.uint8]  # upright, [H, W, 3]
    crops: list[Crop]


@dataclass(frozen=True)
class Sheet:
    """All that is shown. `refused`: why DALI does not carry these views out, "" if it does."""

    title: str
    data: str
    seed: int
    views: list[View]
    shots: list[Shot]
    refused: str

    def crops(self, view: str) -> list[Crop]:
        return [crop for shot in self.shots for crop in shot.crops if crop.view == view]


def found_views(name: str) -> tuple[list[View], StreamConfig | None]:
    """Views of a set (`mugs`), or of a recipe (a shipped name or a file), then with how the stream is run.

    ContactError names the nearest one; RecipeError, if a file holds no recipe.
    """
    if name in GROUPS:
        return [View.model_validate(entry) for entry in named_views(name)], None
    shipped = sorted(path.stem for path in RECIPES.glob("*.yaml"))
    if name in shipped or Path(name).is_file():
        recipe = load_recipe(name)
        return recipe.views, recipe.stream
    if Path(name).suffix in (".yaml", ".yml"):
        raise ContactError(f"no recipe {name!r}: there is no such file")
    hint = nearest(name, [*GROUPS, *shipped])
    raise ContactError(
        f"no recipe and no set of views {name!r}: {hint}sets are {', '.join(GROUPS)}; recipes {', '.join(shipped)}, "
        "or a YAML file"
    )


def make_sheet(name: str, data: str, *, images: int = 4, seed: int | None = None, position: int = 0) -> Sheet:
    """The views of `name` (see found_views) of `images` images of the data set `data`, from `position` on.

    seed: default the recipe's, or 0. Images that are damaged or removed are replaced, as in training.
    """
    views, config = found_views(name)
    plan = Plan(views)
    manifests, sources = open_sources([{"path": data}])
    if config is None:
        lanes, window = suggest(sources[0].selected)
        config = StreamConfig(lanes=lanes, window=window)
    seed = config.seed if seed is None else seed
    positions = position + np.arange(images)
    with tempfile.TemporaryDirectory(prefix="gristmill-") as scratch:
        stream = Stream(sources, seed, config.lanes, config.window)
        quarantine = Quarantine(Path(scratch) / "quarantine.jsonl")
        reader = Reader(manifests, quarantine, order=stream, seed=seed, threads=1)
        try:
            read = reader.read(positions, decode_check=True)
            encoded = [image.copy() for image in read.data]  # the reader's memory ends with it
        finally:
            reader.close()
    draws = draw(plan, seed, positions, read.sizes)
    ours = CpuExecutor(plan).run(encoded, draws)
    theirs, refused = _by_dali(plan, encoded, draws)
    shots = []
    for slot, image in enumerate(encoded):
        pixels = decode(image)
        assert pixels is not None  # the reader has checked that
        crops = [_crop(plan, draws, slot, v, ours, theirs) for v in range(plan.crops)]
        known = int(positions[slot]), read.keys[slot], bool(read.substituted[slot])
        shots.append(Shot(*known, pixels.astype(np.uint8), crops))
    return Sheet(name, data, seed, list(views), shots, refused)


def _by_dali(plan: Plan, encoded: Sequence[NDArray[np.uint8]], draws: Draws) -> tuple[dict[str, Tensor] | None, str]:
    """What DALI makes of it, or why it does not."""
    try:
        from ..pipeline.augment.dali import DaliExecutor

        return DaliExecutor(plan, batch=len(encoded)).run(encoded, draws), ""
    except (GristmillError, ImportError, RuntimeError, ValueError) as error:
        lines = str(error).strip().splitlines()
        return None, lines[0] if lines else type(error).__name__


def _crop(
    plan: Plan, draws: Draws, slot: int, v: int, ours: dict[str, Tensor], theirs: dict[str, Tensor] | None
) -> Crop:
    view, copy = plan.views[plan.owner[v]], int(plan.copies[v])
    mine = ours[view.name][slot, copy].numpy()
    other = None if theirs is None else theirs[view.name][slot, copy].numpy()
    corners = np.array([(0, 0), (1, 0), (1, 1), (0, 1)]) * view.size - 0.5
    geometry = draws.geometry[slot, v].astype(np.float64)
    strong = draws.column("strong")[slot, v] > 0
    apart = None if other is None else np.abs(mine.astype(np.float64) - other) * _TO_LEVELS
    return Crop(
        view=view.name,
        form="" if view.strong is None else "strong" if strong else "weak",
        words=in_words(draws.params[slot, v]),
        outline=corners @ geometry[:, :2].T + geometry[:, 2] + 0.5,
        cpu=_shown(mine),
        dali=None if other is None else _shown(other),
        apart=None if apart is None else apart.transpose(1, 2, 0),
    )


def _shown(crop: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Normalised [3, H, W] -> uint8 [H, W, 3]."""
    levels = (crop.transpose(1, 2, 0) * np.array(STD) + np.array(MEAN)) * 255
    return np.rint(levels.clip(0, 255)).astype(np.uint8)


def show_views(name: str, data: str, out: Path, *, images: int, seed: int | None, position: int, as_json: bool) -> int:
    """Write the sheet as `out`, *.html or *.png, whole or not at all, and say how far apart the executors are."""
    from .contact_page import as_page, spread
    from .contact_picture import as_picture

    kind = out.suffix.lower()
    if kind not in (".html", ".png"):
        raise ContactError(f"--out {out}: name a file that ends in .html or .png")
    if not out.absolute().parent.is_dir():
        raise ContactError(f"--out {out}: there is no folder {out.absolute().parent}; make it first")
    sheet = make_sheet(name, data, images=images, seed=seed, position=position)
    partial = out.with_name(f".{out.name}.partial")
    try:
        if kind == ".html":
            partial.write_text(as_page(sheet), encoding="utf-8")
        else:
            as_picture(sheet).save(partial, "PNG")
        os.replace(partial, out)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    mean, largest = spread([crop for shot in sheet.shots for crop in shot.crops])
    about = {"out": str(out), "images": len(sheet.shots), "crops": len(sheet.shots[0].crops), "refused": sheet.refused}
    if not sheet.refused:
        about |= {"mean": mean, "largest": largest}
    if as_json:
        click.echo(json.dumps(about))
        return 0
    click.echo(f"written: {out}, {about['images']} images with {about['crops']} crops each")
    if sheet.refused:
        click.echo(f"DALI does not carry these views out: {sheet.refused}")
    else:
        click.echo(f"CPU executor and DALI: {mean:.3f} grey levels of 255 apart on average, {largest:.1f} at most")
    return 0


def in_words(params: NDArray[np.float32]) -> tuple[str, ...]:
    """What was drawn for a crop, float32 [K] as COLUMNS says, besides its box."""
    p = {name: float(params[index]) for index, name in enumerate(COLUMNS)}
    words = []
    for operation, argument in ((p["op1"], p["arg1"]), (p["op2"], p["arg2"])):
        if operation:
            name = OPERATIONS[int(operation) - 1]
            words.append(name + _IN_WORDS[name].format(argument))
    if p["flip"]:
        words.append("flipped")
    factors = [f"{name} x{p[name]:.2f}" for name in ("brightness", "contrast", "saturation") if p[name] != 1]
    words += factors
    if p["hue"]:
        words.append(f"hue {360 * p['hue']:+.0f}°")
    if p["grey"]:
        words.append("grey")
    if p["sigma"]:
        words.append(f"blur, sigma {p['sigma']:.2f}")
    if p["solarize"] < NEVER:
        words.append(f"solarised from {p['solarize']:.0f}")
    if p["erase_x1"] > p["erase_x0"]:
        width, height = p["erase_x1"] - p["erase_x0"], p["erase_y1"] - p["erase_y0"]
        words.append(f"erased {width:.0f} x {height:.0f}")
    return tuple(words)
