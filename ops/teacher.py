"""The EMA teacher of a run: kept in fp32, as cheap as the student's shards under every ZeRO stage. DESIGN promise 5.

Stage 0: whole parameters, nothing is sent. Stages 1 and 2: each rank averages its own fp32 partition, and one all-gather
a group in the precision of the forward makes the full weights. Stage 3: each rank averages the fp32 part that it holds
and nothing is gathered until the forward wants a layer. All stages do the same arithmetic on the same elements, so they
make the same teacher (tests/ops/distributed). What goes wrong silently elsewhere is kept out: bf16 averages (they stop
moving at momentum .996), and ZeRO 3's small parameters, which stay gathered and would freeze the teacher, hence a
persistence threshold of 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..models.ema import ema_update
from .ranks import finish
from .segments import Shard
from .zero import Layout


class EmaTeacher:
    """module: the teacher as `make_teacher` gave it. Call it like the student; no gradient reaches it.

    wrap: makes a ZeRO 3 engine of a module (stage 3 only). Attributes: `shadows`, the fp32 averages, one flat tensor a
    shard of `layout` (None where the student's group has no counterpart in the teacher: its predictors).
    """

    def __init__(
        self, module: nn.Module, layout: Layout, stage: int, dtype: torch.dtype, wrap: Callable[[nn.Module], Any] | None
    ):
        self.layout, self.stage = layout, stage
        shards = layout.segments.shards
        self._mine = [shard.group["teacher"] for shard in shards]
        known = {name for name, _ in module.named_parameters()}
        for shard, mine in zip(shards, self._mine, strict=True):
            if any((segment.name in known) != mine for segment in shard.segments):
                raise RuntimeError("a parameter group mixes what the teacher has with what it lacks")
        self._groups: list[Tensor | None] = [None] * len(
            shards
        )  # stages 1, 2: all ranks' weights, as forward reads them
        self._targets: list[Tensor] = []  # what forward reads, where that is not the shadow itself
        parameters = dict(module.named_parameters())
        module.to(dtype=dtype) if stage != 3 else None
        if stage == 3:
            assert wrap is not None
            # Which forward reads the weights: DeepSpeed's hooks gather them layer by layer.
            self._call: Any = wrap(module)
            parameters = dict(module.named_parameters())
        else:
            self._call = module
        self.module = module
        self.shadows: list[Tensor | None] = [
            self._shadow(i, shard, parameters, dtype) if mine else None
            for i, (shard, mine) in enumerate(zip(shards, self._mine, strict=True))
        ]
        self.reset()

    def _shadow(self, i: int, shard: Shard, parameters: dict[str, nn.Parameter], dtype: torch.dtype) -> Tensor:
        fp32 = dtype == torch.float32
        if self.stage == 0:
            (segment,) = shard.segments
            target = parameters[segment.name].data.view(-1)
            if fp32:
                return target
            self._targets.append(target)
            return torch.empty_like(target, dtype=torch.float32)
        if self.stage == 3:
            shadow = torch.empty_like(shard.flat)
            read = shadow if fp32 else torch.empty_like(shadow, dtype=dtype)
            for name, begin in shard.members:
                part: Any = parameters[name].ds_tensor  # pyright: ignore[reportAttributeAccessIssue]
                part.data = read[begin : begin + part.ds_numel]
            if not fp32:
                self._targets.append(read)
            return shadow
        world, rank, length = dist.get_world_size(), dist.get_rank(), shard.flat.numel()
        group = self._groups[i] = torch.empty(world * length, dtype=dtype, device=shard.flat.device)
        for name, begin in shard.members:
            p = parameters[name]
            p.data = group[begin : begin + p.numel()].view(p.shape)
        mine = group[rank * length : (rank + 1) * length]
        if fp32:
            return mine
        self._targets.append(mine)
        return torch.empty_like(mine, dtype=torch.float32)

    def __call__(self, views: list[Tensor], context: dict[str, Tensor]) -> dict[str, Tensor]:
        with torch.no_grad():
            return self._call(views, context)

    @torch.no_grad()
    def reset(self) -> None:
        """Become the student."""
        for shadow, shard in zip(self.shadows, self.layout.segments.shards, strict=True):
            if shadow is not None:
                shadow.copy_(shard.flat)
        self.publish()

    @torch.no_grad()
    def update(self, momentum: float) -> None:
        """One step of the average, after the student's step was applied."""
        kept = [
            (shard.flat, shadow)
            for shadow, shard in zip(self.shadows, self.layout.segments.shards, strict=True)
            if shadow is not None
        ]
        ema_update(([flat for flat, _ in kept], [shadow for _, shadow in kept]), momentum)
        self.publish()

    @torch.no_grad()
    def publish(self) -> None:
        """Make what forward reads from the averages."""
        apart = [s for s, g in zip(self.shadows, self._groups, strict=True) if s is not None and self._targets]
        if apart:
            torch._foreach_copy_(self._targets, apart)  # pyright: ignore[reportPrivateImportUsage]
        world, rank = dist.get_world_size(), dist.get_rank()
        if world > 1:
            pending = []
            for group in self._groups:
                if group is not None:
                    mine = group.view(world, -1)[rank]
                    pending.append(dist.all_gather_single(group, mine, async_op=True))
            finish(pending)

    @contextmanager
    def plain(self, build: Callable[[], nn.Module]) -> Iterator[nn.Module | None]:
        """The teacher as one ordinary module on rank 0, for probes and export (None elsewhere). Collective.

        build: makes a module of the same architecture, used where the weights are scattered.
        """
        if self.stage < 3:
            yield self.module if dist.get_rank() == 0 else None
            return
        module = build().to(self.layout.segments.shards[0].flat.device) if dist.get_rank() == 0 else None
        if module is not None:
            module.load_state_dict(dict(self.module.named_buffers()), strict=False)
        target = {} if module is None else dict(module.named_parameters())
        with torch.no_grad():
            for name, whole in self.layout.whole(self.shadows):
                if target:
                    target[name].copy_(whole)
        yield module
