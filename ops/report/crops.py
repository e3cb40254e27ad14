"""The crops that the network was really fed: `crops.npz`, its writer, its reader, and a sheet of it per view.

Format: one array a view, named like the view, uint8 [images, crops, H, W, 3]; `keys`, strings [images]. A view named
`keys` would be lost, so the arrays of views carry the prefix `view/`; the reader takes names without it, too.
"""

from __future__ import annotations

import base64
import io
import tokenize
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .folder import RunFolder

# What NumPy and zipfile raise on files that are torn, or none of ours; the header of an array is parsed as Python.
BROKEN = (
    *(OSError, ValueError, KeyError, EOFError, RuntimeError, MemoryError),
    *(zipfile.BadZipFile, zlib.error, SyntaxError, tokenize.TokenError),
)
MEAN = np.array([0.485, 0.456, 0.406], dtype=np.float32)
STD = np.array([0.229, 0.224, 0.225], dtype=np.float32)
ROWS, COLUMNS, SHEET = 8, 12, 1400  # images and crops on a sheet, and its greatest width in pixels


def as_pixels(images: np.ndarray) -> np.ndarray:
    """Normalised [..., 3, H, W] floats (ImageNet mean and deviation) back to uint8 [..., H, W, 3]."""
    values = np.moveaxis(np.asarray(images, dtype=np.float32), -3, -1) * STD + MEAN
    return (np.nan_to_num(values).clip(0, 1) * 255 + 0.5).astype(np.uint8)


def save_crops(path: Path, views: Mapping[str, np.ndarray], keys: Sequence[str], images: int = ROWS) -> None:
    """Keep the first images of a batch: views [B, n, 3, H, W] as fed, by name, and their keys [B]."""
    arrays = {f"view/{name}": as_pixels(np.asarray(crops)[:images]) for name, crops in views.items()}
    with path.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, keys=np.array(list(keys[:images]), dtype=np.str_), **arrays)


def load_crops(path: Path) -> dict[str, np.ndarray]:
    """Views by name, uint8 [images, crops, H, W, 3]. Raises one of `BROKEN` for a file that is none of ours."""
    with np.load(path, allow_pickle=False) as archive:
        views = {name.removeprefix("view/"): archive[name] for name in archive.files if name != "keys"}
    for name, crops in views.items():
        if crops.dtype != np.uint8 or crops.ndim != 5 or crops.shape[-1] != 3 or not crops.size:
            raise ValueError(f"{name} is {crops.dtype} {crops.shape} instead of uint8 [images, crops, H, W, 3]")
    return views


def sheet(crops: np.ndarray) -> Image.Image:
    """One picture of crops [images, crops, H, W, 3]. Crops of an image stand side by side, a wide gap before the next.

    At most `ROWS` images and `COLUMNS` crops of each; images share a row as long as it stays within `COLUMNS` crops.
    """
    crops = crops[:ROWS, :COLUMNS]
    images, count, height, width, _ = crops.shape
    side = max(1, COLUMNS // count)
    side = -(-images // -(-images // side))  # as even rows as there can be
    rows, thin = -(-images // side), max(1, width // 32)
    wide = 5 * thin
    block = count * (width + thin) - thin
    canvas = np.zeros((rows * (height + wide) - wide, side * (block + wide) - wide, 4), dtype=np.uint8)
    for image in range(images):
        for crop in range(count):
            top = image // side * (height + wide)
            left = image % side * (block + wide) + crop * (width + thin)
            canvas[top : top + height, left : left + width, :3] = crops[image, crop]
            canvas[top : top + height, left : left + width, 3] = 255
    picture = Image.fromarray(canvas)
    if picture.width > SHEET:
        picture = picture.resize((SHEET, max(1, round(picture.height * SHEET / picture.width))), Image.Resampling.BOX)
    return picture


def data_uri(image: Image.Image, kind: str = "png") -> str:
    """The picture inside a page: `data:image/png;base64,...`. WebP is half of JPEG at these sizes, and may be transparent."""
    options: dict[str, Any] = {"png": {"optimize": True}, "webp": {"quality": 76, "method": 5}}.get(
        kind, {"quality": 88}
    )
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def picture(pixels: np.ndarray, kind: str = "") -> str:
    """Pixels uint8 [H, W, 3] inside a page; small ones as PNG, others as WebP."""
    return data_uri(Image.fromarray(pixels), kind or ("webp" if pixels.shape[0] > 32 else "png"))


def section(run: RunFolder) -> str:
    """A sheet a view of the first batch."""
    if not (run.path / "crops.npz").exists():
        return '<p class="missing">No crops yet: the first batch leaves them here.</p>'
    try:
        parts = [_view(name, crops) for name, crops in load_crops(run.path / "crops.npz").items()]
    except BROKEN as error:
        return f'<p class="missing">crops.npz cannot be read: {escape(str(error))}</p>'
    return f"<p>Crops of the first batch, exactly as they were fed: cut, flipped, coloured.</p>{''.join(parts)}"


def _view(name: str, crops: np.ndarray) -> str:
    images, count, height, width, _ = crops.shape
    text = f"{count} {'crop' if count == 1 else 'crops'} of {width} x {height} pixels for each image"
    whole = sheet(crops)
    zoom = max(1, min(3, 128 // width))
    shown = data_uri(whole, "webp" if whole.width * whole.height > 40_000 else "png")
    return (
        f'<h3>{escape(name)}</h3><p class="soft">{text}; crops of one image stand together.</p><img class="sheet" '
        f'alt="{escape(f"{name}: {text}, {min(images, ROWS)} images")}" width="{whole.width * zoom}" src="{shown}">'
    )
