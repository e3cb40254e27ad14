"""Many linear classifiers on the same features, trained at once: one for each learning rate and weight decay of a grid.

The papers sweep rates by training a probe for each; the features are what costs, and they are the same. Here all heads
are one matrix, [heads * classes, d], so a batch is one product forward and one back for the whole grid. The gradient of
the cross entropy is (softmax - truth) x, written out; the update is torch.optim.SGD's, to rounding, head by head (a test
holds both to torch's own in float64).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ROWS = 4096  # rows asked at once: of 20 heads and 1000 classes, 312 MiB of fp32 logits


@dataclass(frozen=True)
class Score:
    """Of every head, float64 [heads] on the CPU: share of right first answers, of right among five, mean loss."""

    top1: Tensor
    top5: Tensor
    loss: Tensor


class LinearHeads:
    """`weight` [H, C, d] and `bias` [H, C], all heads from the same initial weights: normal, std .01, and 0 (DINO).

    decays: weight decay of each of the H heads.
    """

    def __init__(
        self,
        decays: Sequence[float],
        classes: int,
        width: int,
        *,
        momentum: float = 0.9,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        first = 0.01 * torch.randn(classes, width, generator=torch.Generator().manual_seed(seed))
        self.weight = first.to(device, dtype).repeat(len(decays), 1, 1)
        self.bias = self.weight.new_zeros(len(decays), classes)
        self.decays = self.weight.new_tensor(list(decays))
        self.momentum = momentum
        self._moved = torch.zeros_like(self.weight), torch.zeros_like(self.bias)

    def logits(self, x: Tensor) -> Tensor:
        """Features [B, d] -> [B, H, C]."""
        return torch.addmm(self.bias.flatten(), x, self.weight.flatten(0, 1).T).view(len(x), *self.bias.shape)

    def step(self, x: Tensor, labels: Tensor, rates: Tensor, counted: Tensor | None = None) -> Tensor:
        """One step of SGD of every head, in place, at rates [H]: mean loss [H] before it.

        x [B, d], labels int64 [B]. counted, bool [B, H]: the rows that a head learns from (None: all); its loss is
        their mean, and 0 where there is none.
        """
        logits = self.logits(x)
        logs = logits.log_softmax(2)
        truth = labels[:, None, None].expand(-1, len(self.bias), 1)
        share = logs.new_full(logs.shape[:2], 1.0 / len(x))
        if counted is not None:
            share = counted.to(logs) / counted.sum(0).clamp(min=1)
        losses = -(logs.gather(2, truth)[:, :, 0] * share).sum(0)
        slope = logs.exp_()
        slope.scatter_add_(2, truth, slope.new_full((1, 1, 1), -1.0).expand_as(truth))
        slope *= share[:, :, None]
        gradients = (slope.flatten(1).T @ x).view_as(self.weight), slope.sum(0)
        for value, moved, gradient in zip((self.weight, self.bias), self._moved, gradients, strict=True):
            by_head = (-1, *[1] * (value.ndim - 1))
            gradient += self.decays.view(by_head) * value
            moved.mul_(self.momentum).add_(gradient)
            value -= rates.to(value).view(by_head) * moved
        return losses

    def score(self, x: Tensor, labels: Tensor, rows: int = ROWS) -> Score:
        """How features [n, d] with labels int64 [n] are answered. A head that diverged has none right and loss inf.

        A label that is no class of the heads (negative, or too large) counts as answered wrongly.
        """
        heads, classes = self.bias.shape
        right = torch.zeros(3, heads, dtype=torch.float64)
        for start in range(0, len(x), rows):
            logits = self.logits(x[start : start + rows].to(self.weight))
            truth = labels[start : start + rows].to(logits.device)
            best = logits.topk(min(5, classes), dim=2).indices == truth[:, None, None]
            inside = (truth >= 0) & (truth < classes)
            index = truth[inside][:, None, None].expand(-1, heads, 1)
            logs = logits[inside].log_softmax(2).gather(2, index)
            sums = best[:, :, 0].sum(0), best.any(2).sum(0), -logs.double().sum((0, 2))
            right += torch.stack([part.double().cpu() for part in sums])
        sound = self.weight.isfinite().flatten(1).all(1).cpu() & right[2].isfinite()
        top1, top5, loss = right / len(x)
        return Score(top1 * sound, top5 * sound, torch.where(sound, loss, torch.inf))
