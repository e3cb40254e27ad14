"""How well near duplicates are told from other pictures: recall and precision on real photographs, by threshold.

Every sampled picture is changed in the ways in which pictures come back on the web, and the fingerprint of each change is
held against those of all pictures: it is found if the nearest within the threshold is the picture that it was made from,
and mistaken if it is one of another photograph. Pictures in one folder are taken for parts of one photograph (as
`gristmill.ops.bench.photographs` cuts them, with overlap), so that a neighbour is counted by itself.

    python -m gristmill.ops.bench.duplicates --images PHOTOS [--sample 200] [--json]
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageFont, ImageOps

from ...shards.errors import GristmillError
from ...shards.ingest.fingerprint import fingerprint
from ...shards.ingest.refine import RefineConfig, Refused, refine

THRESHOLDS = (0, 4, 8, 12, 16, 20, 24, 28, 31, 40, 48, 56, 64)
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
FLAT, FAR = 998, 999  # in place of a distance: no fingerprint on one side or the other
Change = Callable[[Image.Image], Image.Image]


class DuplicatesError(GristmillError):
    """No pictures to measure on."""


def _resized(scale: float) -> Change:
    def change(image: Image.Image) -> Image.Image:
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        return image.resize(size, Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.BICUBIC)

    return change


def _cropped(share: float) -> Change:
    """So much of width and of height is gone, a third of it on the left and top."""

    def change(image: Image.Image) -> Image.Image:
        x, y = image.width * share, image.height * share
        return image.crop((round(x / 3), round(y / 3), round(image.width - 2 * x / 3), round(image.height - 2 * y / 3)))

    return change


def _turned_hue(degrees: int) -> Change:
    def change(image: Image.Image) -> Image.Image:
        hue, saturation, value = image.convert("HSV").split()
        hue = hue.point([(level + round(degrees * 256 / 360)) % 256 for level in range(256)])
        return Image.merge("HSV", (hue, saturation, value)).convert("RGB")

    return change


def _bordered(share: float, colour: str) -> Change:
    return lambda image: ImageOps.expand(image, round(image.width * share), fill=colour)


def _barred(image: Image.Image) -> Image.Image:
    bar = round(image.height * 0.1)
    return ImageOps.expand(image, (0, bar, 0, bar), fill="black")


def _signed(share: float, opacity: int, middle: bool) -> Change:
    def change(image: Image.Image) -> Image.Image:
        layer = Image.new("RGBA", image.size)
        place = (image.width // 2, image.height // 2) if middle else (image.width * 0.97, image.height * 0.96)
        font = ImageFont.load_default(max(8, image.width * share))
        anchor = "mm" if middle else "rs"
        ImageDraw.Draw(layer).text(place, "stock picture", (255, 255, 255, opacity), font, anchor)
        return Image.alpha_composite(image.convert("RGBA"), layer).convert("RGB")

    return change


def _grainy(image: Image.Image) -> Image.Image:
    noise = np.random.Generator(np.random.Philox(key=1)).normal(0, 10, (image.height, image.width, 3))
    return Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8))


# Name -> (change, format and options of the file). What is not said comes as JPEG of quality 85.
CHANGES: dict[str, tuple[Change, dict[str, Any]]] = {
    **{f"JPEG, quality {q}": (lambda image: image, {"quality": q}) for q in (30, 50, 70, 90)},
    "WebP, quality 75": (lambda image: image, {"format": "WEBP", "quality": 75}),
    **{f"resized to {scale:g}": (_resized(scale), {}) for scale in (0.25, 0.5, 0.75, 1.5, 2)},
    **{f"brightness {f:g}": (lambda im, f=f: ImageEnhance.Brightness(im).enhance(f), {}) for f in (0.6, 0.8, 1.2, 1.4)},
    **{f"contrast {f:g}": (lambda im, f=f: ImageEnhance.Contrast(im).enhance(f), {}) for f in (0.6, 1.5)},
    **{f"saturation {f:g}": (lambda im, f=f: ImageEnhance.Color(im).enhance(f), {}) for f in (0.5, 2)},
    "grey": (lambda image: image.convert("L"), {}),
    **{f"hue by {degrees} degrees": (_turned_hue(degrees), {}) for degrees in (20, 90)},
    "blurred, 2 pixels": (lambda image: image.filter(ImageFilter.GaussianBlur(2)), {}),
    "grain, 10 levels": (_grainy, {}),
    "text in the corner": (_signed(0.05, 160, False), {}),
    "text across the middle": (_signed(0.12, 110, True), {}),
    **{f"cropped by {share:.0%}": (_cropped(share), {}) for share in (0.01, 0.02, 0.05, 0.1)},
    **{f"border of {share:.0%}": (_bordered(share, "white"), {}) for share in (0.01, 0.05)},
    "bars above and below": (_barred, {}),
    "turned by 2 degrees": (lambda im: im.rotate(2, Image.Resampling.BICUBIC), {}),
    "mirrored": (ImageOps.mirror, {}),
}


@dataclass(frozen=True)
class Pictures:
    """Upright files that were taken, the number of the photograph of each, and fingerprints uint64 [n, 4]."""

    paths: list[Path]
    photograph: np.ndarray
    prints: np.ndarray
    printed: np.ndarray  # bool [n]


def _print_of(data: bytes) -> bytes:
    return fingerprint(refine(data, RefineConfig()).grey)


def _words(prints: list[bytes]) -> np.ndarray:
    return np.frombuffer(b"".join(p or bytes(32) for p in prints), "<u8").reshape(-1, 4)


def load(folder: Path) -> Pictures:
    """All images under a folder. Raises DuplicatesError where there are fewer than two."""
    paths, prints = [], []
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() not in SUFFIXES or not path.is_file():
            continue
        try:
            prints.append(_print_of(path.read_bytes()))
        except Refused:
            continue
        paths.append(path)
    if len(paths) < 2:
        raise DuplicatesError(
            f"{folder} holds {len(paths)} images: name a folder of photographs, or cut some with "
            "`python -m gristmill.ops.bench.photographs FOLDER`"
        )
    parents = sorted({path.parent for path in paths})
    photograph = np.array([parents.index(path.parent) for path in paths])
    if len(parents) == 1:
        photograph = np.arange(len(paths))
    return Pictures(paths, photograph, _words(prints), np.array([bool(p) for p in prints]))


def distances(prints: np.ndarray, pictures: Pictures) -> np.ndarray:
    """Bits between uint64 [m, 4] and all pictures, [m, n]; FLAT where the picture has none."""
    bits = np.zeros((len(prints), len(pictures.paths)), np.int64)
    for word in range(4):
        bits += np.bitwise_count(prints[:, word, None] ^ pictures.prints[None, :, word])
    bits[:, ~pictures.printed] = FLAT
    return bits


def changed(path: Path, change: Change, options: dict[str, Any]) -> bytes:
    """The file of a changed picture."""
    with Image.open(path) as image:
        upright = ImageOps.exif_transpose(image).convert("RGB")
    file = io.BytesIO()
    change(upright).save(file, **{"format": "JPEG", "quality": 85, **options})
    return file.getvalue()


def measure(pictures: Pictures, sample: int, progress: Callable[[str], None] = lambda name: None) -> dict[str, Any]:
    """Shares by threshold. `sample` pictures, evenly spread over all, are changed; all are compared with.

    "changes": for each change the share that is found ("recall") and the share of what is found that is of another
    photograph ("wrong"), by threshold, and the median distance. "pairs": of all pairs of different pictures, how many
    lie within a threshold, by whether they are of one photograph; "dropped": how many pictures a greedy pass leaves out.
    """
    chosen = np.unique(np.linspace(0, len(pictures.paths) - 1, min(sample, len(pictures.paths))).round().astype(int))
    found: dict[str, Any] = {}
    for name, (change, options) in CHANGES.items():
        progress(name)
        prints = [_print_of(changed(pictures.paths[i], change, options)) for i in chosen]
        bits = distances(_words(prints), pictures)
        bits[[not p for p in prints]] = FAR
        found[name] = _shares(bits, chosen, pictures)
    return {
        "pictures": len(pictures.paths),
        "photographs": int(pictures.photograph.max()) + 1,
        "without_fingerprint": int((~pictures.printed).sum()),
        "changed": len(chosen),
        "thresholds": list(THRESHOLDS),
        "changes": found,
        **_pairs(pictures),
    }


def _shares(bits: np.ndarray, chosen: np.ndarray, pictures: Pictures) -> dict[str, Any]:
    rows = np.arange(len(chosen))
    own = bits[rows, chosen]
    nearest = bits.min(1)
    mine = own == nearest  # of equally near ones the earliest is named; that it is the right one is what matters
    other = pictures.photograph[bits.argmin(1)] != pictures.photograph[chosen]
    recall, wrong = [], []
    for threshold in THRESHOLDS:
        named = nearest <= threshold
        recall.append(float((named & mine).mean()))
        wrong.append(float((named & ~mine & other).sum() / max(named.sum(), 1)))
    real = own[own < FLAT]
    return {
        "recall": recall,
        "wrong": wrong,
        "median": float(np.median(real)) if len(real) else None,
        "compared": len(real),
    }


def _pairs(pictures: Pictures) -> dict[str, Any]:
    bits = distances(pictures.prints, pictures)
    bits[~pictures.printed] = FLAT
    upper = np.triu(np.ones_like(bits, bool), 1)
    same = pictures.photograph[:, None] == pictures.photograph[None, :]
    others, neighbours, dropped = [], [], []
    for threshold in THRESHOLDS:
        near = upper & (bits <= threshold)
        others.append(int((near & ~same).sum()))
        neighbours.append(int((near & same).sum()))
        kept = np.zeros(len(bits), bool)
        for row in range(len(bits)):
            kept[row] = not (near[:, row] & kept).any()
        dropped.append(int((~kept).sum()))
    return {
        "pairs": {
            "different": int((upper & ~same).sum()), "different_within": others,
            "same_photograph": int((upper & same).sum()), "same_photograph_within": neighbours,
        },
        "dropped": dropped,
    }  # fmt: skip


def table(found: dict[str, Any]) -> Iterator[str]:
    """The measurements in lines."""
    yield (
        f"{found['pictures']} pictures of {found['photographs']} photographs, {found['without_fingerprint']} too flat for a "
        f"fingerprint; {found['changed']} of them changed in each way"
    )
    head = "".join(f"{threshold:>6}" for threshold in found["thresholds"])
    yield f"{'found, % by threshold':<26}{head}  median"
    for name, row in found["changes"].items():
        median = "-" if row["median"] is None else f"{row['median']:.0f}"
        yield f"{name:<26}" + "".join(f"{100 * share:6.1f}" for share in row["recall"]) + f"{median:>8}"
    recall = np.mean([row["recall"] for name, row in found["changes"].items() if name != "mirrored"], 0)
    yield f"{'mean but for mirrored':<26}" + "".join(f"{100 * share:6.1f}" for share in recall)
    wrong = np.mean([row["wrong"] for row in found["changes"].values()], 0)
    yield f"{'precision, %':<26}" + "".join(f"{100 * (1 - share):6.1f}" for share in wrong)
    pairs = found["pairs"]
    yield (
        f"{'pairs of other photographs':<26}"
        + "".join(f"{n:6d}" for n in pairs["different_within"])
        + (f"  of {pairs['different']}")
    )
    yield (
        f"{'pairs of one photograph':<26}"
        + "".join(f"{n:6d}" for n in pairs["same_photograph_within"])
        + (f"  of {pairs['same_photograph']}")
    )
    yield f"{'pictures dropped':<26}" + "".join(f"{n:6d}" for n in found["dropped"]) + f"  of {found['pictures']}"


@click.command(help="Recall and precision of the search for near duplicates, by threshold, on a folder of photographs.")
@click.option("--images", required=True, type=click.Path(path_type=Path), help="Folder; one subfolder a photograph.")
@click.option("--sample", default=200, show_default=True, type=click.IntRange(min=1), help="Pictures that are changed.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def main(images: Path, sample: int, as_json: bool) -> None:
    try:
        pictures = load(images)
        show = sys.stderr.isatty()
        found = measure(pictures, sample, lambda name: click.echo(f"{name} ...", err=True) if show else None)
    except GristmillError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(2)
    click.echo(json.dumps(found) if as_json else "\n".join(table(found)))


if __name__ == "__main__":
    main()
