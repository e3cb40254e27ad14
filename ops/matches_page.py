"""How matches of places look: two crops with lines between them, and a page of such pictures with what was counted.

Right matches are blue and whole, wrong ones orange and dashed: colour-blind eyes tell these two apart, and so does a
print without colours. The surest matches are drawn, since lines from every place would hide the crops.
"""

from __future__ import annotations

from html import escape

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ..objectives.correspondence import side_of
from .report.crops import as_pixels, data_uri
from .report.page import POLICY
from .report.style import STYLE

TILE, GAP = 336, 24  # pixels a side of a drawn crop, and between two
RIGHT, WRONG, UNKNOWN = (0, 102, 168), (213, 94, 0), (160, 74, 128)


def draw_matches(
    query: Tensor,
    key: Tensor,
    match: Tensor,
    correct: Tensor | None = None,
    *,
    key_places: int | None = None,
    kept: Tensor | None = None,
    similarity: Tensor | None = None,
    best: int | None = None,
) -> Image.Image:
    """Two crops [3, H, W], normalised as fed, side by side, a line from each place to its match: RGB.

    match [Sq] int64: place of the key's square grid; correct [Sq] bool colours them; kept [Sq] bool: draw only these;
    best: of these so many with the largest similarity [Sq]. key_places: cells of the key's grid, where it is another than
    the query's. Lines join the centres of cells. ValueError if `best` comes without a similarity, or places make no square.
    """
    chosen = torch.ones_like(match, dtype=torch.bool) if kept is None else kept.cpu()
    places = chosen.nonzero().squeeze(1)
    if best is not None:
        if similarity is None:
            raise ValueError(f"the best {best} of the matches want their similarity")
        order = similarity.cpu()[places].argsort(descending=True, stable=True)
        places = places[order[:best]].sort().values
    sides = side_of(len(match)), side_of(key_places or len(match))
    canvas = Image.new("RGB", (2 * TILE + GAP, TILE), (255, 255, 255))
    for left, crop in ((0, query), (TILE + GAP, key)):
        pixels = Image.fromarray(as_pixels(crop.detach().cpu().float().numpy()))
        canvas.paste(pixels.resize((TILE, TILE), Image.Resampling.BILINEAR), (left, 0))
    pen = ImageDraw.Draw(canvas)
    ends = []
    for place in places.tolist():
        there = int(match[place])
        colour, dashed = UNKNOWN, False
        if correct is not None:
            colour, dashed = (RIGHT, False) if bool(correct[place]) else (WRONG, True)
        ends.append((_middle(place, sides[0], 0), _middle(there, sides[1], TILE + GAP), colour, dashed))
    for a, b, colour, dashed in ends:
        pen.line([a, b], (255, 255, 255), 4)  # a rim, so that a line is seen on any ground
        _line(pen, a, b, colour, dashed)
    for a, b, colour, _ in ends:
        for x, y in (a, b):
            pen.ellipse((x - 4, y - 4, x + 4, y + 4), colour, (255, 255, 255))
    return canvas


def _middle(place: int, side: int, left: int) -> tuple[float, float]:
    step = TILE / side
    return left + (place % side + 0.5) * step, (place // side + 0.5) * step


def _line(
    pen: ImageDraw.ImageDraw, a: tuple[float, float], b: tuple[float, float], colour: tuple, dashed: bool
) -> None:
    if not dashed:
        pen.line([a, b], colour, 2)
        return
    start, end = np.array(a), np.array(b)
    pieces = max(1, round(float(np.linalg.norm(end - start)) / 14))
    for piece in range(pieces):
        first, last = start + (end - start) * piece / pieces, start + (end - start) * (piece + 0.6) / pieces
        pen.line([*first.tolist(), *last.tolist()], colour, 2)


def stack(pictures: list[Image.Image]) -> Image.Image:
    """One below the other."""
    canvas = Image.new("RGB", (pictures[0].width, len(pictures) * (TILE + GAP) - GAP), (255, 255, 255))
    for row, picture in enumerate(pictures):
        canvas.paste(picture, (0, row * (TILE + GAP)))
    return canvas


_MORE = "main{max-width:80rem}.sheet{width:100%;max-width:44rem}.dashed{border-bottom:2px dashed #d55e00}.solid{border-bottom:2px solid #0066a8}"


def as_page(about: str, keys: list[str], pictures: list[Image.Image], scores: dict[str, dict[str, float]]) -> str:
    """One HTML page without scripts: what was counted, then the pictures."""
    rows = []
    for form, words in (("features", "nearest feature"), ("mutual", "nearest both ways")):
        cells = [
            scores["trained"][f"{form}_chance"],
            *(scores[who][f"{form}_correct"] for who in ("random", "trained")),
        ]
        cells += [scores["trained"][f"{form}_{what}"] for what in ("matched", "same_place")]
        rows.append(f"<tr><th>{words}</th>{''.join(f'<td>{100 * cell:.1f} %</td>' for cell in cells)}</tr>")
    heads = ("matches", "right by chance", "before training", "now", "of all places", "of their own number")
    head = "".join(f"<th>{text}</th>" for text in heads)
    shown = "".join(
        f'<section><h2>{escape(key)}</h2><img class="sheet" alt="matches of places in two crops of {escape(key)}" '
        f'src="{data_uri(picture, "jpeg")}"></section>'
        for key, picture in zip(keys, pictures, strict=False)
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>Matches · Gristmill</title><style>{STYLE}{_MORE}</style></head><body><main>"
        f'<h1>Matches of places</h1><p class="lead">{escape(about)}.</p>'
        "<p>A match is right if it lies within a cell of the place that shows the same point of the image. Of "
        f"{len(keys)} images, of places that both crops show ({100 * scores['trained']['overlap']:.0f} %):</p>"
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
        '<p>Drawn are the surest of those that find each other: <span class="solid">right</span>, '
        f'<span class="dashed">wrong</span>.</p>{shown}</main></body></html>\n'
    )
