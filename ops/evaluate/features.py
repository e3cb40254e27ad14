"""Features of a data set: what a network, or nothing but the pixels, says about each image.

Raw pixels are the baseline that every learned feature has to beat: on easy data they are surprisingly good, and a
probe without them says little.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Features:
    """`rows` fp32 [n, d] on the CPU, one for each of `keys`, in the order in which the batches came."""

    keys: list[str]
    rows: Tensor


@torch.no_grad()
def extract(
    model: Callable[[Tensor], Tensor],
    batches: Iterable[tuple[list[str], Tensor]],
    *,
    device: torch.device | str = "cpu",
) -> Features:
    """`model` (images [B, 3, S, S] -> features [B, d]) over all batches of (keys, images).

    A module is put into evaluation mode meanwhile and given back as it was. Raises ValueError when there are no
    batches or the model returns another shape.
    """
    was_training = model.training if isinstance(model, nn.Module) else False
    if isinstance(model, nn.Module):
        model.eval()
    keys: list[str] = []
    rows: list[Tensor] = []
    try:
        for names, images in batches:
            out = model(images.to(device))
            if out.ndim != 2 or len(out) != len(names):
                raise ValueError(f"features of {len(names)} images must be [{len(names)}, d], not {tuple(out.shape)}")
            keys.extend(names)
            rows.append(out.float().cpu())
    finally:
        if isinstance(model, nn.Module):
            model.train(was_training)
    if not rows:
        raise ValueError("no batches, so no features")
    return Features(keys, torch.cat(rows))


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """No gradient, and batch norm by its running statistics; the network's mode is what it was afterwards."""
    training = network.training
    network.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        network.train(training)


def pixel_features(images: Tensor, size: int = 16) -> Tensor:
    """The image itself as a feature: [B, 3, S, S] averaged down to at most `size` a side, flattened, [B, 3 size^2].

    A callable for `extract`. Of normalised images, mid grey is the origin, so that cosine similarity means something.
    """
    if min(images.shape[-2:]) > size:
        images = F.adaptive_avg_pool2d(images, size)
    return images.flatten(1)
