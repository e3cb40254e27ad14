"""Patch segmentation: does a patch's token say what lies under it? The probe of patches, and it trains nothing.

Each patch of a query image takes the class that its nearest reference patches vote for (k-NN, as in knn.py), and what
comes out is scored by the mean intersection over union of the classes, so that a rare one counts as much as the ground.
Whoever probes brings the class of each pixel, by the images' keys.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .features import evaluating
from .knn import knn_predict


def patch_tokens(network: nn.Module) -> Callable[[Tensor], Tensor]:
    """The probed feature of patches: images [B, 3, S, S] to tokens [B, P * d] after the last LayerNorm, patch-major."""
    backbone: nn.Module = network.backbone  # pyright: ignore[reportAssignmentType]

    def features(images: Tensor) -> Tensor:
        with evaluating(backbone):
            return backbone.norm(backbone(images)[:, 1:]).flatten(1)  # pyright: ignore[reportCallIssue]

    return features


def pixel_patches(size: int, around: int = 0) -> Callable[[Tensor], Tensor]:
    """Nothing but the pixels: images [B, 3, S, S] to [B, P * d], each patch of `size` with `around` pixels on each side."""

    def features(images: Tensor) -> Tensor:
        return F.unfold(images, size + 2 * around, padding=around, stride=size).transpose(1, 2).flatten(1)

    return features


class PixelClasses:
    """The class of each pixel of some images: `masks` of small numbers [N, S, S], in the order of `keys`."""

    def __init__(self, keys: Sequence[str], masks: np.ndarray) -> None:
        if masks.ndim != 3 or masks.shape[1] != masks.shape[2] or len(masks) != len(keys):
            raise ValueError(f"{len(keys)} images want masks [{len(keys)}, S, S], not {masks.shape}")
        self._rows = {key: row for row, key in enumerate(keys)}
        self.masks = masks

    def patches(self, keys: Sequence[str], side: int) -> Tensor:
        """The class of most pixels under each of side x side patches, int64 [n, side * side]; of equally many the first.

        Raises KeyError for an image that is not known, ValueError if its mask cannot be cut so.
        """
        masks = self.masks[[self._rows[key] for key in keys]]
        pixels, rest = divmod(masks.shape[1], side)
        if rest:
            raise ValueError(f"masks of {masks.shape[1]} pixels a side cannot be cut into {side} x {side} patches")
        blocks = masks.reshape(len(masks), side, pixels, side, pixels).swapaxes(2, 3).reshape(len(masks), side**2, -1)
        counts = np.stack([(blocks == number).sum(-1) for number in range(int(masks.max()) + 1)], -1)
        return torch.from_numpy(counts.argmax(-1))


def segment(
    reference: Tensor, labels: Tensor, query: Tensor, query_labels: Tensor, *, k: int = 20, temperature: float = 0.07
) -> float:
    """Mean intersection over union of query patches [n, d], labelled by their nearest reference patches [m, d].

    labels int64 [m] and [n]. The mean is over the classes that queries show or are given.
    """
    return mean_iou(knn_predict(reference, labels, query, k=k, temperature=temperature), query_labels)


def mean_iou(predicted: Tensor, truth: Tensor) -> float:
    """Mean over the classes of either of |both| / |either|, for int64 [n] and [n]."""
    classes = int(max(predicted.max(), truth.max())) + 1
    both = torch.bincount(truth[predicted == truth], minlength=classes).double()
    either = torch.bincount(predicted, minlength=classes) + torch.bincount(truth, minlength=classes) - both
    return float((both[either > 0] / either[either > 0]).mean())


def expected_iou(truth: Tensor) -> float:
    """What the best constant answer scores: the commonest class's share, 0 for every other one that is there."""
    counts = torch.bincount(truth)
    return float(counts.max() / len(truth) / (counts > 0).sum())
