"""Pictures for `gristmill stats`: samples spread evenly over the data, as one HTML page with the counts, or as one picture.

The same data gives the same pictures. Removed samples are passed over for the next that is there; one that does not decode
has its place, and says so. The page holds no script and asks no network, whatever the names of files are.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from ..shards.census import Census
from ..shards.collection import Collection
from ..shards.errors import GristmillError
from ..shards.foreign import close_blob, open_place
from ..shards.images import MAX_PIXELS
from ..shards.manifest import Manifest
from ..shards.storage import published
from ..shards.tombstones import Tombstones
from .report.crops import data_uri
from .report.page import POLICY
from .report.style import STYLE
from .stats import Section, headline, spread_over

SIDE, GAP, COLUMNS = 160, 8, 10  # pixels; pictures in a row
_GROUND, _INK, _SOFT = "#fcfcfa", "#1d2126", "#5b646e"
_MORE = """
.wall{display:grid;grid-template-columns:repeat(auto-fill,minmax(8.5rem,1fr));gap:.7rem;margin:1rem 0}
.wall figure{padding:.4rem}.wall img{display:block;width:100%;height:8.5rem;object-fit:contain;border-radius:3px}
.wall figcaption{font-size:.72rem;font-weight:400;color:var(--soft);overflow-wrap:anywhere;margin:.3rem 0 0}
main{max-width:96rem}
"""


class SheetError(GristmillError):
    """A sheet that cannot be written as asked for."""


@dataclass(frozen=True)
class Specimen:
    """One sample: its picture, SIDE pixels long at most, or None if it does not decode."""

    key: str
    shard: str
    about: str  # size, format, bytes
    picture: Image.Image | None


def check_target(out: Path) -> None:
    """Raise SheetError for a name that cannot be written, before anything is counted."""
    if out.suffix.lower() not in (".html", ".png"):
        raise SheetError(f"--sheet {out}: name a file that ends in .html or .png")
    if not out.absolute().parent.is_dir():
        raise SheetError(f"--sheet {out}: there is no folder {out.absolute().parent}; make it first")


def write_sheet(out: Path, found: Collection, census: Census, images: int, tables: list[Section]) -> int:
    """Write the sheet, whole or not at all; how many pictures are on it. OSError passes through."""
    specimens = collect(found, images)
    with published(out) as file:
        if out.suffix.lower() == ".html":
            file.write(as_page(found, census, specimens, tables).encode())
        else:
            held = io.BytesIO()
            as_picture(found, census, specimens).save(held, "PNG")
            file.write(held.getvalue())
    return len(specimens)


def collect(found: Collection, images: int) -> list[Specimen]:
    """`images` samples at equal distances over all data sets. A shard that cannot be read shows as pictures that are not."""
    manifests = [Manifest.open(part, cache_rows=0) for part in found.parts]
    first = np.cumsum([0, *(len(manifest.urls) for manifest in manifests)])
    gone = [Tombstones.of(manifest) for manifest in manifests]
    specimens: list[Specimen] = []
    taken: set[tuple[int, int]] = set()
    for shard, row in spread_over(np.concatenate([manifest.counts for manifest in manifests]), images):
        which = int(np.searchsorted(first, shard, "right")) - 1
        manifest, own = manifests[which], int(shard - first[which])
        url, count = manifest.urls[own], int(manifest.counts[own])
        rows = [(row + step) % count for step in range(count)]
        there = next((row for row in rows if (url, row) not in gone[which] and (shard, row) not in taken), None)
        if there is not None:
            taken.add((shard, there))
            specimens.append(_specimen(manifest, own, there, found.name(found.parts[which], url)))
    return specimens


def _specimen(manifest: Manifest, shard: int, row: int, name: str) -> Specimen:
    rows = manifest.rows(shard)
    size = f"{rows.width[row]} x {rows.height[row]}, " if rows.deep and rows.width[row] else ""
    about = f"{size}{rows.format[row]}, {rows.length[row] / 1000:,.1f} kB"
    picture = None
    try:
        blob = open_place(manifest.place(shard))
        try:
            data = blob.read(int(rows.offset[row]), int(rows.length[row]))
        finally:
            close_blob(blob)
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP")) as image:
            if image.width * image.height <= MAX_PIXELS:
                image.draft("RGB", (2 * SIDE, 2 * SIDE))
                picture = ImageOps.exif_transpose(image).convert("RGB")
                picture.thumbnail((SIDE, SIDE))
    except Exception:  # Pillow's decoders raise nearly anything on broken input; the place stays empty
        picture = None
    return Specimen(rows.keys[row], name, about, picture)


def as_page(found: Collection, census: Census, specimens: list[Specimen], tables: list[Section]) -> str:
    """The page as text."""
    title = f"What is in {escape(found.root.absolute().name)}"
    wall = "".join(
        "<figure>"
        + (
            f'<img alt="{escape(one.key)}" src="{data_uri(one.picture, "jpeg")}">'
            if one.picture is not None
            else '<p class="missing">does not decode</p>'
        )
        + f"<figcaption>{escape(one.key)}<br>{escape(one.shard)}<br>{escape(one.about)}</figcaption></figure>"
        for one in specimens
    )
    lead, *more = headline(census)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{title} · Gristmill</title><style>{STYLE}{_MORE}</style></head><body><main><h1>{title}</h1>"
        f'<p class="lead">{escape(lead)}.</p>{"".join(f"<p>{escape(line)}.</p>" for line in more)}'
        f"<h2>{len(specimens)} images at equal distances</h2>"
        f'<div class="wall">{wall}</div>{"".join(map(_table, tables))}</main></body></html>\n'
    )


def _table(section: Section) -> str:
    title, heads, rows = section
    head = "".join(f"<th>{escape(text)}</th>" for text in heads)
    body = "".join(
        f"<tr><th>{escape(row[0])}</th>{''.join(f'<td>{escape(text)}</td>' for text in row[1:])}</tr>" for row in rows
    )
    return (
        f'<h2>{escape(title[:1].upper() + title[1:])}</h2><div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def as_picture(found: Collection, census: Census, specimens: list[Specimen]) -> Image.Image:
    """The pictures alone, RGB, in rows of COLUMNS, each with its key and its size."""
    font, small = ImageFont.load_default(15), ImageFont.load_default(10)
    cell, top = SIDE + 34, 56
    lines = -(-len(specimens) // COLUMNS)
    canvas = Image.new("RGB", (COLUMNS * (SIDE + GAP) + GAP, top + lines * (cell + GAP)), _GROUND)
    pen = ImageDraw.Draw(canvas)
    pen.text((GAP, GAP), f"What is in {found.root.absolute().name}"[:120], _INK, font)
    pen.text((GAP, GAP + 22), headline(census)[0], _SOFT, small)
    for number, one in enumerate(specimens):
        x, y = GAP + number % COLUMNS * (SIDE + GAP), top + number // COLUMNS * (cell + GAP)
        if one.picture is not None:
            canvas.paste(one.picture, (x + (SIDE - one.picture.width) // 2, y + (SIDE - one.picture.height) // 2))
        else:
            pen.text((x + 30, y + SIDE // 2), "does not decode", _SOFT, small)
        pen.text((x, y + SIDE + 3), f"{one.key[:24]}\n{one.about}", _SOFT, small)
    return canvas
