"""Segmentation on frozen patch tokens: which class lies under a pixel, by its patch's neighbours and by a linear map.

Both give scores for each patch, enlarged bilinearly to the mask's own pixels; what counts is the mean intersection over
union, from one confusion matrix over the whole set, pixels of class 255 left out. The linear map is DINOv2's (Oquab et
al., arXiv 2304.07193, section 7.4): tokens standardised, one layer, cross-entropy of each pixel, AdamW. A grid of rates
is trained at once on the same batches, and the rate is chosen on a held-out part of the training pictures, never on the query.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...models.initial import generator
from ...shards.errors import GristmillError
from .coco import IGNORE
from .knn import nearest, vote
from .masks import Masked, open_masks, under_patches
from .sight import Progress, Sees, normalised, see, whole_patches


class SegmentationError(GristmillError):
    """Pictures and masks on which segmentation cannot be learned or scored."""


@dataclass(frozen=True)
class SegmentationOptions:
    """side: pixels of a picture's shorter side, None for the subject's own size.

    neighbours, temperature: of the k-NN vote; references: patches that are asked, at most. steps, batch, rates,
    weight_decay: of the linear map (DINOv2: 40,000 steps of 16 crops at 1e-3 and 1e-4); held_out: share of the training
    pictures on which the rate is chosen; pixels: of a picture that one step learns from, at most, drawn anew. keep: bytes of training tokens held in memory; more are computed again.
    """

    side: int | None = None
    neighbours: int = 20
    temperature: float = 0.07
    references: int = 1 << 16
    rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
    weight_decay: float = 1e-4
    steps: int = 500
    batch: int = 16
    pixels: int = 4096
    held_out: float = 0.2
    keep: int = 2 << 30


class Tokens:
    """Patch tokens of pictures by row, [h, w, d]; the first that fit into `keep` bytes are computed once."""

    def __init__(self, subject: Sees, source: Masked, options: SegmentationOptions) -> None:
        self.source, self.subject = source, subject
        self._side, self._left = options.side or subject.size, options.keep
        self._kept: dict[int, Tensor] = {}
        self._masks: dict[int, Tensor] = {}

    def __getitem__(self, row: int) -> Tensor:
        if row in self._kept:
            return self._kept[row]
        picture = self.source.load(row)
        size = whole_patches(*picture.size, self._side, self.subject.stride)
        tokens = see(self.subject, normalised(picture, size, self.subject.mean, self.subject.std)[None])[0]
        if tokens.nbytes <= self._left:
            self._left -= tokens.nbytes
            self._kept[row] = tokens
        return tokens

    def truth(self, row: int) -> Tensor:
        """The class of each pixel at the size at which the picture is seen, uint8 [H, W]."""
        if row in self._masks:
            return self._masks[row]
        high, wide = (cells * self.subject.stride for cells in self[row].shape[:2])
        mask = torch.from_numpy(self.source.mask(row))[None, None].float()
        small = F.interpolate(mask, size=(high, wide), mode="nearest-exact")[0, 0].to(torch.uint8)
        if small.nbytes <= self._left:
            self._left -= small.nbytes
            self._masks[row] = small
        return small


def confusion(truth: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """Counts int64 [true, predicted] of the pixels [H, W] that are not ignored."""
    asked = truth != IGNORE
    pairs = truth[asked].astype(np.int64) * classes + predicted[asked]
    return np.bincount(pairs, minlength=classes**2).reshape(classes, classes)


def mean_iou(counts: np.ndarray) -> float:
    """Mean of |both| / |either| over the classes that are there or are given, from counts [true, predicted]."""
    both = np.diag(counts)
    either = counts.sum(0) + counts.sum(1) - both
    return float((both[either > 0] / either[either > 0]).mean())


def constant_iou(counts: np.ndarray) -> float:
    """What the best constant answer scores: the commonest class's share, 0 for the others that are there."""
    true = counts.sum(1)
    return float(true.max() / true.sum() / (true > 0).sum())


def run_segmentation(
    subject: Sees,
    train: Masked | str | Path,
    query: Masked | str | Path,
    *,
    seed: int,
    options: SegmentationOptions | None = None,
    progress: Progress | None = None,
) -> dict[str, float]:
    """`segmentation_knn_miou`, `segmentation_linear_miou` and `segmentation_chance` (the best constant), each 0 to 1.

    `segmentation_linear_rate` says which rate was chosen. Sources are opened by `open_masks` where they are paths.
    Raises SegmentationError where the two have other classes, or there is too little to learn from.
    """
    options = options or SegmentationOptions()
    train, query = (source if not isinstance(source, str | Path) else open_masks(source) for source in (train, query))
    if list(train.classes) != list(query.classes):
        raise SegmentationError("the pictures to learn from and to score have different classes; use one list for both")
    if len(train.keys) < 2 or not len(query.keys):
        raise SegmentationError("segmentation wants two pictures to learn from, and one to score, at least")
    learnt = Tokens(subject, train, options)
    reference, labels = reference_patches(learnt, seed, options)
    linear, rate = fit_linear(learnt, reference, seed, options, progress)
    classes, asked = len(train.classes), Tokens(subject, query, SegmentationOptions(side=options.side, keep=0))
    near, straight = (np.zeros((classes, classes), np.int64) for _ in range(2))
    for row in range(len(query.keys)):
        truth, tokens = query.mask(row), asked[row]
        similarity, index = nearest(reference, tokens.flatten(0, 1), options.neighbours)
        votes = vote(similarity, labels[index], classes, options.temperature).reshape(*tokens.shape[:2], classes)
        near += confusion(truth, enlarged(votes.permute(2, 0, 1), truth.shape).argmax(0).numpy(), classes)
        with torch.no_grad():
            straight += confusion(truth, enlarged(linear(tokens)[0], truth.shape).argmax(0).numpy(), classes)
        if progress:
            progress(row + 1, len(query.keys), "segmentation: scoring")
    if not near.any():
        raise SegmentationError("every pixel of the pictures to score is ignored; there is nothing to score")
    return {
        "segmentation_knn_miou": mean_iou(near),
        "segmentation_linear_miou": mean_iou(straight),
        "segmentation_linear_rate": rate,
        "segmentation_chance": constant_iou(near),
    }


def enlarged(scores: Tensor, size: tuple[int, ...]) -> Tensor:
    """Scores of patches [C, h, w] at pixels [C, H, W], bilinear between the patches' centres."""
    return F.interpolate(scores[None], size=tuple(size), mode="bilinear", align_corners=False)[0]


def reference_patches(tokens: Tokens, seed: int, options: SegmentationOptions) -> tuple[Tensor, Tensor]:
    """Labelled patches drawn evenly from all pictures: tokens [m, d] and classes int64 [m], m <= options.references."""
    source, draws = tokens.source, generator(f"{seed}/segmentation/references")
    pictures = range(len(source.keys))
    if len(pictures) > options.references:
        pictures = sorted(torch.randperm(len(pictures), generator=draws)[: options.references].tolist())
    each = max(1, options.references // len(pictures))
    rows, labels = [], []
    for row in pictures:
        seen = tokens[row]
        under = torch.from_numpy(
            under_patches(source.mask(row), seen.shape[0], seen.shape[1], len(source.classes))
        ).flatten()
        known = (under != IGNORE).nonzero()[:, 0]
        chosen = known[torch.randperm(len(known), generator=draws)[:each].sort().values]
        rows.append(seen.flatten(0, 1)[chosen])
        labels.append(under[chosen])
    if not sum(len(part) for part in rows):
        raise SegmentationError("all pixels of the pictures to learn from are ignored; their masks say nothing")
    return torch.cat(rows), torch.cat(labels)


class LinearMaps(nn.Module):
    """One linear map from tokens to classes for each rate, all on the same standardised tokens."""

    def __init__(self, sample: Tensor, classes: int, rates: int) -> None:
        super().__init__()
        self.register_buffer("mean", sample.mean(0))
        # A dimension that never varies says nothing, and must not be blown up.
        self.register_buffer("scale", 1 / sample.std(0, correction=0).clamp(min=1e-5))
        self.weights = nn.ParameterList(
            [nn.Parameter(sample.new_zeros(classes, sample.shape[1])) for _ in range(rates)]
        )
        self.biases = nn.ParameterList([nn.Parameter(sample.new_zeros(classes)) for _ in range(rates)])

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens [..., h, w, d] to scores [rates, ..., C, h, w]; zero before the first step, as there is no symmetry to break."""
        plain = (tokens - self.mean) * self.scale  # pyright: ignore[reportOperatorIssue]
        maps = [plain @ w.T + b for w, b in zip(self.weights, self.biases, strict=True)]
        return torch.stack(maps).movedim(-1, -3)

    def only(self, number: int) -> LinearMaps:
        """These maps with no other than one of the rates'."""
        self.weights = nn.ParameterList([self.weights[number]])
        self.biases = nn.ParameterList([self.biases[number]])
        return self


def fit_linear(
    tokens: Tokens, sample: Tensor, seed: int, options: SegmentationOptions, progress: Progress | None = None
) -> tuple[LinearMaps, float]:
    """The linear map that was best on held-out pictures, and its rate. sample [m, d]: tokens to take the scale from."""
    source = tokens.source
    classes, rates = len(source.classes), options.rates
    order = torch.randperm(len(source.keys), generator=generator(f"{seed}/segmentation/held out")).tolist()
    spare = min(len(order) - 1, max(1, round(options.held_out * len(order))))
    held, rows = order[:spare], order[spare:]
    maps = LinearMaps(sample, classes, len(rates))
    groups = [{"params": [w, b], "lr": rate} for w, b, rate in zip(maps.weights, maps.biases, rates, strict=True)]
    adam = torch.optim.AdamW(groups, weight_decay=options.weight_decay)
    decay = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: 1 - step / options.steps)
    batches, draws = _batches(rows, options.batch, seed), generator(f"{seed}/segmentation/pixels")
    for step in range(options.steps):
        adam.zero_grad()
        batch = next(batches)
        for row in batch:
            loss = pixel_loss(maps(tokens[row]), tokens.truth(row), options.pixels, draws) / len(batch)
            if loss.requires_grad:
                loss.backward()
        adam.step()
        decay.step()
        if progress:
            progress(step + 1, options.steps, "segmentation: learning")
    counts = np.zeros((len(rates), classes, classes), np.int64)
    with torch.no_grad():
        for row in held:
            truth = source.mask(row)
            for number, scores in enumerate(maps(tokens[row])):
                counts[number] += confusion(truth, enlarged(scores, truth.shape).argmax(0).numpy(), classes)
    best = max(range(len(rates)), key=lambda number: mean_iou(counts[number]) if counts[number].any() else 0.0)
    return maps.only(best), rates[best]


def pixel_loss(scores: Tensor, truth: Tensor, pixels: int, draws: torch.Generator) -> Tensor:
    """Mean cross-entropy of at most so many drawn pixels of uint8 [H, W], summed over rates; scores [R, C, h, w].

    Pixels get their scores bilinearly, as `enlarged` gives them; those that are ignored are not drawn.
    """
    known = (truth.flatten() != IGNORE).nonzero()[:, 0]
    if not len(known):
        return scores.new_zeros(())
    if len(known) > pixels:
        known = known[torch.randperm(len(known), generator=draws)[:pixels]]
    high, wide = truth.shape
    at = torch.stack([(2 * (known % wide) + 1) / wide - 1, (2 * (known // wide) + 1) / high - 1], -1)
    there = F.grid_sample(
        scores.flatten(0, 1)[None],
        at[None, None].to(scores),
        mode="bilinear",
        padding_mode="border",
        align_corners=False,
    )
    labels = truth.flatten()[known].long().expand(len(scores), -1)
    return F.cross_entropy(there[0, :, 0].unflatten(0, scores.shape[:2]), labels) * len(scores)


def _batches(rows: list[int], batch: int, seed: int) -> Iterator[list[int]]:
    """Batches without end: each pass over the rows in another order, a rest is left for nobody to see twice."""
    draws = generator(f"{seed}/segmentation/batches")
    while True:
        order = torch.randperm(len(rows), generator=draws).tolist()
        for start in range(0, max(1, len(rows) - batch + 1), batch):
            yield [rows[place] for place in order[start : start + batch]]
