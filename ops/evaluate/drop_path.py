"""Stochastic depth for a network that is fine-tuned, whoever wrote its blocks.

Pretraining feeds its student the factors of each branch (models/vit.py); an evaluated network has no such entrance, so
hooks bring them: into Gristmill's blocks as the argument that they take, onto the branches of timm's as a factor.
Probabilities grow linearly with depth (Huang et al., arXiv 1603.09382; per sample, as in DeiT). Draws are keyed by
(seed, step) and made on the CPU, so that they are the same on every device.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from ...models.block import ScaledBlock
from ...models.vit import branch_scales
from ...pipeline.philox import uniform

DROP = 6003  # the stream of the seed, beside those of augmented.py


class DropPath:
    """Hooks on the blocks of `network`; those of other kinds (a ResNet's) are left alone. `close` takes them off."""

    def __init__(self, network: nn.Module, rate: float, seed: int) -> None:
        self.blocks = [part for part in network.modules() if isinstance(part, Block)]
        self.rate, self.seed = rate, seed
        self._scales: Tensor | None = None  # [n, 2 * depth] of the step under way
        self._hooks = []
        for number, block in enumerate(self.blocks):
            if isinstance(block, ScaledBlock):
                take: Any = partial(self._into, number)
                self._hooks.append(block.register_forward_pre_hook(take, with_kwargs=True))
                continue
            for branch, part in enumerate((block.drop_path1, block.drop_path2)):
                self._hooks.append(part.register_forward_hook(partial(self._onto, 2 * number + branch)))

    @contextmanager
    def drawn(self, images: int, step: int, device: torch.device | str) -> Iterator[None]:
        """Forwards of so many images inside drop what step `step` draws; outside, nothing is dropped."""
        if self.rate > 0 and self.blocks:
            draws = uniform(self.seed, np.arange(images) | (step << 32), DROP, 2 * len(self.blocks))
            self._scales = branch_scales(torch.from_numpy(draws), self.rate).to(device)
        try:
            yield
        finally:
            self._scales = None

    def close(self) -> None:
        """The network is as it was."""
        for hook in self._hooks:
            hook.remove()

    def _into(self, number: int, block: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if self._scales is None:
            return args, kwargs
        return args, kwargs | {"scale": self._scales[:, 2 * number : 2 * number + 2].to(args[0].dtype)}

    def _onto(self, column: int, part: nn.Module, args: Any, out: Tensor) -> Tensor:
        if self._scales is None:
            return out
        return out * self._scales[:, column].to(out.dtype).view(-1, *[1] * (out.ndim - 1))
