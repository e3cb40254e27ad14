"""Where DeepSpeed 0.19 keeps masters and gradients under each ZeRO stage. The one place that knows its insides.

Five layouts hide behind one face: the parameters themselves (stage 0), fp32 copies of bf16 ones (stage 0), a flat
partition a group in two implementations (stage 1 with bf16; stages 1 and 2), and partitioned parameters (stage 3).
What is taken for granted here is checked when the engine starts (`check`) and tied to a plain loop by tests, so that
another DeepSpeed fails loudly.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .ranks import gather
from .segments import Segment, Segments, Shard


class Layout(ABC):
    """Masters and gradients of one engine. Gradients come as one 1-D tensor a segment, in the table's order."""

    replicated = False

    def __init__(self, engine: Any):
        self.engine = engine
        self.optimizer = engine.optimizer
        self.names = {id(p): name for name, p in engine.module.named_parameters()}
        # ZeRO 3 leaves an empty tensor where the parameter was.
        shapes = {n: getattr(p, "ds_shape", p.shape) for n, p in engine.module.named_parameters() if p.requires_grad}
        self.segments = Segments(self.shards(), shapes, replicated=self.replicated)
        self.check()

    @abstractmethod
    def shards(self) -> list[Shard]:
        """This rank's shards, in the same order on all ranks."""

    @abstractmethod
    def gradients(self) -> list[Tensor]:
        """After the last backward of a step: averaged over ranks and micro-batches."""

    def publish(self) -> None:
        """Make the weights that forward reads from masters that were written to; nothing where they are the masters."""
        return None

    def whole(self, flats: list[Tensor | None]) -> Iterator[tuple[str, Tensor]]:
        """(name, full tensor) of what is laid out like the masters, one flat tensor a shard (None: left out).

        Collective: all ranks call it, and all get everything, a shard at a time.
        """
        for shard, flat in zip(self.segments.shards, flats, strict=True):
            if flat is not None:
                for segment in shard.segments:
                    yield segment.name, flat.view(self.segments.shapes[segment.name])

    def forget(self) -> None:
        """Drop all gradients of this step, wherever they are."""
        self.optimizer.zero_grad()
        self.engine.zero_grad()

    def check(self) -> None:
        """Raise RuntimeError unless the table covers what this rank must hold and agrees with the weights."""
        for shard, segment in self.segments:
            size = self.segments.shapes[segment.name].numel()
            if not 0 <= segment.start < segment.stop <= size or shard.flat.dtype != torch.float32:
                raise RuntimeError(
                    f"ZeRO layout: {segment} of {size} elements in {shard.flat.dtype}: this DeepSpeed keeps its shards otherwise"
                )


class Plain(Layout):
    """Stage 0, fp32: the parameters are their own masters."""

    replicated = True

    def shards(self) -> list[Shard]:
        return [
            _whole(self.names[id(p)], p, group)
            for group in self.engine.basic_optimizer.param_groups
            for p in group["params"]
        ]

    def gradients(self) -> list[Tensor]:
        return [_flat(shard.key.grad, shard.key) for shard in self.segments.shards]


class Copies(Layout):
    """Stage 0, bf16: an fp32 copy beside each parameter."""

    replicated = True

    def _pairs(self):
        for group, low, high in zip(
            self.optimizer.param_groups, self.optimizer.fp16_groups, self.optimizer.fp32_groups, strict=True
        ):
            for p, copy in zip(low, high, strict=True):
                yield group, p, copy

    def shards(self) -> list[Shard]:
        return [_whole(self.names[id(p)], copy, group) for group, p, copy in self._pairs()]

    def gradients(self) -> list[Tensor]:
        return [_flat(p.grad, copy) for _, p, copy in self._pairs()]

    @torch.no_grad()
    def publish(self) -> None:
        for _, p, copy in self._pairs():
            p.copy_(copy)


class Flat(Layout):
    """Stages 1 and 2: each group is one flat tensor, cut into equal partitions."""

    def whole(self, flats: list[Tensor | None]) -> Iterator[tuple[str, Tensor]]:
        for shard, flat in zip(self.segments.shards, flats, strict=True):
            if flat is not None:
                group = gather(flat)
                for name, begin in shard.members:
                    shape = self.segments.shapes[name]
                    yield name, group[begin : begin + shape.numel()].view(shape)


class Partitions16(Flat):
    """Stage 1, bf16 (`BF16_Optimizer`): gradients in full fp32 on every rank."""

    def shards(self) -> list[Shard]:
        o = self.optimizer
        shards = []
        for group, flat, members, whole in zip(
            o.optimizer.param_groups, o.fp32_groups_flat_partition, o.bf16_groups, o.bf16_groups_flat, strict=True
        ):
            assert whole.numel() % flat.numel() == 0
            shards.append(_partition(self.names, flat, group, members, [0] * len(members), o.dp_rank))
        return shards

    def gradients(self) -> list[Tensor]:
        o = self.optimizer
        return [
            segment.of(flat)
            for shard, flat in zip(self.segments.shards, o.fp32_groups_gradient_flat_partition, strict=True)
            for segment in shard.segments
        ]

    def publish(self) -> None:
        self.optimizer.update_lp_params()


class Partitions(Flat):
    """Stages 1 and 2 otherwise: a rank keeps the gradients of its own partition."""

    def shards(self) -> list[Shard]:
        o = self.optimizer
        # It links moments to parameters after the first step, which a group that is held back does not have.
        o._hp_optimizer_states_linked = True
        shards = []
        for i, (group, flat) in enumerate(
            zip(o.optimizer.param_groups, o.single_partition_of_fp32_groups, strict=True)
        ):
            rank = dist.get_rank(o.real_dp_process_group[i])
            members, padding = o.round_robin_bit16_groups[i], o.round_robin_bit16_padding[i]
            shards.append(_partition(self.names, flat, group, members, padding, rank))
        return shards

    def gradients(self) -> list[Tensor]:
        found: list[Tensor] = []
        for i, shard in enumerate(self.segments.shards):
            parts, offset, at = self.optimizer.averaged_gradients[i], 0, {}
            for part in parts:
                at[offset] = part
                offset += part.numel()
            found += [at[segment.offset].reshape(-1) for segment in shard.segments]
        return found

    def publish(self) -> None:
        self.optimizer.update_lp_params()

    def forget(self) -> None:
        super().forget()
        # bf16 gradients are added up in buffers that zero_grad does not see.
        o = self.optimizer
        for i in range(len(o.bit16_groups)):
            o.averaged_gradients[i] = None
            o.all_grad_tensors[i] = None


class Parameters(Layout):
    """Stage 3: every parameter is cut into equal parts, and the parts of a sub-group lie end to end."""

    def shards(self) -> list[Shard]:
        o = self.optimizer
        groups = o.optimizer.param_groups
        shards = []
        for i, (flat, members) in enumerate(zip(o.fp32_partitioned_groups_flat, o.fp16_groups, strict=True)):
            segments, offset, places = [], 0, []
            for p in members:
                places.append((self.names[id(p)], offset))
                part = p.partition_numel()
                start = part * o._get_param_partition_rank(p)
                stop = min(start + part, p.ds_numel)
                if start < stop:
                    segments.append(Segment(self.names[id(p)], start, stop, offset))
                offset += part
            shards.append(Shard(flat, groups[o.sub_group_to_group_id[i]], segments, places))
        return shards

    def gradients(self) -> list[Tensor]:
        found: list[Tensor] = []
        for i, shard in enumerate(self.segments.shards):
            at = {
                self.names[id(p)]: g
                for p, g in zip(self.optimizer.fp16_groups[i], self.optimizer.averaged_gradients[i], strict=True)
            }
            found += [at[s.name].reshape(-1)[: s.stop - s.start] for s in shard.segments]
        return found

    def whole(self, flats: list[Tensor | None]) -> Iterator[tuple[str, Tensor]]:
        for shard, flat in zip(self.segments.shards, flats, strict=True):
            if flat is not None:
                ends = [begin for _, begin in shard.members[1:]] + [flat.numel()]
                ranks = gather(flat).view(-1, flat.numel())
                for (name, begin), end in zip(shard.members, ends, strict=True):
                    shape = self.segments.shapes[name]
                    yield name, ranks[:, begin:end].reshape(-1)[: shape.numel()].view(shape)

    @torch.no_grad()
    def publish(self) -> None:
        o = self.optimizer
        o._partition_all_parameters()
        for i, shard in enumerate(self.segments.shards):
            o.fp16_partitioned_groups_flat[i].copy_(shard.flat)
            o._unflatten_partitioned_parameters(i)
        # Small parameters stay gathered between steps: gather them anew.
        if o.persistent_parameters:
            o.persistent_parameters[0].all_gather(o.persistent_parameters)


def layout(engine: Any, stage: int, bf16: bool) -> Layout:
    """The layout of a DeepSpeed engine of this stage."""
    kind: type[Layout] = {
        0: Copies if bf16 else Plain,
        1: Partitions16 if bf16 else Partitions,
        2: Partitions,
        3: Parameters,
    }[stage]
    return kind(engine)


def _whole(name: str, key: Tensor, group: dict[str, Any]) -> Shard:
    return Shard(key, group, [Segment(name, 0, key.numel(), 0)], [(name, 0)])


def _partition(
    names: dict[int, str],
    flat: Tensor,
    group: dict[str, Any],
    members: list[nn.Parameter],
    padding: list[int],
    rank: int,
) -> Shard:
    """Partition `rank` of parameters laid end to end, each followed by its padding."""
    first, length = rank * flat.numel(), flat.numel()
    segments, places, begin = [], [], 0
    for p, gap in zip(members, padding, strict=True):
        places.append((names[id(p)], begin))
        start, stop = max(first - begin, 0), min(first + length - begin, p.numel())
        if start < stop:
            segments.append(Segment(names[id(p)], start, stop, begin + start - first))
        begin += p.numel() + gap
    return Shard(flat, group, segments, places)


def _flat(gradient: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like).view(-1) if gradient is None else gradient.reshape(-1)
