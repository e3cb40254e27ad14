"""The one seam to DeepSpeed: build, backward, verdict's numbers, step, skip; nothing else in Gristmill touches it.

The engine owns the optimizer step of every run, under ZeRO 0 to 3. What it must not own is kept out of its hands:
clipping and trust ratios are per parameter tensor and go by the table of segments (under ZeRO the optimizer sees flat
shards), a bad step is left out by clearing the gradients and never calling `step` (in fp32 without ZeRO, `step` would
write NaN into the weights), a frozen last layer is a group that the optimizer leaves out, and its checkpoint files are
never read or written: masters and moments go by (name, range).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint import Part, Saved
from .deepspeed_config import deepspeed_config
from .launch import quiet_deepspeed, seeing
from .optimizers import clip_scales, lars_scales, make_optimizer, parameter_groups
from .recipe import Recipe
from .schedule import cosine
from .segments import Segments
from .teacher import EmaTeacher
from .zero import layout

ZERO_3_FROM = 1_000_000_000  # parameters; below it `zero: auto` on several ranks is stage 1


class Engine:
    """A student under DeepSpeed with its EMA teacher, and an optimizer whose rates follow the position.

    Attributes: `module` (the student), `teacher`, `segments`, `stage`, `rates` (what the last `set_rates` applied).
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, recipe: Recipe, rank: int = 0, world: int = 1):
        self.recipe, self.rank, self.world = recipe, rank, world
        config = recipe.optimizer
        self.stage = resolve_stage(recipe, student, world)
        bf16 = recipe.precision == "bf16"
        self._device = next(student.parameters()).device
        initial = [p.detach().clone() for p in student.parameters() if p.requires_grad] if bf16 else None
        if recipe.precision != "fp32":
            _inside_autocast(student, self._device.type)
            _inside_autocast(teacher, self._device.type)
        buffers = {name: buffer.clone() for name, buffer in student.named_buffers()}
        groups = parameter_groups(student, config)
        decaying = {name for group in groups if group["decays"] for name in group["names"]}
        self.optimizer = make_optimizer(groups, config, self._device.type)
        settings = {
            "stage": self.stage, "precision": recipe.precision, "world": world,
            "micro_batch": recipe.batch // world // recipe.engine.accumulate, "accumulate": recipe.engine.accumulate,
        }  # fmt: skip
        own = deepspeed_config(dict(recipe.engine.deepspeed), **settings)
        self._engine = _initialize(self._device, model=student, optimizer=self.optimizer, config=own)
        if (
            self.stage == 0 and world == 1
        ):  # else it copies all gradients into one tensor and back, to send them nowhere
            self._engine.enable_backward_allreduce = False
        self.module: nn.Module = self._engine.module
        for name, buffer in self.module.named_buffers():
            if buffer.dtype != buffers[name].dtype:  # statistics in bf16 would stop moving
                buffer.data = buffers[name].data.to(buffer.device)
        self.layout = layout(self._engine, self.stage, bf16)
        self.segments: Segments = self.layout.segments
        self._undecayed = torch.tensor([n not in decaying for n in self.segments.names], device=self._device)
        if initial is not None:  # DeepSpeed's masters begin as what bf16 left of the weights
            self._fill(dict(zip(self.segments.names, initial, strict=True)))

        def scattered(module: nn.Module) -> Any:
            # Without overlap weights are gathered on the stream that has just averaged them; on one of its own
            # DeepSpeed would not wait for that.
            zero = {"stage3_param_persistence_threshold": 0, "overlap_comm": False}
            own = deepspeed_config({"zero_optimization": zero}, **settings)
            # No optimizer: DeepSpeed only hooks the forward.
            return _initialize(self._device, model=module, config=own)

        dtype = torch.bfloat16 if bf16 else torch.float32
        self.teacher = EmaTeacher(teacher, self.layout, self.stage, dtype, scattered if self.stage == 3 else None)
        self.optimizer.transform = self._transform
        self.rates: dict[str, float] = {}
        self._progress = 0.0
        self._clip: Tensor | None = None  # [P] factors of this step's gradients
        self._trust: Tensor | None = None

    def __call__(self, views: list[Tensor], context: dict[str, Tensor], last: bool = True) -> dict[str, Tensor]:
        """Forward of one micro-batch; `last`: gradients are reduced over the ranks in its backward."""
        self._engine.set_gradient_accumulation_boundary(last)
        return self._engine(views, context)

    def autocast(self) -> AbstractContextManager:
        """bf16 autocast where the recipe asks for it, for forwards that go past the engine (probes)."""
        if self.recipe.precision == "fp32":
            return nullcontext()
        return torch.autocast(self._device.type, dtype=torch.bfloat16)

    def set_rates(self, progress: float, step: float) -> dict[str, float]:
        """Apply the schedules at `progress` (0..1 of the run); `step` is one batch's share of it."""
        config, self._progress = self.recipe.optimizer, progress
        peak = config.lr * self.recipe.batch / 256
        lr = config.lr_at(peak, progress, step)
        decay = cosine(*config.weight_decay, progress)
        for group in self.optimizer.param_groups:
            group["lr"] = (peak if group["constant"] else lr) * group["lr_scale"]
            # LARS takes the decay into its trust ratio, so that the momentum below must not see it again.
            group["weight_decay"] = decay if group["decays"] and config.name != "lars" else 0.0
            # No step and no moments, as the official code has it by dropping the gradient.
            group["held"] = group["last_layer"] and progress < config.freeze_last_layer
        self.rates = {"lr": lr, "weight_decay": decay}
        return self.rates

    def backward(self, loss: Tensor) -> None:
        """Of one micro-batch's mean loss; DeepSpeed divides by their number."""
        self._engine.backward(loss)

    def squares(self) -> Tensor:
        """[P] sum of squares of each parameter's gradient, float64; partial on this rank unless `segments.replicated`."""
        return self.segments.squares(self.layout.gradients())

    def step(self, norms: Tensor) -> bool:
        """One optimizer step; False if DeepSpeed left it out by itself, which counts as a bad step.

        norms: [P] gradient norm of each parameter, over all ranks, before clipping.
        """
        config = self.recipe.optimizer
        self._clip = clip_scales(norms, config, self._progress) if config.clip else None
        self._trust = self._trust_ratios() if config.name == "lars" else None
        self._engine.step()
        return bool(self._engine.was_step_applied())

    @torch.no_grad()
    def _transform(self, group: dict[str, Any]) -> None:
        """Clip, then LARS, on the fp32 gradients of one group, segment by segment; called inside the optimizer's step."""
        if self._clip is None and self._trust is None:
            return
        keys = [key for key in group["params"] if key.grad is not None]
        if self._clip is not None:
            self._scale(keys, self._clip)
        if self._trust is not None and group["decays"]:
            for key in keys:
                key.grad.add_(key.detach(), alpha=self.rates["weight_decay"])
            self._scale(keys, self._trust)

    def _scale(self, keys: list[Tensor], factors: Tensor) -> None:
        """Multiply gradients segment by segment, all in one call: a GPU idles here, for its host has just read the verdict."""
        parts, scales = self.segments.spread(factors, keys)
        if parts:  # a rank may hold nothing but padding of a small group, and nothing may be clipped
            torch._foreach_mul_(parts, scales)  # pyright: ignore[reportPrivateImportUsage]

    def _trust_ratios(self) -> Tensor:
        """[P] LARS' trust ratio, from norms over whole tensors: one more all-reduced vector a step."""
        decay = self.rates["weight_decay"]
        weights = self.segments.views()
        gradients = [g.float() for g in self.layout.gradients()]
        if self._clip is not None and gradients:
            factors = list(self._clip.to(torch.float32)[self.segments.index].unbind())
            gradients = torch._foreach_mul(gradients, factors)  # pyright: ignore[reportPrivateImportUsage]
        updates = torch._foreach_add(gradients, weights, alpha=decay) if weights else []  # pyright: ignore[reportPrivateImportUsage]
        sums = torch.cat([self.segments.squares(weights), self.segments.squares(list(updates))])
        if not self.segments.replicated:
            torch.distributed.all_reduce(sums)
        weight_norms, update_norms = sums.sqrt().chunk(2)
        return lars_scales(weight_norms, update_norms, self.recipe.optimizer, self._undecayed)

    def skip(self) -> None:
        """Forget this step's gradients, wherever DeepSpeed keeps them."""
        self.layout.forget()

    def parts(self) -> Iterator[Part]:
        """What this rank writes into a checkpoint: masters, moments and EMA, by (name, range)."""
        shadow = dict(zip(map(id, self.segments.shards), self.teacher.shadows, strict=True))
        for shard, segment, start, stop in self.segments.owned(self.rank, self.world):
            at, length = segment.offset + start - segment.start, stop - start
            laid = {"student": shard.flat, **{k: v.view(-1) for k, v in self._moments(shard.key).items()}}
            if (average := shadow[id(shard)]) is not None:
                laid["teacher"] = average
            for group, flat in laid.items():
                shape = tuple(self.segments.shapes[segment.name])
                yield Part(group, segment.name, start, shape, flat.detach()[at : at + length])

    def steps(self) -> dict[str, Tensor]:
        """How many steps each parameter's moments have seen, by name; of a shard's group also those that others hold."""
        return {
            name: self.optimizer.state[shard.key]["step"].detach().clone()
            for shard in self.segments.shards
            for name, _ in shard.members
            if "step" in self.optimizer.state.get(shard.key, {})
        }

    def _moments(self, key: Tensor) -> dict[str, Tensor]:
        state = self.optimizer.state.get(key, {})
        return {k: v for k, v in state.items() if isinstance(v, Tensor) and v.numel() == key.numel() and k != "step"}

    @torch.no_grad()
    def load(self, saved: Saved) -> None:
        """Masters, moments and EMA of a checkpoint, whatever ranks and stage wrote it."""
        names = {group: saved.names(group) for group in saved.groups()}
        steps = saved.whole("steps")
        for shard, shadow in zip(self.segments.shards, self.teacher.shadows, strict=True):
            _read(saved, "student", shard.segments, shard.flat)
            if shadow is not None:
                _read(saved, "teacher", shard.segments, shadow)
            state = self.optimizer.state[shard.key]
            state.clear()
            seen = [name for name, _ in shard.members]
            for moment in sorted(names.keys() - {"student", "teacher"}):
                if any(name in names[moment] for name in seen):
                    state[moment] = torch.zeros_like(shard.key)
                    _read(saved, moment, shard.segments, state[moment].view(-1))
            if (name := next((n for n in seen if n in steps), None)) is not None:
                state["step"] = steps[name].to(shard.key.device if self.optimizer.defaults.get("fused") else "cpu")
            if not state:
                del self.optimizer.state[shard.key]
        self.layout.publish()
        self.teacher.publish()

    @torch.no_grad()
    def _fill(self, weights: dict[str, Tensor]) -> None:
        for shard, segment in self.segments:
            segment.of(shard.flat).copy_(weights[segment.name].view(-1)[segment.start : segment.stop])
        self.layout.publish()

    def close(self) -> None:
        call = self.teacher._call
        if hasattr(call, "destroy"):
            call.destroy()
        self._engine.destroy()
        _give_back()
        del self._engine, self.layout, self.teacher


def _initialize(device: torch.device, **given: Any) -> Any:
    """A DeepSpeed engine on this device, whatever the local rank: it sets devices as it is built and as it runs."""
    with seeing(device):
        engine = quiet_deepspeed().initialize(**given, dist_init_required=False)[0]
    if device.type == "cuda" and os.environ.get("LOCAL_RANK") != str(device.index):
        for name in ("forward", "backward", "step"):
            setattr(engine, name, seeing(device)(getattr(engine, name)))
    return engine


def _give_back() -> None:
    """ZeRO 3 puts a linear of its own in the place of torch's, for the whole process and for good."""
    from deepspeed.runtime.zero.partition_parameters import InsertPostInitMethodToModuleSubClasses as Patched

    torch.nn.functional.linear = getattr(Patched, "linear_bk", torch.nn.functional.linear)


@contextmanager
def zero_3_linear() -> Iterator[None]:
    """Inside, linear layers are ZeRO 3's, as on a CPU: for who asks what a step takes, without an engine."""
    quiet_deepspeed()
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
    from deepspeed.runtime.zero import linear

    here, before = CPU_Accelerator(), (torch.nn.functional.linear, linear.get_accelerator)
    torch.nn.functional.linear, linear.get_accelerator = linear.zero3_linear_wrap, lambda: here
    try:
        yield
    finally:
        torch.nn.functional.linear, linear.get_accelerator = before


def resolve_stage(recipe: Recipe, student: nn.Module, world: int) -> int:
    """`auto`: 0 in one process, 1 on several, 3 from a billion parameters on (DESIGN 3.6)."""
    if recipe.engine.zero != "auto":
        return recipe.engine.zero
    if world == 1:
        return 0
    return 3 if sum(p.numel() for p in student.parameters()) >= ZERO_3_FROM else 1


def _read(saved: Saved, group: str, segments: list[Any], flat: Tensor) -> None:
    for segment in segments:
        segment.of(flat).copy_(saved.read(group, segment.name, segment.start, segment.stop))


def _inside_autocast(module: nn.Module, device: str) -> None:
    """Let the module's own forward turn autocast on: DeepSpeed's engine turns off one that surrounds it on a GPU."""
    plain = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(device, dtype=torch.bfloat16):
            return plain(*args, **kwargs)

    module.forward = forward
