"""What probes of places ask of a network, and how a picture is laid before it: whole, its shape kept.

Places are patches, so a picture is resized to whole patches: its shorter side as asked, the other one in proportion,
both rounded to a multiple. Nothing is cut off, since masks and boxes reach to the border.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

# Called with how much is done, how much there is, and what is being done.
Progress = Callable[[int, int, str], None]


class Sees(Protocol):
    """A network as probes of places know it; `Subject` is one.

    size: pixels a side of the images that it is evaluated on; stride: pixels a side of a patch.
    """

    @property
    def size(self) -> int: ...

    @property
    def stride(self) -> int: ...

    @property
    def mean(self) -> Sequence[float]: ...

    @property
    def std(self) -> Sequence[float]: ...

    def patches(self, images: Tensor) -> Tensor:
        """Normalised images fp32 [B, 3, H, W], H and W multiples of `stride`, to patch tokens [B, h, w, d]."""
        ...


def whole_patches(width: int, height: int, short: int, multiple: int) -> tuple[int, int]:
    """(width, height) to resize to: the shorter side about `short`, in proportion, both multiples of `multiple`, never 0."""
    scale = short / min(width, height)
    return max(1, round(width * scale / multiple)) * multiple, max(1, round(height * scale / multiple)) * multiple


def normalised(picture: Image.Image, size: tuple[int, int], mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """A picture resized to (width, height), fp32 [3, H, W] in units of `std` from `mean` (of values 0 to 1)."""
    resized = picture if picture.size == size else picture.resize(size, Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(resized.convert("RGB"), np.float32) / 255).permute(2, 0, 1)
    return ((pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]).contiguous()


@torch.no_grad()
def see(subject: Sees, images: Tensor) -> Tensor:
    """Patch tokens of images [B, 3, H, W], fp32 [B, h, w, d] on the host. ValueError for another shape or NaN."""
    tokens = subject.patches(images).detach().float().cpu()
    if tokens.ndim != 4 or len(tokens) != len(images):
        raise ValueError(f"patches of {len(images)} images must be [{len(images)}, h, w, d], not {list(tokens.shape)}")
    if not bool(torch.isfinite(tokens).all()):
        raise ValueError("patch tokens hold NaN or infinity: these weights cannot be evaluated")
    return tokens
