"""A real picture folder without a download: large wallpapers of Debian's packages, cut into photograph-sized tiles.

A benchmark of ingest, decoding and augmentation needs thousands of JPEGs of real size and entropy, and the pictures in
`plasma-workspace-wallpapers` and `gnome-backgrounds` are the ones a bare machine can have with one `apt-get install`.
Each picture is cut at full and at half size with overlap; the folder name is the picture, so that tiles of one picture
are instances of one class. Most are artwork, smoother than photographs (26 kB a tile), and neighbouring tiles share
pixels: good for relative timings, no ground for claims on accuracy.

    python -m gristmill.ops.bench.photographs OUT [--source DIR ...] [--tile 500x375] [--max-per-picture N]
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
from PIL import Image

from ...shards.errors import GristmillError

SOURCES = (Path("/usr/share/wallpapers"), Path("/usr/share/backgrounds"))
PACKAGES = "plasma-workspace-wallpapers gnome-backgrounds"
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
SCALES = (1.0, 0.5)
# Standard deviation of luminance, in grey levels of 255. A clear sky with JPEG noise lies around 2; what is flatter
# than this compresses to almost nothing and would flatter every decoder.
FLAT = 4.0


class PhotographsError(GristmillError):
    """No pictures to cut, or no place to put the tiles."""


@dataclass(frozen=True)
class Cut:
    """What became of one picture: where it came from, its size, tiles written, flat tiles left out, bytes."""

    name: str
    source: Path
    size: tuple[int, int]
    tiles: int
    flat: int
    bytes: int


def picture_name(path: Path, root: Path) -> str:
    """The picture that a file shows, whatever its resolution, shape or day-and-night variant.

    KDE keeps `<name>/contents/images[_dark]/<width>x<height>.<suffix>`, GNOME `<name>-l.<suffix>` and `<name>-d.<suffix>`.
    """
    parts = path.relative_to(root).parts
    if "contents" in parts[1:]:
        name = parts[parts.index("contents") - 1]
    else:
        name = re.sub(r"[-_]?\d+x\d+$", "", path.stem)
        name = re.sub(r"[-_](l|d|light|dark|day|night)$", "", name) or path.parent.name
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip(".-") or "picture"


def find_pictures(sources: list[Path]) -> dict[str, Path]:
    """The largest file of every picture under `sources`, by name. Screenshots, links and equal bytes count once or not.

    Raises:
        PhotographsError: nothing was found; the message names the folders and the packages that would fill them.
    """
    best: dict[str, tuple[int, str, Path]] = {}
    for root in sources:
        for folder, _, files in sorted(os.walk(root)):
            for file in sorted(files):
                path = Path(folder, file)
                if path.suffix.lower() not in SUFFIXES or path.is_symlink() or path.stem.lower() == "screenshot":
                    continue
                try:
                    with Image.open(path) as picture:
                        pixels = picture.width * picture.height
                except (OSError, Image.DecompressionBombError):
                    continue  # A folder of wallpapers may hold anything; what is no picture is not our business.
                name = picture_name(path, root)
                # Of equal sizes the light, first-named variant wins: `images` sorts before `images_dark`, so only `-d`
                # and `-l` need a hand.
                rank = (pixels, "" if re.search(r"[-_](d|dark|night)$", path.stem) else "light", path)
                if name not in best or rank[:2] > best[name][:2]:
                    best[name] = rank
    if not best:
        places = " or ".join(str(source) for source in sources)
        raise PhotographsError(
            f"No JPEG, PNG or WebP picture under {places}. Install some with `apt-get install {PACKAGES}`, "
            "or name a folder of large pictures with --source."
        )
    distinct: dict[str, Path] = {}
    seen: set[str] = set()
    for name in sorted(best):
        digest = hashlib.blake2b(best[name][2].read_bytes()).hexdigest()
        if digest not in seen:
            seen.add(digest)
            distinct[name] = best[name][2]
    return distinct


def load_upright(path: Path) -> Image.Image:
    """The picture as RGB; transparency is laid on mid grey, as no colour behind it is the right one."""
    with Image.open(path) as picture:
        if "A" in picture.getbands() or "transparency" in picture.info:
            rgba = picture.convert("RGBA")
            return Image.alpha_composite(Image.new("RGBA", rgba.size, (128, 128, 128, 255)), rgba).convert("RGB")
        return picture.convert("RGB")


def tile_boxes(size: tuple[int, int], tile: tuple[int, int], overlap: float) -> list[tuple[int, int, int, int]]:
    """Evenly spread boxes (left, top, right, bottom) that cover `size`, neighbours sharing at least `overlap`."""

    def starts(length: int, window: int) -> list[int]:
        if length < window:
            return []
        steps = int(np.ceil((length - window) / (window * (1 - overlap)))) + 1
        return [int(at) for at in np.linspace(0, length - window, steps).round()]

    return [(x, y, x + tile[0], y + tile[1]) for y in starts(size[1], tile[1]) for x in starts(size[0], tile[0])]


def is_flat(tile: Image.Image) -> bool:
    """Nearly one grey level: the standard deviation of the luminance is below `FLAT`."""
    return float(np.asarray(tile.convert("L"), dtype=np.float32).std()) < FLAT


def tiles_of(picture: Image.Image, tile: tuple[int, int], overlap: float) -> Iterator[Image.Image]:
    """All tiles of a picture, at each of `SCALES` at which it is still as large as a tile."""
    for scale in SCALES:
        width, height = round(picture.width * scale), round(picture.height * scale)
        scaled = picture if scale == 1 else picture.resize((width, height), Image.Resampling.LANCZOS)
        for box in tile_boxes(scaled.size, tile, overlap):
            yield scaled.crop(box)


def cut_pictures(
    out: Path,
    sources: list[Path],
    *,
    tile: tuple[int, int] = (500, 375),
    max_per_picture: int | None = None,
    overlap: float = 0.3,
    progress: Callable[[int, int, Cut], None] | None = None,
) -> list[Cut]:
    """Write `out/<picture>/<nn>.jpg` (quality 90) and say what became of each picture.

    A picture's folder appears only when it is complete. With `max_per_picture` the tiles kept are spread evenly over
    the picture. The same sources give the same bytes.

    Raises:
        PhotographsError: no pictures, or `out` holds files already.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise PhotographsError(f"{out} is not an empty folder. Name a new one, so that no old tile is mixed in.")
    pictures = find_pictures(sources)
    out.mkdir(parents=True, exist_ok=True)
    cuts = []
    for number, (name, path) in enumerate(pictures.items(), start=1):
        try:
            picture = load_upright(path)
        except OSError as error:
            raise PhotographsError(
                f"{path} cannot be read ({error}). Reinstall its package, or leave it out by another --source."
            ) from error
        tiles = list(tiles_of(picture, tile, overlap))
        kept = [index for index, image in enumerate(tiles) if not is_flat(image)]
        flat = len(tiles) - len(kept)
        if max_per_picture is not None and len(kept) > max_per_picture:
            kept = [kept[i] for i in np.linspace(0, len(kept) - 1, max_per_picture).round().astype(int)]
        written = 0
        if kept:
            partial = out / f".{name}.partial"
            partial.mkdir()
            for index, chosen in enumerate(kept):
                target = partial / f"{index:03d}.jpg"
                tiles[chosen].save(target, quality=90)
                written += target.stat().st_size
            partial.rename(out / name)
        cuts.append(Cut(name, path, picture.size, len(kept), flat, written))
        if progress is not None:
            progress(number, len(pictures), cuts[-1])
    return cuts


def parse_tile(text: str) -> tuple[int, int]:
    """`500x375` -> (500, 375)."""
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if match is None or not (16 <= int(match[1]) <= 8192 and 16 <= int(match[2]) <= 8192):
        raise PhotographsError(f"--tile {text!r} is no size. Write WIDTHxHEIGHT, from 16 to 8192, such as 500x375.")
    return int(match[1]), int(match[2])


@click.command(help="Cut the large wallpapers of this machine into OUT/<picture>/<nn>.jpg.")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--source", "sources", multiple=True, type=click.Path(path_type=Path), help="Folder; may be repeated.")
@click.option("--tile", default="500x375", show_default=True, help="Width and height of a tile in pixels.")
@click.option("--max-per-picture", type=click.IntRange(min=1), help="At most so many tiles of one picture.")
@click.option("--overlap", default=0.3, show_default=True, type=click.FloatRange(0, 0.9), help="Shared by neighbours.")
def main(out: Path, sources: tuple[Path, ...], tile: str, max_per_picture: int | None, overlap: float) -> None:
    def show(number: int, total: int, cut: Cut) -> None:
        size = f"{cut.size[0]}x{cut.size[1]}"
        click.echo(
            f"[{number:3d}/{total}] {cut.name:<20} {size:>10}  {cut.tiles:4d} tiles, {cut.flat:3d} flat", err=True
        )

    try:
        cuts = cut_pictures(
            out,
            list(sources or SOURCES),
            tile=parse_tile(tile),
            max_per_picture=max_per_picture,
            overlap=overlap,
            progress=show,
        )
    except GristmillError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(2)
    except OSError as error:
        click.echo(f"Error: writing to {out} failed: {error}. Free some space or name another folder.", err=True)
        sys.exit(2)
    tiles, size = sum(cut.tiles for cut in cuts), sum(cut.bytes for cut in cuts)
    used = sum(cut.tiles > 0 for cut in cuts)
    click.echo(
        f"{tiles} tiles of {used} pictures, {size / 1e6:.1f} MB, mean {size / max(tiles, 1) / 1e3:.1f} kB, in {out}"
    )


if __name__ == "__main__":
    main()
