"""Heads as most papers have them: linear layers with a norm and an activation between them, and perhaps a predictor.

MoCo v1 has one layer, v2, DenseCL and HCSC two with ReLU, SimCLR, MoCo v3, BYOL, SimSiam and SwAV batch norm, each in its
own places. All are a few numbers in `MlpConfig`, so that an objective says what it compares and the recipe what maps to
it. Mugs' heads, which come to unit length before the predictor, are in heads.py.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from .batch_norm import BatchNorm
from .heads import WeightNormLinear, unit
from .initial import generator

Norm = Literal["none", "batch", "plain"]  # plain: batch norm without weight and bias


class LayersConfig(BaseModel):
    """Linear layers; `out` is the width of the last one."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    layers: int = Field(default=2, ge=1)  # MoCo v1, NPID: 1; MoCo v2, DenseCL, HCSC, SwAV: 2; SimSiam: 3
    hidden: int = Field(default=2048, ge=1)  # MoCo v2, DenseCL, HCSC, SwAV: 2048; BYOL, MoCo v3: 4096
    bias: bool = True  # of the linear layers
    last_bias: bool | None = None  # of the last one, where it differs
    norm: Norm = "none"  # after each hidden layer, before its activation
    last_norm: Norm = "none"  # after the last layer, which no activation follows
    activation: Literal["relu", "gelu"] = "relu"


class MlpConfig(LayersConfig):
    """The head of one objective. Defaults are MoCo v2's (arXiv 2003.04297), which DenseCL and HCSC share."""

    out: int = Field(default=128, ge=1)
    # What the student puts behind the projector, and the teacher does not have (BYOL, SimSiam, MoCo v3); as wide as `out`.
    predictor: LayersConfig | None = None
    # Initial linear weights: PyTorch's default, or normal by fan in with biases 0, as DenseCL's global head (not its dense one).
    init: Literal["default", "kaiming"] = "default"
    # DenseCL's dense head alone: locations are averaged to a grid of so many a side; None: as the backbone has them.
    grid: int | None = Field(default=None, ge=1)

    def strange(self, *, dense: bool) -> str | None:
        """A field that says something which the dense head, or else any other, would not heed; None: there is none."""
        if not dense:
            return None if self.grid is None else "grid"
        told = {name for name, field in MlpConfig.model_fields.items() if getattr(self, name) != field.default}
        return min(told - {"layers", "hidden", "out", "init", "grid"}, default=None)


# Heads of the objectives that have no head of Mugs' kind, where a recipe says nothing: the papers' for ResNet-50.
_MOCO_V3 = {"hidden": 4096, "bias": False, "norm": "batch"}
_BYOL = {"hidden": 4096, "last_bias": False, "norm": "batch"}
HEADS: dict[str, MlpConfig] = {
    "dense": MlpConfig(),
    "hierarchy": MlpConfig(),
    "bank": MlpConfig(layers=1),  # NPID
    "batch_contrast": MlpConfig.model_validate({**_MOCO_V3, "out": 256, "last_norm": "plain", "predictor": _MOCO_V3}),
    "bootstrap": MlpConfig.model_validate({**_BYOL, "out": 256, "predictor": _BYOL}),
    "swapped": MlpConfig(norm="batch"),  # SwAV
    "clusters": MlpConfig(norm="batch"),  # DeepCluster v2
}


def mlp(dim: int, out: int, config: LayersConfig, virtual: int | None) -> nn.Sequential:
    """`config.layers` linear layers from `dim` to `out`. virtual: rows of batch norm's virtual batches."""
    layers: list[nn.Module] = []
    for number in range(config.layers):
        last = number == config.layers - 1
        width = out if last else config.hidden
        bias = config.last_bias if last and config.last_bias is not None else config.bias
        layers.append(nn.Linear(dim, width, bias=bias))
        norm = config.last_norm if last else config.norm
        if norm != "none":
            layers.append(BatchNorm(width, affine=norm == "batch", virtual=virtual))
        if not last:
            layers.append(nn.ReLU() if config.activation == "relu" else nn.GELU())
        dim = width
    return nn.Sequential(*layers)


def draw_kaiming(head: nn.Module, name: str) -> None:
    """Initial linear weights of a head by fan in, for ReLU; biases 0. Each from a generator of its own (`name`)."""
    for prefix, part in head.named_modules():
        if isinstance(part, nn.Linear):
            nn.init.kaiming_normal_(part.weight, nonlinearity="relu", generator=generator(f"{name}/{prefix}.weight"))
            if part.bias is not None:
                nn.init.zeros_(part.bias)


def normed(config: MlpConfig) -> bool:
    """Whether there is batch norm in it."""
    parts: list[LayersConfig] = [config, *([config.predictor] if config.predictor else [])]
    return any((part.norm != "none" and part.layers > 1) or part.last_norm != "none" for part in parts)


class MlpHead(nn.Module):
    """Projector and, on the student only, a predictor. The output has unit rows."""

    def __init__(self, dim: int, config: MlpConfig, virtual: int | None = None) -> None:
        super().__init__()
        self.projector = mlp(dim, config.out, config, virtual)
        self.predictor: nn.Sequential | None = None
        if config.predictor is not None:
            self.predictor = mlp(config.out, config.out, config.predictor, virtual)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Features [n, dim] to unit rows [n, out], and those of the projector alone, detached."""
        x = self.projector(x)
        projection = unit(x)
        return (projection if self.predictor is None else unit(self.predictor(x))), projection.detach()


class SwapHead(MlpHead):
    """A projector and prototypes of unit length: scores are cosines (SwAV, arXiv 2006.09882).

    The official code brings its prototypes back to length 1 before each step; weight norm with a fixed length does the same
    to what they compare, and leaves the optimizer nothing to undo.
    """

    def __init__(self, dim: int, config: MlpConfig, prototypes: int, virtual: int | None = None) -> None:
        super().__init__(dim, config, virtual)
        self.last_layer = WeightNormLinear(config.out, prototypes, train_norms=False)

    def scores(self, x: Tensor, queue: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Features [n, dim] to scores [n, prototypes], unit rows [n, out] (detached), and the scores of a queue [Q, out]."""
        rows, _ = self(x)
        # Codes sharpen scores twentyfold: bf16's third digit would be a twentieth of a weight.
        with torch.autocast(x.device.type, enabled=False):
            kind = self.last_layer.weight_v.dtype
            told = None if queue is None else self.last_layer(queue.to(kind)).detach()
            return self.last_layer(rows.to(kind)), rows.detach(), told
