"""A contact sheet as one HTML page: the report's type and colours, inline pictures, no script and no network.

Outlines of the crops are drawn over each image as SVG, in the image's own pixels, dashed where the crop is strong; the
pointer over one says whose it is. Crops wrap, so that the page reads on a phone as well as on a wall.
"""

from __future__ import annotations

from html import escape

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .contact import Crop, Sheet, Shot
from .report.crops import data_uri
from .report.page import POLICY
from .report.style import STYLE

AMPLIFIED = 16  # times the difference, in what is shown of it
_WIDE = 720  # pixels of the picture of an image at most
_MORE = """
.shot{display:grid;grid-template-columns:minmax(0,24rem) minmax(0,1fr);gap:1.2rem;align-items:start}
.over{position:relative;border-radius:6px;overflow:hidden}.over img,.over svg{display:block;width:100%;height:auto}
.over svg{position:absolute;inset:0;height:100%}
.over polygon{fill:transparent;stroke:currentColor;stroke-width:2;vector-effect:non-scaling-stroke}
.over polygon.strong{stroke-dasharray:7 4}.over polygon:hover{fill:currentColor;fill-opacity:.25}
.crops{display:grid;grid-template-columns:repeat(auto-fill,minmax(8.6rem,1fr));gap:.8rem}
.crop{padding:.5rem;font-size:.76rem;line-height:1.4;border-top:4px solid currentColor}
.crop>*{color:var(--ink)}.crop figcaption{font-size:.82rem;margin:0 0 .3rem}
.crop img{display:block;width:100%;height:auto;margin:0 0 .2rem;border-radius:3px}
.crop .tag{float:right;font-weight:400;color:var(--soft)}.crop p{margin:.25rem 0;overflow-wrap:anywhere}
main{max-width:96rem}h2{overflow-wrap:anywhere}
@media (max-width:52rem){.shot{grid-template-columns:1fr}.crops{grid-template-columns:repeat(auto-fill,minmax(7rem,1fr))}}
"""


def as_page(sheet: Sheet) -> str:
    """The page as text."""
    title = f"Views of {escape(sheet.title)}"
    colours = {view.name: f"c{number % 6}" for number, view in enumerate(sheet.views, start=1)}
    lead = f"{len(sheet.shots)} images of {escape(sheet.data)} from position {sheet.shots[0].position} on, seed {sheet.seed}"
    body = [
        f'<h1>{title}</h1><p class="lead">{lead}.</p>',
        "<p>Each crop as the CPU executor makes it, as DALI makes it, and the distance between both, "
        f"{AMPLIFIED} times as bright. Distances are in grey levels of 255. Strong crops are dashed.</p>",
        f'<p class="missing">DALI does not carry these views out: {escape(sheet.refused)}</p>' if sheet.refused else "",
        _table(sheet, colours),
        *(_shot(shot, sheet, colours) for shot in sheet.shots),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{title} · Gristmill</title><style>{STYLE}{_MORE}</style></head>"
        f"<body><main>{''.join(body)}</main></body></html>\n"
    )


def amplified(crop: Crop) -> NDArray[np.uint8]:
    """The distance between both executors, brightened: uint8 [size, size, 3]; black where there is none to show."""
    if crop.apart is None:
        return np.zeros_like(crop.cpu)
    return np.rint((crop.apart * AMPLIFIED).clip(0, 255)).astype(np.uint8)


def spread(crops: list[Crop]) -> tuple[float, float]:
    """Mean distance of all these crops' pixels, and the largest."""
    found = [crop.apart for crop in crops if crop.apart is not None]
    values = np.concatenate([apart.ravel() for apart in found]) if found else np.zeros(1)
    return float(values.mean()), float(values.max())


def _table(sheet: Sheet, colours: dict[str, str]) -> str:
    rows = []
    for view in sheet.views:
        crops = sheet.crops(view.name)
        for form in ("weak", "strong") if view.strong is not None else ("",):
            some = [crop for crop in crops if crop.form == form]
            mean, largest = spread(some)
            apart = (
                f"<td>{mean:.3f}</td><td>{largest:.1f}</td>" if some and not sheet.refused else "<td>-</td><td>-</td>"
            )
            rows.append(
                f'<tr><th><span class="key {colours[view.name]}">{escape(view.name)}</span></th><td>{form or "-"}</td>'
                f"<td>{len(some)}</td><td>{view.size}</td><td>{view.filter}</td><td>{view.role}</td>{apart}</tr>"
            )
    heads = ("view", "form", "crops shown", "pixels", "filter", "seen by", "mean distance", "largest")
    head = "".join(f"<th>{text}</th>" for text in heads)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _shot(shot: Shot, sheet: Sheet, colours: dict[str, str]) -> str:
    height, width = shot.image.shape[:2]
    polygons = []
    for number, crop in enumerate(shot.crops):
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in crop.outline)
        polygons.append(
            f'<polygon class="{colours[crop.view]} {crop.form}" points="{points}">'
            f"<title>{escape(_name(shot, number))}</title></polygon>"
        )
    picture = Image.fromarray(shot.image)
    picture.thumbnail((_WIDE, _WIDE))
    note = " (in place of one that is damaged or removed)" if shot.substituted else ""
    crops = "".join(_crop(shot, number, sheet, colours) for number in range(len(shot.crops)))
    return (
        f"<section><h2>{escape(shot.key)}</h2>"
        f'<p class="soft">position {shot.position}, {width} x {height} pixels{note}</p><div class="shot">'
        f'<div class="over"><img alt="{escape(shot.key)}" src="{data_uri(picture, "jpeg")}">'
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="outlines of the crops">{"".join(polygons)}</svg></div>'
        f'<div class="crops">{crops}</div></div></section>'
    )


def _crop(shot: Shot, number: int, sheet: Sheet, colours: dict[str, str]) -> str:
    crop = shot.crops[number]
    name = escape(_name(shot, number))
    parts = [f'<img alt="{name} by the CPU executor" src="{_uri(crop.cpu)}">']
    if crop.dali is None:
        parts.append(f'<p class="missing">no DALI: {escape(sheet.refused)}</p>')
    else:
        parts.append(f'<img alt="{name} by DALI" src="{_uri(crop.dali)}">')
        parts.append(
            f'<img alt="{name}, the distance between both" src="{data_uri(Image.fromarray(amplified(crop)))}">'
        )
        parts.append(f"<p>apart: mean {crop.mean:.3f}, largest {crop.largest:.1f}</p>")
    tag = f'<span class="tag">{crop.form}</span>' if crop.form else ""
    words = escape(", ".join(crop.words)) or "as it is"
    return (
        f'<figure class="crop {colours[crop.view]}"><figcaption>{tag}{escape(_short_name(shot, number))}</figcaption>'
        f'{"".join(parts)}<p class="soft">{words}</p></figure>'
    )


def _uri(pixels: NDArray[np.uint8]) -> str:
    return data_uri(Image.fromarray(pixels), "jpeg")


def _short_name(shot: Shot, number: int) -> str:
    """`local 3`: the view, and which of its crops."""
    crop = shot.crops[number]
    return f"{crop.view} {sum(other.view == crop.view for other in shot.crops[: number + 1])}"


def _name(shot: Shot, number: int) -> str:
    form = shot.crops[number].form
    return _short_name(shot, number) + (f", {form}" if form else "")
