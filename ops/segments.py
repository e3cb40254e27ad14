"""Which part of which parameter lies where on this rank: one table for all that must work tensor by tensor.

Under ZeRO an optimizer sees flat shards that begin and end anywhere in a parameter, so a clip per tensor, a trust ratio
or a checkpoint taken there by tensor would be silently wrong. The table maps (parameter, range) to (shard, offset) for
every ZeRO stage alike; per-parameter sums are made of what each rank holds and become whole in the step's one
all-reduced vector. The shards themselves are found by `zero`, the only place that knows DeepSpeed's insides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Segment:
    """Elements [start, stop) of a flattened parameter, at `offset` in the shard that holds them."""

    name: str
    start: int
    stop: int
    offset: int

    def of(self, flat: Tensor) -> Tensor:
        """The segment's view of a tensor laid out like the shard [n]."""
        return flat.narrow(0, self.offset, self.stop - self.start)


@dataclass
class Shard:
    """One flat fp32 tensor that the optimizer steps: master weights of `segments`, and padding between them."""

    key: Tensor  # as the optimizer knows it: the key of its state
    group: dict[str, Any]  # the optimizer's parameter group
    segments: list[Segment]
    # Every parameter of which any rank's such shard holds a part, and where it begins: in the group's flat tensor (stages
    # 1, 2), or in each rank's shard (0, 3).
    members: list[tuple[str, int]] = field(default_factory=list)
    flat: Tensor = field(init=False)  # 1-D view of `key`

    def __post_init__(self) -> None:
        self.flat = self.key.detach().view(-1)


class Segments:
    """The table of one rank.

    shapes: every trainable parameter by name, in the student's order, the same on all ranks. `replicated`: each rank
    holds all of everything (ZeRO 0), so sums over segments are whole already and must not be added over ranks.
    """

    def __init__(self, shards: list[Shard], shapes: dict[str, torch.Size], *, replicated: bool):
        self.shards, self.shapes, self.replicated = shards, shapes, replicated
        self.names = list(shapes)
        number = {name: index for index, name in enumerate(self.names)}
        device = shards[0].flat.device if shards else torch.device("cpu")
        self.index = torch.tensor([number[s.name] for _, s in self], dtype=torch.int64, device=device)
        self._by_key = {id(shard.key): i for i, shard in enumerate(shards)}
        starts = [0]
        for shard in shards:
            starts.append(starts[-1] + len(shard.segments))
        self._rows = [slice(a, b) for a, b in pairwise(starts)]  # of each shard in `index`
        self._spread: tuple[Tensor, Any] | None = None  # the last values, and their entries by segment

    def __iter__(self) -> Iterator[tuple[Shard, Segment]]:
        for shard in self.shards:
            for segment in shard.segments:
                yield shard, segment

    def views(self, flat: Callable[[Shard], Tensor] | None = None) -> list[Tensor]:
        """One 1-D view a segment, in the table's order, of the masters or of whatever is laid out like them."""
        return [segment.of(shard.flat if flat is None else flat(shard)) for shard, segment in self]

    def squares(self, tensors: list[Tensor]) -> Tensor:
        """Sum of squares by parameter [P], float64, of one 1-D tensor a segment. Whole only once added over ranks."""
        total = torch.zeros(len(self.names), dtype=torch.float64, device=self.index.device)
        if tensors:
            norms = torch.stack(torch._foreach_norm(tensors, 2, torch.float32))  # pyright: ignore[reportPrivateImportUsage]
            total.index_add_(0, self.index, norms.double().square())
        return total

    def spread(self, values: Tensor, keys: list[Tensor]) -> tuple[list[Tensor], list[Any]]:
        """Segments of the gradients of shards, and each one's entry of `values` [P], by which all are to be multiplied.

        On a GPU entries are scalar tensors, without a sync. A CPU has nothing to wait for: there they are numbers, and
        what would be read and written to be multiplied by 1 is left out.
        """
        if self._spread is None or self._spread[0] is not values:
            each = values.to(torch.float32)[self.index]
            self._spread = values, each.tolist() if each.device.type == "cpu" else each.unbind()
        entries, parts, scales = self._spread[1], [], []
        for key in keys:
            place = self._by_key[id(key)]
            assert key.grad is not None
            flat = key.grad.view(-1)
            for segment, entry in zip(self.shards[place].segments, entries[self._rows[place]], strict=True):
                if isinstance(entry, Tensor) or entry != 1.0:
                    parts.append(segment.of(flat))
                    scales.append(entry)
        return parts, scales

    def owned(self, rank: int, world: int) -> Iterator[tuple[Shard, Segment, int, int]]:
        """What this rank writes: (shard, segment, start, stop) of the parameter; all ranks cover everything once.

        Where everything is replicated, the parameters laid end to end are cut into `world` equal ranges.
        """
        if not self.replicated:
            for shard, segment in self:
                yield shard, segment, segment.start, segment.stop
            return
        begin, total = 0, sum(shape.numel() for shape in self.shapes.values())
        low, high = rank * total // world, (rank + 1) * total // world
        place: dict[str, int] = {}
        for name, shape in self.shapes.items():
            place[name] = begin
            begin += shape.numel()
        for shard, segment in self:
            first = place[segment.name]
            start, stop = max(segment.start, low - first), min(segment.stop, high - first)
            if start < stop:
                yield shard, segment, start, stop
