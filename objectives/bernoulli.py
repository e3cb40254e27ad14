"""Random numbers of a loss: Philox on the device where they are used, in blocks, the same numbers as pipeline/philox.py's.

A selection asks for one number a query and row of the queue, half a million a level: on the host they would take longer than the
step, so the generator is written down once more in tensor operations, with int64 products that wrap. A number is a function of (seed, name, position of
the image, stream, index): the same for any number of ranks, blocks or restarts.
Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def keyed(seed: int, name: str) -> int:
    """A key below 2**64 for the numbers of this name, so that no two objectives share any."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest(), "little")


def uniform_block(key: int, positions: Tensor, streams: Sequence[int], start: int, stop: int) -> Tensor:
    """Numbers `start` (a multiple of 4) to `stop` of each stream and position [N]: float32 in [0, 1), [S, N, stop - start].

    24 bits each, which float32 holds exactly; the upper ones of the words of `pipeline.philox.words`.
    """
    assert start % 4 == 0
    device = positions.device
    c0, c1 = (positions & _LOW).view(1, -1, 1), ((positions >> 32) & _LOW).view(1, -1, 1)
    c2 = torch.tensor(list(streams)).to(device, non_blocking=True).view(-1, 1, 1)
    c3 = torch.arange(start // 4, -(-stop // 4), device=device).view(1, 1, -1)
    k0, k1 = key & _LOW, key >> 32
    for round_ in range(_ROUNDS):
        if round_:
            k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        # The shift brings the sign along, which the mask takes away again.
        c0, c1, c2, c3 = ((p1 >> 32) & _LOW) ^ c1 ^ k0, p1 & _LOW, ((p0 >> 32) & _LOW) ^ c3 ^ k1, p0 & _LOW
    words = torch.stack(torch.broadcast_tensors(c0, c1, c2, c3), dim=-1)
    return (words.flatten(-2)[..., : stop - start] >> 8).float().mul_(2.0**-24)
