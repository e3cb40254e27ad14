"""Balanced assignments: Sinkhorn-Knopp over a batch of teacher logits (SwAV, arXiv 2006.09882; as DINOv2 applies it).

The assignments Q of n rows to K prototypes become such that each prototype gets the same mass, each row one unit. The
iteration multiplies rows and columns in turn; its result is `softmax(logits / temperature + offset)`, so only the
offsets, one a prototype, are worked out here, in logarithms, where a sharp temperature neither overflows nor leaves a
row without any mass. A batch may reach over all ranks, or be cut into virtual ones of fixed size in the order of the
positions, which no number of ranks changes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


@torch.no_grad()
def sinkhorn_offsets(
    logits: Tensor,
    temperature: float,
    iterations: int = 3,
    *,
    virtual: int | None = None,
    gather: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """What to add to `logits / temperature`, expanded to the logits' shape [G, B, K]: G teacher crops of B images.

    All crops of a batch's images are balanced together. virtual: images of a virtual batch, a divisor of B; None: one
    batch of all ranks' images, whose sums go over `gather` (rows [n, ...] to those of all ranks), `iterations` times.
    """
    crops, images, prototypes = logits.shape
    size = virtual or images
    x = (logits / temperature).view(crops, images // size, size, prototypes)
    row = x.new_zeros(crops, images // size, size, 1)
    offset = x.new_zeros(())
    for turn in range(iterations):
        mass = torch.logsumexp(x + row, dim=(0, 2), keepdim=True)  # [1, batches, 1, K]
        if gather is not None and virtual is None:
            mass = torch.logsumexp(gather(mass.view(1, prototypes)), dim=0).view_as(mass)
        offset = -mass
        if turn + 1 < iterations:
            row = -torch.logsumexp(x + offset, dim=3, keepdim=True)
    return offset.expand_as(x).reshape_as(logits)


@torch.no_grad()
def sinkhorn_reference(logits: Tensor, temperature: float, iterations: int = 3) -> Tensor:
    """Assignments [n, K] of logits [n, K] by the iteration as it is published, on the exponentials themselves."""
    q = (logits / temperature).exp().T  # [K, n]
    prototypes, rows = q.shape
    q = q / q.sum()
    for _ in range(iterations):
        q = q / q.sum(1, keepdim=True) / prototypes
        q = q / q.sum(0, keepdim=True) / rows
    return (q * rows).T
