"""The one seam to DeepSpeed: build, backward, step, skip; nothing else in Gristmill touches it.

The engine owns the optimizer step of every run. What it must not own is kept out of its hands: clipping is per
parameter tensor (Mugs), a bad step is left out by clearing the gradients and never calling `step` (in fp32 without
ZeRO, `step` would write NaN into the weights), and its checkpoint files are never read or written.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from .launch import quiet_deepspeed
from .recipe import OptimizerConfig, Recipe
from .schedule import cosine, warmup_cosine


def parameter_groups(student: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Four groups as Mugs has them: patch embedding or not, weight decay or not (none for 1-D tensors and biases).

    Each group carries `lr_scale` and `decays`; the class token, position embedding and weight_g do decay.
    """
    groups: dict[tuple[bool, bool], dict[str, Any]] = {}
    for name, parameter in student.named_parameters():
        if not parameter.requires_grad:
            continue
        patch = "patch_embed" in name
        decays = parameter.ndim > 1 and not name.endswith(".bias")
        group = groups.setdefault(
            (patch, decays),
            {"params": [], "lr_scale": config.patch_embed_scale if patch else 1.0, "decays": decays},
        )
        group["params"].append(parameter)
    return list(groups.values())


class Engine:
    """A student under DeepSpeed, with an AdamW whose rates follow the position.

    Attributes: `module` (the student), `rates` (what the last `set_rates` applied).
    """

    def __init__(self, student: nn.Module, recipe: Recipe, world: int):
        deepspeed = quiet_deepspeed()
        self.recipe = recipe
        config = recipe.optimizer
        self.optimizer = torch.optim.AdamW(parameter_groups(student, config), lr=0.0, betas=config.betas, foreach=True)
        self._engine, *_ = deepspeed.initialize(
            model=student,
            optimizer=self.optimizer,
            config={
                "train_micro_batch_size_per_gpu": recipe.batch // world,
                "gradient_accumulation_steps": 1,
                "zero_optimization": {"stage": 0},
                "zero_allow_untested_optimizer": True,
                "steps_per_print": 2**31,
            },
            dist_init_required=False,
        )
        self.module: nn.Module = self._engine.module
        self.rates: dict[str, float] = {}

    def __call__(self, views: list[Tensor], context: dict[str, Tensor]) -> dict[str, Tensor]:
        with self.autocast():
            return self._engine(views, context)

    def autocast(self) -> AbstractContextManager:
        """bf16 autocast where the recipe asks for it; weights, moments and losses stay fp32."""
        if self.recipe.precision == "fp32":
            return nullcontext()
        return torch.autocast(next(self.module.parameters()).device.type, dtype=torch.bfloat16)

    def set_rates(self, progress: float, step: float) -> dict[str, float]:
        """Apply the schedules at `progress` (0..1 of the run); `step` is one batch's share of it."""
        config = self.recipe.optimizer
        peak = config.lr * self.recipe.batch / 256
        lr = warmup_cosine(peak, config.min_lr, config.warmup, progress, step)
        decay = cosine(*config.weight_decay, progress)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
            group["weight_decay"] = decay if group["decays"] else 0.0
        self.rates = {"lr": lr, "weight_decay": decay}
        return self.rates

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss)

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """(name, gradient) of every parameter that has one, averaged over the ranks."""
        for name, parameter in self.module.named_parameters():
            if parameter.grad is not None:
                yield name, parameter.grad

    def clip(self, norms: Tensor) -> None:
        """Scale each gradient tensor to at most `clip` (coefficient clip / (norm + 1e-6), as the official code).

        norms: [tensors], in the order of `gradients()`, as `Guard` measured them.
        """
        limit = self.recipe.optimizer.clip
        if limit:
            scales = (limit / (norms + 1e-6)).clamp_(max=1.0)
            torch._foreach_mul_([gradient for _, gradient in self.gradients()], list(scales.unbind()))  # pyright: ignore[reportPrivateImportUsage]

    def freeze_last_layer(self, progress: float) -> None:
        """While frozen, prototypes lose their gradient, so AdamW leaves weights and moments alone."""
        if progress < self.recipe.optimizer.freeze_last_layer:
            for name, parameter in self.module.named_parameters():
                if "last_layer" in name:
                    parameter.grad = None

    def step(self) -> bool:
        """One optimizer step; False if DeepSpeed left it out by itself, which counts as a bad step."""
        self._engine.step()
        return bool(self._engine.was_step_applied())

    def skip(self) -> None:
        """Forget this step's gradients, in the optimizer and in the engine (both are needed under ZeRO)."""
        self.optimizer.zero_grad()
        self._engine.zero_grad()

    def optimizer_state(self) -> dict[str, Tensor]:
        """Moments by parameter name: `<name>:exp_avg`, `:exp_avg_sq`, `:step`; nothing for untouched ones."""
        state: dict[str, Tensor] = {}
        for name, parameter in self.module.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                state[f"{name}:{key}"] = value.detach()
        return state

    def load_optimizer_state(self, state: dict[str, Tensor]) -> None:
        """The inverse; raises KeyError for a name that the student does not have."""
        parameters = dict(self.module.named_parameters())
        for full, value in state.items():
            name, _, key = full.rpartition(":")
            self.optimizer.state[parameters[name]][key] = value.clone()

    def close(self) -> None:
        self._engine.destroy()
        del self._engine
