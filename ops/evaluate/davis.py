"""DAVIS's folders and its two measures: J, the overlap of regions, and F, the agreement of their borders.

`JPEGImages/480p/CLIP/00000.jpg`, `Annotations/480p/CLIP/00000.png` (palette index = object, 0 background, 255 undecided),
`ImageSets/2017/val.txt`. J and F as Perazzi et al. (CVPR 2016, section 3) define them and the 2017 challenge computes them
(Pont-Tuset et al., arXiv 1704.00675): borders one pixel wide, matched within .008 of the picture's diagonal, the first and the
last frame left out, the mean over each object's frames, then over the objects of all clips.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from ...shards.errors import GristmillError
from .coco import read_rgb

VOID = 255
TOLERANCE = 0.008  # of the diagonal

Mask = NDArray[np.uint8]


class DavisError(GristmillError):
    """Clips that cannot be propagated through or scored."""


@dataclass(frozen=True)
class Clip:
    """A video: its name, and the files of its frames and of their masks, in order."""

    name: str
    frames: list[Path]
    masks: list[Path]

    def frame(self, number: int) -> Image.Image:
        return read_rgb(self.frames[number], DavisError)

    def mask(self, number: int) -> Mask:
        """The object of each pixel, uint8 [H, W]. DavisError where it is no palette picture or cannot be read."""
        path = self.masks[number]
        try:
            with Image.open(path) as image:
                if image.mode not in ("P", "L"):
                    raise DavisError(
                        f"{path} has mode {image.mode}; a mask holds one object number a pixel (mode P or L)"
                    )
                return np.array(image)
        except (OSError, UnidentifiedImageError) as fault:
            raise DavisError(f"{path} cannot be read as a mask ({fault}); repair it or leave its clip out") from fault


def open_davis(root: str | Path, split: str = "val", *, year: str = "2017", resolution: str = "480p") -> list[Clip]:
    """The clips of a split. DavisError where a list, a folder, a frame or a mask is missing, or a clip has under 3 frames."""
    root = Path(root)
    listed = root / "ImageSets" / year / f"{split}.txt"
    if not listed.is_file():
        raise DavisError(f"{listed} is not there: {root} is not in DAVIS's layout, or has no split {split!r}")
    clips = []
    for name in listed.read_text().split():
        frames = sorted((root / "JPEGImages" / resolution / name).glob("*.jpg"))
        folder = root / "Annotations" / resolution / name
        masks = [folder / f"{frame.stem}.png" for frame in frames]
        lost = [path for path in masks if not path.is_file()]
        if lost:
            raise DavisError(f"{lost[0]} is not there, though its frame is")
        if len(frames) < 3:
            raise DavisError(
                f"clip {name!r} has {len(frames)} frames under {root}; three are needed, as two are not scored"
            )
        clips.append(Clip(name, frames, masks))
    if not clips:
        raise DavisError(f"{listed} names no clip")
    return clips


def region_overlap(truth: NDArray[np.bool_], given: NDArray[np.bool_], void: NDArray[np.bool_] | None = None) -> float:
    """J of two masks bool [H, W]: |both| / |either| without void pixels; 1 where both are empty."""
    asked = np.ones_like(truth) if void is None else ~void
    either = np.count_nonzero((truth | given) & asked)
    return np.count_nonzero(truth & given & asked) / either if either else 1.0


def border(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Pixels that differ from the one to the right, below, or both ways: bool [H, W]; the picture's own edge is no border."""
    padded = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    own = padded[:-1, :-1]
    return (own ^ padded[:-1, 1:]) | (own ^ padded[1:, :-1]) | (own ^ padded[1:, 1:])


def border_agreement(
    truth: NDArray[np.bool_],
    given: NDArray[np.bool_],
    void: NDArray[np.bool_] | None = None,
    tolerance: float = TOLERANCE,
) -> float:
    """F of two masks bool [H, W]: the harmonic mean of the shares of either border that lie near the other one.

    tolerance: share of the diagonal, or pixels from 1 on. Both without border: 1; only one of them: 0.
    """
    reach = tolerance if tolerance >= 1 else math.ceil(tolerance * math.hypot(*truth.shape))
    asked = np.ones_like(truth) if void is None else ~void
    true, made = border(truth & asked), border(given & asked)
    trues, mades = np.count_nonzero(true), np.count_nonzero(made)
    if not trues or not mades:
        return float(trues == mades)
    recall = np.count_nonzero(true & _grown(made, reach)) / trues
    precision = np.count_nonzero(made & _grown(true, reach)) / mades
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def clip_scores(truth: list[Mask], given: list[Mask]) -> list[tuple[float, float]]:
    """(J, F) of each object of a clip, means over its frames but for the first and the last.

    Masks uint8 [H, W] of object numbers, 255 where nobody is asked. The objects are those that any true frame shows.
    """
    objects = max(int(np.where(mask == VOID, 0, mask).max()) for mask in truth)
    scores = []
    for number in range(1, objects + 1):
        pairs = list(zip(truth, given, strict=True))[1:-1]
        region = [region_overlap(true == number, made == number, true == VOID) for true, made in pairs]
        edge = [border_agreement(true == number, made == number, true == VOID) for true, made in pairs]
        scores.append((float(np.mean(region)), float(np.mean(edge))))
    return scores


def _grown(mask: NDArray[np.bool_], reach: float) -> NDArray[np.bool_]:
    side = np.arange(-int(reach), int(reach) + 1)
    disk = (side[:, None] ** 2 + side**2 <= reach**2).astype(np.uint8)
    return cv2.dilate(mask.astype(np.uint8), disk) > 0
