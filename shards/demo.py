"""The demo's data set: thousands of small JPEGs of printed cloths with a patch sewn on, drawn from one seed.

A folder tree `coarse/fine/instance/nn.jpg` gives three truths, and a side file of part masks a fourth: coarse is the
dye of the cloth, fine the dye of the patch upon it, instance the exact shades, weaves, pitches and the outline of the
patch, which stay the same over all images of a cloth. What must not help is drawn anew for each image: place, scale,
rotation, mirror, phase of the weaves, and above all the light, whose gain and shadows are far stronger than the dyes.
So raw pixels and untrained networks see little but light and weave, while crops that agree on what the light leaves
alone agree on the dyes. Edges are signed distances, so that nothing is supersampled. The random bits are a Philox
counter's, keyed by (seed, what is drawn): no global generator.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from .errors import GristmillError

WEAVES = ("checked", "dotted", "striped", "wavy")
OUTLINES = ("bar", "cross", "disc", "triangle")
CLOTHS = ("amber", "green", "blue", "plum")  # a quarter of the colour circle each, from 0 on
PATCHES = ("lime", "teal", "violet", "rose")  # the same from an eighth on
PARTS = ("cloth", *OUTLINES)
MASKS = "masks/parts.npz"
_QUALITY = 92
_KIND_IDENTITY, _KIND_IMAGE, _KIND_NOISE = 1, 2, 3

Array = np.ndarray


class DemoError(GristmillError):
    """The demo's images cannot be drawn as asked."""


@dataclass(frozen=True)
class Print:
    """One printed textile: its shade and its weave. The unit of length is half a picture."""

    hue: float  # turns of the colour circle
    saturation: float
    weave: int  # index into WEAVES
    pitch: float  # periods of the weave for each unit
    angle: float  # of the weave, 0..pi/2: a mirrored picture then still tells it
    share: float  # of the cloth that the marks cover: a threshold, -0.4..0.4


@dataclass(frozen=True)
class Identity:
    """What makes an instance: what all its images share."""

    cloth: Print
    patch: Print
    outline: int  # index into OUTLINES
    size: float  # of the patch


def _uniform(seed: int, kind: int, index: int, shape: tuple[int, ...]) -> Array:
    """Uniform numbers in [0, 1), float64, a pure function of (seed, kind, index).

    Taken from the raw bits of NumPy's Philox, which NumPy promises to keep; its `Generator` makes no such promise.
    """
    key = np.array([seed & (2**64 - 1), (kind << 56) | index], dtype=np.uint64)
    raw = np.random.Philox(key=key).random_raw(int(np.prod(shape)))
    return ((raw >> np.uint64(11)) * 2.0**-53).reshape(shape)


def identity(seed: int, cloth: int, patch: int, instance: int) -> Identity:
    """The numbers of one instance. Those that matter most are spread evenly, so that no two instances coincide."""
    cell = (cloth * len(PATCHES) + patch) << 20
    start = _uniform(seed, _KIND_IDENTITY, cell, (4,))
    u = _uniform(seed, _KIND_IDENTITY, cell + 1 + instance, (6,))
    # An additive recurrence by irrational steps (Roberts 2018, R4) covers a box evenly for any number of points.
    even = (
        start + instance * np.array([0.8566748838545029, 0.733891856627126, 0.6287067210378087, 0.53859725722361])
    ) % 1
    return Identity(
        cloth=Print(
            hue=(cloth + 0.15 + 0.7 * even[0]) / len(CLOTHS),
            saturation=0.14 + 0.2 * u[0],
            weave=instance % len(WEAVES),
            pitch=1.4 * (3.0 / 1.4) ** even[1],
            angle=np.pi / 2 * even[2],
            share=-0.4 + 0.8 * u[1],
        ),
        patch=Print(
            hue=(patch + 0.65 + 0.7 * even[3]) / len(PATCHES),
            saturation=0.14 + 0.2 * u[2],
            weave=(instance // len(WEAVES) + instance) % len(WEAVES),
            pitch=1.8 * (3.2 / 1.8) ** u[3],
            angle=np.pi / 2 * u[4],
            share=-0.3 + 0.6 * u[5],
        ),
        outline=(instance + cloth + patch) % len(OUTLINES),
        size=1.35 * (0.8 + 0.4 * even[2]),
    )


def _weave(x: Array, y: Array, weave: int, share: float) -> Array:
    """The field of the weave, positive where marks are, with a slope of about 1 at the edge; x, y in radians."""
    match WEAVES[weave]:
        case "checked":
            return 1.4 * np.sin(0.75 * x) * np.sin(0.75 * y) + 0.6 * share
        case "dotted":
            return np.cos(x) + np.cos(y) - 0.8 + share
        case "striped":
            return np.sin(x) + share
        case _:
            return np.sin(x + 1.5 * np.sin(0.8 * y)) + share


def _outline(u: Array, v: Array, outline: int) -> Array:
    """Signed distance to the patch's edge, in its own units."""
    a, b = np.abs(u), np.abs(v)
    match OUTLINES[outline]:
        case "bar":
            return np.maximum(a - 0.25, b - 0.9)
        case "cross":
            return np.minimum(np.maximum(a - 0.22, b - 0.75), np.maximum(a - 0.75, b - 0.22))
        case "disc":
            return np.hypot(u, v) - 0.6
        case _:
            return np.maximum(0.866 * a + 0.5 * v - 0.4, -0.4 - v)


def _hsv(hue: Array, saturation: Array, value: Array | float) -> Array:
    """Colours [n] x 3 to RGB [n, 1, 1, 3] float32 in 0..1."""
    sector = (np.asarray(hue)[:, None] * 6 + np.array([5.0, 3.0, 1.0])) % 6
    rgb = (value * np.ones_like(hue))[:, None] * (
        1 - saturation[:, None] * np.clip(np.minimum(sector, 4 - sector), 0, 1)
    )
    return rgb[:, None, None, :].astype(np.float32)


def _printed(u: Array, v: Array, pixels: Array, textile: Print, phase: Array) -> Array:
    """RGB [images, size, size, 3] of a textile: dark marks on its shade. phase [2, images] in turns."""
    wave = 2 * np.pi * textile.pitch
    turns = (2 * np.pi * phase).astype(np.float32)[..., None, None]
    x = wave * (np.cos(textile.angle) * u + np.sin(textile.angle) * v) + turns[0]
    y = wave * (np.cos(textile.angle) * v - np.sin(textile.angle) * u) + turns[1]
    marked = np.clip(0.5 + _weave(x, y, textile.weave, textile.share) * pixels / wave, 0, 1)[..., None]
    hue, saturation = np.array([textile.hue]), np.array([textile.saturation])
    light, dark = _hsv(hue, saturation, 0.9), _hsv(hue, saturation, 0.15)
    return light + (dark - light) * marked


def draw_instance(
    seed: int, cloth: int, patch: int, instance: int, *, images: int, size: int = 64
) -> tuple[Array, Array]:
    """Draw all images of one instance.

    Returns RGB [images, size, size, 3] uint8 and part numbers (indices into `PARTS`) [images, size, size] uint8.
    """
    who = identity(seed, cloth, patch, instance)
    index = ((cloth * len(PATCHES) + patch) << 20) + instance
    r = _uniform(seed, _KIND_IMAGE, index, (12, images))
    noise = _uniform(seed, _KIND_NOISE, index, (images, size, size)).astype(np.float32)

    def each(x: Array) -> Array:
        return x.astype(np.float32)[:, None, None]

    # Pixels to the cloth's frame: shifted, scaled, turned, perhaps mirrored. The patch sits at its origin.
    grid = (np.arange(size, dtype=np.float32) + 0.5) / size * 2 - 1
    gx, gy = grid[None, None, :], grid[None, :, None]
    scale = 0.85 * (1.2 / 0.85) ** r[0]
    turn = np.deg2rad(30) * (r[1] - 0.5)
    dx, dy = (gx - each(0.6 * r[2] - 0.3)) / each(scale), (gy - each(0.6 * r[3] - 0.3)) / each(scale)
    u = (each(np.cos(turn)) * dx + each(np.sin(turn)) * dy) * each(np.where(r[4] < 0.5, -1.0, 1.0))
    v = each(np.cos(turn)) * dy - each(np.sin(turn)) * dx
    pixels = each(scale * size / 2)  # for each unit of length

    edge = _outline(u / who.size, v / who.size, who.outline) * who.size
    sewn = np.clip(0.5 - edge * pixels, 0, 1)[..., None]
    image = _printed(u, v, pixels, who.cloth, r[5:7])
    image = image + (_printed(u, v, pixels, who.patch, r[7:9]) - image) * sewn
    mask = np.where(sewn[..., 0] >= 0.5, 1 + who.outline, 0).astype(np.uint8)

    # Light: a gain, and a shadow across the picture; then the sensor's noise.
    heading = 2 * np.pi * r[9]
    shade = each(0.4 + 0.75 * r[10]) * (
        1 + each(0.9 * r[11]) * (each(np.cos(heading)) * gx + each(np.sin(heading)) * gy)
    )
    image = image * shade[..., None] + (noise[..., None] - 0.5) * 0.08
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8), mask


def make_demo_images(
    out_dir: str | Path,
    *,
    images: int = 4608,
    size: int = 64,
    seed: int = 0,
    instances: int = 12,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Draw the data set into `out_dir/<coarse>/<fine>/<instance>/<nn>.jpg`, and its part masks beside it.

    `images` is rounded down to a whole number for each of the 16 x `instances` instances. `masks/parts.npz` holds
    `path` and `key` (blake2b-128 of the file's bytes, hex) [N], `mask` [N, size, size] uint8 and `parts`, the names of
    its values. The bytes depend on the arguments and on the releases of NumPy and OpenCV alone. `progress(done, total)`
    is called after each instance. Returns the number of images written.

    Raises DemoError if `images` is too small, the size is out of 32..512, or `out_dir` holds something already.
    """
    out = Path(out_dir)
    cells = len(CLOTHS) * len(PATCHES) * instances
    each = images // cells
    if each < 2:
        raise DemoError(f"{images} images are too few for {cells} instances: ask for at least {2 * cells}")
    if not 32 <= size <= 512:
        raise DemoError(f"demo images of {size} pixels cannot be drawn: choose a size from 32 to 512")
    if out.exists() and any(out.iterdir()):
        raise DemoError(f"{out} is not empty: name a new folder for the demo's images, or empty this one")

    paths: list[str] = []
    keys: list[str] = []
    masks: list[Array] = []
    for cell in range(cells):
        kind, instance = divmod(cell, instances)
        cloth, patch = divmod(kind, len(PATCHES))
        pictures, mask = draw_instance(seed, cloth, patch, instance, images=each, size=size)
        folder = out / CLOTHS[cloth] / PATCHES[patch] / f"{instance:02d}"
        folder.mkdir(parents=True)
        for number, picture in enumerate(pictures):
            done, code = cv2.imencode(".jpg", picture[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, _QUALITY])
            if not done:
                raise DemoError(f"OpenCV could not encode a {size}-pixel JPEG: reinstall opencv-python-headless")
            data = code.tobytes()
            path = folder / f"{number:02d}.jpg"
            path.write_bytes(data)
            paths.append(path.relative_to(out).as_posix())
            keys.append(hashlib.blake2b(data, digest_size=16).hexdigest())
        masks.append(mask)
        if progress is not None:
            progress((cell + 1) * each, cells * each)
    (out / MASKS).parent.mkdir()
    with (out / MASKS).open("wb") as file:
        np.savez_compressed(
            file, path=np.array(paths), key=np.array(keys), mask=np.concatenate(masks), parts=np.array(PARTS)
        )
    return len(paths)
