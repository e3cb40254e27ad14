"""The linear probe: frozen features, a linear classifier by SGD, a grid of rates at once.

The protocol is that of DINO, iBOT and Mugs: class tokens of the last blocks after the final norm side by side, where asked
the mean patch behind them, momentum .9, a cosine over the epochs, rates for a batch of 256. Two sources: features
computed once (seconds), or pictures cropped anew in each epoch, as the papers do. The papers choose the rate on the
very images that they report; here it is chosen on a held-out tenth of the training set, and both numbers are given.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from ...shards.errors import GristmillError
from .augmented import Labelled, augmented_batches, shuffled, transform
from .heads import LinearHeads
from .subsets import draw_stratified

if TYPE_CHECKING:
    from .subject import Subject

Progress = Callable[[int, int, float], None]
Schedule = Iterable[tuple[int, Tensor]]  # (epoch, rows int64 [b])
Source = Callable[[Schedule], Iterator[tuple[Tensor, Tensor]]]  # rows that there are [b], features [b, d]
IMAGES = 128  # images through a frozen network at once


class LinearError(GristmillError, ValueError):
    """Settings or data that a linear probe cannot be trained with."""


@dataclass(frozen=True)
class LinearOptions:
    """rates: of a batch of 256, scaled by the batch there is, tried with each of `weight_decays`, all at once.

    The default grid spans what the papers end up with, .001 (DINO) to 30 (MoCo). blocks: class tokens of so many last
    blocks; average: the last block's mean patch behind them. standardize: features to mean 0 and spread 1 of the
    training set, which MAE's probe (He et al., arXiv 2111.06377, A.1) has from a batch norm without weights; rates then
    mean the same for all networks. augment: "none" takes features once; "crop" and "strong" see augmented.transform.
    """

    epochs: int = 100
    batch: int = 256
    rates: tuple[float, ...] = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
    weight_decays: tuple[float, ...] = (0.0,)
    min_rate: float = 0.0
    momentum: float = 0.9
    blocks: int = 4
    average: bool = False
    standardize: bool = False
    augment: Literal["none", "crop", "strong"] = "none"
    held_out: float = 0.1
    workers: int = 0

    def __post_init__(self) -> None:
        if min(self.epochs, self.batch, self.blocks) < 1 or not self.rates or not self.weight_decays:
            raise LinearError("a linear probe needs at least 1 epoch, 1 image a batch, 1 block, 1 rate and 1 decay")
        if min(self.rates) <= 0 or min(self.weight_decays) < 0 or not 0.0 < self.held_out < 1.0:
            raise LinearError("rates are above 0, decays are 0 or more, and the share held out lies between 0 and 1")

    def grid(self) -> list[tuple[float, float]]:
        """(rate for a batch of 256, weight decay) of each head."""
        return [(rate, decay) for decay in self.weight_decays for rate in self.rates]


def joined(seen: list[tuple[Tensor, Tensor]], average: bool) -> Tensor:
    """(class [B, d], patches [B, p, d]) of the last n blocks -> [B, n * d], or [B, (n + 1) * d] with the mean patch."""
    parts = [first for first, _ in seen]
    return torch.cat([*parts, seen[-1][1].mean(1)] if average else parts, dim=1)


def gather_features(subject: Subject, pictures: Labelled, options: LinearOptions) -> tuple[Tensor, Tensor]:
    """Features fp32 [n, d] of all labelled pictures, unaltered, and their labels int64 [n], on the CPU."""
    rows, features = _seen(subject, pictures, options)
    return features, torch.as_tensor(pictures.labels).to(torch.int64)[rows]


def _seen(subject: Subject, pictures: Labelled, options: LinearOptions) -> tuple[Tensor, Tensor]:
    """(rows int64 [n], features fp32 [n, d]) of the pictures that have a label and can be read."""
    labelled = (torch.as_tensor(pictures.labels) >= 0).nonzero()[:, 0]
    rows, parts = [], []
    for taken, images in pictures.batches(subject.size, IMAGES, labelled):
        parts.append(joined(subject.blocks(images, options.blocks), options.average).cpu())
        rows.append(torch.as_tensor(taken))
    if not parts:
        raise LinearError("no picture has a label: give labels, or leave this probe out")
    return torch.cat(rows), torch.cat(parts)


def linear_probe(
    features: Tensor,
    labels: Tensor,
    query: Tensor,
    query_labels: Tensor,
    options: LinearOptions | None = None,
    *,
    seed: int = 0,
    progress: Progress | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, float]:
    """Train on features [n, d] with labels int64 [n] >= 0, ask queries [m, d]: the numbers of `run_linear`.

    float64 features are trained in float64. progress(step, steps, loss): loss is that of the best head at the time.
    """
    x = _checked(features, labels)

    def source(schedule: Schedule) -> Iterator[tuple[Tensor, Tensor]]:
        return ((rows, x[rows]) for _, rows in schedule)

    return _probe(x, labels, source, _checked(query, query_labels), query_labels, options, seed, progress, device)


def run_linear(
    subject: Subject,
    train: Labelled,
    query: Labelled,
    options: LinearOptions | None = None,
    *,
    seed: int = 0,
    progress: Progress | None = None,
    gather: Callable[[Subject, Labelled, LinearOptions], tuple[Tensor, Tensor]] = gather_features,
) -> dict[str, float]:
    """Probe a subject: trained on all of `train`, asked about `query`, shares 0 to 1.

    linear_top1, linear_top5: of the head whose rate and decay answered the held-out tenth best when trained on the rest
    (equal: the one of lower loss); linear_lr, linear_wd: these; linear_held_out_top1: that answer.
    linear_top1_chosen_on_query, linear_top5_chosen_on_query: of the head that answers the queries best, as the papers
    report. "linear_top1@lr=R,wd=W": of each head; one that diverged has 0. All numbers are of the last epoch.

    gather: who computes features where nothing is augmented, to put a cache in between. Raises LinearError.
    """
    options = options or LinearOptions()
    codes = same_codes(train, query)
    asked, answers = gather(subject, query, options)
    answers = codes[answers]
    if options.augment == "none":
        features, labels = gather(subject, train, options)
        return linear_probe(
            features, labels, asked, answers, options, seed=seed, progress=progress, device=subject.device
        )
    known, features = _seen(subject, train, options)
    labels = torch.as_tensor(train.labels).to(torch.int64)[known]
    change = transform(options.augment, subject.size, subject.mean, subject.std)

    def source(schedule: Schedule) -> Iterator[tuple[Tensor, Tensor]]:
        asked = ((epoch, known[rows]) for epoch, rows in schedule)
        for rows, images in augmented_batches(train, asked, change, seed=seed, workers=options.workers):
            parts = [joined(subject.blocks(part, options.blocks), options.average) for part in images.split(IMAGES)]
            # `known` ascends, as batches come in the order of the rows asked for.
            yield torch.searchsorted(known, rows), torch.cat(parts)

    return _probe(features, labels, source, asked, answers, options, seed, progress, subject.device)


def same_codes(train: Labelled, query: Labelled) -> Tensor:
    """What the query's class codes are called in training: int64 [classes of the query].

    Raises LinearError when a class of the queries was never trained, for it cannot be answered.
    """
    known = {name: code for code, name in enumerate(train.classes)}
    strange = [name for name in query.classes if name not in known]
    if strange:
        raise LinearError(
            f"the queries have {len(strange)} classes that the training set lacks ({', '.join(strange[:3])}): "
            "give a training set that has them"
        )
    return torch.tensor([known[name] for name in query.classes])


def _probe(
    features: Tensor,
    labels: Tensor,
    source: Source,
    query: Tensor,
    query_labels: Tensor,
    options: LinearOptions | None,
    seed: int,
    progress: Progress | None,
    device: torch.device | str,
) -> dict[str, float]:
    """Two heads a setting, in one pass: one learns from everything, the other all but what the setting is chosen by."""
    options = options or LinearOptions()
    grid, classes, n = options.grid(), int(labels.max()) + 1, len(labels)
    batch = min(options.batch, n)
    held = draw_stratified(labels, options.held_out, seed)
    learned = torch.ones(n, 2 * len(grid), dtype=torch.bool)
    learned[held, : len(grid)] = False
    decays = [decay for _, decay in grid] * 2
    heads = LinearHeads(
        decays, classes, features.shape[1], momentum=options.momentum, seed=seed, dtype=features.dtype, device=device
    )
    peak = torch.tensor([rate for rate, _ in grid] * 2, dtype=torch.float64) * (batch / 256)
    shift, scale = _spread(features) if options.standardize else (0.0, 1.0)

    def ready(x: Tensor) -> Tensor:
        return ((x - shift) / scale).to(device, heads.weight.dtype)

    per_epoch = math.ceil(n / batch)
    done, steps = 0, options.epochs * per_epoch
    schedule = (
        (epoch, rows) for epoch in range(options.epochs) for rows in shuffled(torch.arange(n), seed, epoch).split(batch)
    )
    stream = source(schedule)
    for epoch in range(options.epochs):
        # A step down an epoch, as the papers' schedulers do it.
        rates = options.min_rate + (peak - options.min_rate) * 0.5 * (1 + math.cos(math.pi * epoch / options.epochs))
        for rows, x in islice(stream, per_epoch):
            losses = heads.step(ready(x.cpu()), labels[rows].to(device), rates, learned[rows].to(device))
            done += 1
            if progress is not None:
                progress(done, steps, float(losses[len(grid) :].nan_to_num(torch.inf).min()))
    chosen_by = heads.score(ready(features[held]), labels[held])
    answered = heads.score(ready(query), query_labels)
    order = sorted(range(len(grid)), key=lambda i: (-chosen_by.top1[i], chosen_by.loss[i], grid[i]))
    if not math.isfinite(float(chosen_by.loss[order[0]])):
        raise LinearError(f"all rates diverged, from {min(options.rates):g} up: give smaller ones, or standardize")
    best = order[0]
    top1, top5 = answered.top1[len(grid) :].tolist(), answered.top5[len(grid) :].tolist()
    there = max(range(len(grid)), key=lambda i: (top1[i], top5[i]))
    return {
        "linear_top1": top1[best],
        "linear_top5": top5[best],
        "linear_lr": grid[best][0],
        "linear_wd": grid[best][1],
        "linear_held_out_top1": float(chosen_by.top1[best]),
        "linear_top1_chosen_on_query": top1[there],
        "linear_top5_chosen_on_query": top5[there],
        **{f"linear_top1@lr={rate:g},wd={decay:g}": top1[i] for i, (rate, decay) in enumerate(grid)},
    }


def _spread(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [d] of the training set; a constant feature is left as it is."""
    spread = features.std(0, correction=0)
    return features.mean(0), torch.where(spread > 0, spread, 1.0)


def _checked(features: Tensor, labels: Tensor) -> Tensor:
    if features.ndim != 2 or not len(features) or labels.shape != (len(features),) or int(labels.min()) < 0:
        raise LinearError(f"features [n, d] with labels [n] of 0 or more are wanted, not {tuple(features.shape)} with {tuple(labels.shape)}")  # fmt: skip
    if not bool(features.isfinite().all()):
        raise LinearError("features hold NaN or infinity: evaluate another checkpoint, this one is broken")
    return features if features.dtype == torch.float64 else features.float()
