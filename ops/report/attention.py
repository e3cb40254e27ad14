"""Attention and patch features as pictures: a row an image, one cell a patch, the cells left as large as they are."""

from __future__ import annotations

from html import escape

import numpy as np

from .crops import BROKEN, picture
from .drawings import path_of
from .folder import RunFolder
from .missing import missing, stale

# Dark violet over orange to pale yellow, of rising lightness: reads the same on a light and a dark page, and in grey.
RAMP = np.array(((11, 7, 36), (84, 15, 109), (186, 54, 85), (249, 140, 10), (252, 255, 200)), dtype=np.float64)


def section(run: RunFolder) -> str:
    """Each image with its components, the mean of the heads and each head."""
    path = path_of(run.path, "attention")
    if not path.exists():
        return missing(run, "attention", "attention and patch features")
    try:
        with np.load(path, allow_pickle=False) as archive:
            image, maps, peak, pca = (archive[name] for name in ("image", "attention", "peak", "pca"))
            size, heads, position = (int(archive[name]) for name in ("size", "heads", "position"))
        rows = "".join(_row(*parts) for parts in zip(image, maps, peak, pca, strict=True))
    except BROKEN as error:
        return f'<p class="missing">{path.name} cannot be read: {escape(str(error))}</p>'
    text = (
        "Where the class token looks in the last block, from each map's lowest to its highest share; the number is how many times "
        "an even share the highest is, so that a map near 1.0 looks everywhere alike. Before them stand the first three "
        "principal components of the patch features as red, green and blue: patches of one colour are alike, over all images. "
        if heads
        else "The first three principal components of the last map as red, green and blue: places of one colour are alike, over "
        "all images. A ResNet has no class token, and so no attention. "
    )
    few = f" Of {heads} heads the first {maps.shape[1] - 1}." if maps.shape[1] <= heads else ""
    about = f"Images of {size} x {size} pixels, the teacher after {position:,} images.{few}"
    return f'{stale(run, "attention", position)}<p>{text}</p><p class="soft">{about}</p>{rows}'


def _row(image: np.ndarray, maps: np.ndarray, peak: np.ndarray, pca: np.ndarray) -> str:
    cells = [_cell(picture(image, "webp"), "image"), _cell(picture(pca, "png"), "components")]
    for number, (one, top) in enumerate(zip(maps, peak, strict=True)):
        cells.append(
            _cell(picture(heat(one), "png"), f"{f'head {number}' if number else 'all heads'} · {float(top):.1f}")
        )
    return f'<div class="maps">{"".join(cells)}</div>'


def _cell(source: str, words: str) -> str:
    return f'<figure class="map"><img alt="{words}" src="{source}"><figcaption>{words}</figcaption></figure>'


def heat(values: np.ndarray) -> np.ndarray:
    """Numbers from 0 to 255 [h, w] as colours uint8 [h, w, 3]."""
    place = np.asarray(values, np.float64).clip(0, 255) / 255 * (len(RAMP) - 1)
    colours = [np.interp(place, np.arange(len(RAMP)), RAMP[:, channel]) for channel in range(3)]
    return np.stack(colours, axis=-1).round().astype(np.uint8)
