"""A contact sheet as one picture, for where no page can be looked at: a chat, a ticket, a paper.

A row an image: the image with its crops' outlines, then its crops, seven in a line, each by the CPU executor, by DALI and
the distance between both, and below that what was drawn. The picture is light whatever the reader's taste.
"""

from __future__ import annotations

import textwrap

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from .contact import Crop, Sheet, Shot
from .contact_page import AMPLIFIED, amplified, spread

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

SOURCE, TILE, GAP, ROW = 420, 128, 10, 7  # widths in pixels; crops in a line
LETTERS, LINE, LINES = 25, 13, 6  # of the text below a crop: letters in a line, pixels of a line, lines
COLOURS = ("#0066a8", "#c25700", "#00805c", "#a04a80", "#7a6a00", "#4a545e")
_GROUND, _INK, _SOFT = "#fcfcfa", "#1d2126", "#5b646e"


def as_picture(sheet: Sheet) -> Image.Image:
    """The picture, RGB."""
    font, small = ImageFont.load_default(15), ImageFont.load_default(11)
    cell = 3 * (TILE + 2) + (LINES + 1) * LINE + GAP
    lines = -(-len(sheet.shots[0].crops) // ROW)
    heights = [max(lines * cell, _scaled(shot.image)[1] + 2 * LINE + 6) + GAP for shot in sheet.shots]
    top = 64
    width = SOURCE + 3 * GAP + ROW * (TILE + GAP)
    canvas = Image.new("RGB", (width, top + sum(heights) + GAP), _GROUND)
    pen = ImageDraw.Draw(canvas)
    colours = {view.name: COLOURS[number % len(COLOURS)] for number, view in enumerate(sheet.views)}
    pen.text((GAP, GAP), f"Views of {sheet.title}: {sheet.data}, seed {sheet.seed}", _INK, font)
    pen.text((GAP, GAP + 22), _about(sheet), _SOFT, small)
    for shot, height in zip(sheet.shots, heights, strict=True):
        _put_shot(canvas, pen, shot, top, colours, small)
        for number, crop in enumerate(shot.crops):
            x = SOURCE + 2 * GAP + number % ROW * (TILE + GAP)
            _put_crop(canvas, pen, crop, x, top + number // ROW * cell, colours[crop.view], small)
        top += height
    return canvas


def _about(sheet: Sheet) -> str:
    if sheet.refused:
        return textwrap.shorten(f"CPU executor alone; DALI does not carry these views out: {sheet.refused}", 200)
    mean, largest = spread([crop for shot in sheet.shots for crop in shot.crops])
    return (
        f"top down: CPU executor, DALI, their distance {AMPLIFIED} times as bright (mean {mean:.3f}, largest {largest:.1f} "
        "grey levels of 255)"
    )


def _scaled(image: NDArray[np.uint8]) -> tuple[int, int]:
    """Width and height of an image's picture."""
    height, width = image.shape[:2]
    scale = SOURCE / max(height, width)
    return max(1, round(width * scale)), max(1, round(height * scale))


def _put_shot(
    canvas: Image.Image, pen: ImageDraw.ImageDraw, shot: Shot, top: int, colours: dict[str, str], font: Font
) -> None:
    size = _scaled(shot.image)
    picture = Image.fromarray(shot.image).resize(size)
    over = ImageDraw.Draw(picture)
    scale = size[0] / shot.image.shape[1]
    for crop in shot.crops:
        corners = [(float(x), float(y)) for x, y in crop.outline * scale]
        over.line([*corners, corners[0]], colours[crop.view], 4 if crop.form == "strong" else 2)
    canvas.paste(picture, (GAP, top))
    note = ", a substitute" if shot.substituted else ""
    height, width = shot.image.shape[:2]
    pen.text((GAP, top + size[1] + 4), f"{shot.key}\nposition {shot.position}, {width} x {height}{note}", _INK, font)


def _put_crop(
    canvas: Image.Image,
    pen: ImageDraw.ImageDraw,
    crop: Crop,
    x: int,
    y: int,
    colour: str,
    font: Font,
) -> None:
    pen.text((x, y), f"{crop.view} {crop.form}", colour, font)
    y += LINE + 2
    words = ", ".join(crop.words) or "as it is"
    if crop.dali is None:
        tiles = [crop.cpu]
    else:
        tiles = [crop.cpu, crop.dali, amplified(crop)]
        words = f"apart {crop.mean:.3f}, at most {crop.largest:.1f}; {words}"
    for tile in tiles:
        canvas.paste(Image.fromarray(tile).resize((TILE, TILE)), (x, y))
        y += TILE + 2
    text = textwrap.wrap(words, LETTERS)[:LINES]
    pen.text((x, y), "\n".join(text), _SOFT, font, spacing=1)
