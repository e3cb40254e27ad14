"""A fixed sample of a teacher's weights and of its student's: how far they are apart, and whether the teacher moves at all.

A teacher that stands still looks well in every loss. The distance tells how far it lags, and the fingerprint, over the
bits of the sampled weights, changes with each of its updates, however small the step: a frozen one is seen at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ..teacher import EmaTeacher

WEIGHTS = 1 << 16  # sampled on each rank, at most
_MODULUS = 1 << 53  # of the fingerprint: so far a float counts exactly


class Sample:
    """Evenly spread weights of all this rank's shards that the teacher has."""

    def __init__(self, teacher: EmaTeacher) -> None:
        pairs = zip(teacher.layout.segments.shards, teacher.shadows, strict=True)
        kept = [(shard.flat, shadow) for shard, shadow in pairs if shadow is not None and shadow.numel()]
        stride = -(-sum(shadow.numel() for _, shadow in kept) // WEIGHTS)
        self._pairs = [(flat[::stride], shadow[::stride]) for flat, shadow in kept]
        count = sum(shadow.numel() for _, shadow in self._pairs)
        # Odd factors: a change of any one weight changes the sum.
        draws = torch.randint(1 << 40, (count,), generator=torch.Generator().manual_seed(0)) * 2 + 1
        self._factors = draws.to(kept[0][1].device) if kept else draws

    @torch.no_grad()
    def look(self) -> dict[str, float]:
        """`distance` (ratio to the student's norm) and `fingerprint`; {} where this rank holds nothing. Waits for the device."""
        if not self._pairs:
            return {}
        student, teacher = (torch.cat(list(side)) for side in zip(*self._pairs, strict=True))
        # Sums wrap around in int64, which is no loss: what comes out is a remainder anyway.
        bits = (teacher.view(torch.int32).to(torch.int64) * self._factors).sum()
        norms = torch.stack([torch.linalg.vector_norm(x.float()) for x in (student - teacher, student)])
        apart, length = norms.tolist()
        return {"distance": apart / length if length else 0.0, "fingerprint": float(int(bits) % _MODULUS)}


def fingerprint_of(weights: Tensor, factors: Tensor) -> float:
    """The plain form: one weight after another, in whole numbers."""
    words = weights.view(torch.int32).tolist()
    total = sum(word * factor for word, factor in zip(words, factors.tolist(), strict=True))
    return float(((total + (1 << 63)) % (1 << 64) - (1 << 63)) % _MODULUS)
