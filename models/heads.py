"""The heads: what maps a backbone's feature to the space in which one objective compares crops.

Two kinds, as in Mugs (arXiv 2203.14415, appendix; reference/mugs.md 1.1): `ProjectionHead` gives unit vectors for the
instance and the local-group objective, `PrototypeHead` logits over prototypes for the group objective (DINO's head,
arXiv 2104.14294). State keys are the official ones, with batch norm too (their `use_bn_in_head`). The weight norm is
plain arithmetic on two plain tensors: hooks and parametrisations get in the way of DeepSpeed's partitioning and of
checkpoints.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from .products import linear
from .prototypes import streamed_assignment


def unit(x: Tensor) -> Tensor:
    """Rows [..., d] at length 1, in float32 at least: autocast gives bf16, whose lengths would be off by 1 in 200."""
    return normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)


def projector(
    dim: int, hidden: int, out: int, *, bias: bool, norm: Callable[[int], nn.Module] | None = None
) -> nn.Sequential:
    """Three linear layers with GELU between them; `norm` makes what normalises a hidden width before its GELU."""
    layers: list[nn.Module] = []
    for width in (dim, hidden):
        layers += [nn.Linear(width, hidden, bias=bias), *([norm(hidden)] if norm else []), nn.GELU()]
    return nn.Sequential(*layers, nn.Linear(hidden, out, bias=bias))


class ProjectionHead(nn.Module):
    """Projector of three layers and, on the student only, a predictor of two; no bias, and no norm in the predictor.

    The student's output is unit(predictor(unit(projector(x)))), the teacher's unit(projector(x)).
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        out: int,
        predictor_hidden: int | None,
        norm: Callable[[int], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.projector = projector(dim, hidden, out, bias=False, norm=norm)
        self.predictor: nn.Sequential | None = None
        if predictor_hidden is not None:
            self.predictor = nn.Sequential(
                nn.Linear(out, predictor_hidden, bias=False),
                nn.GELU(),
                nn.Linear(predictor_hidden, out, bias=False),
            )

    def forward(self, x: Tensor) -> Tensor:
        """Features [n, dim] to unit vectors [n, out]."""
        x = unit(self.projector(x))
        return x if self.predictor is None else unit(self.predictor(x))


class WeightNormLinear(nn.Module):
    """A linear layer without bias whose rows are g * v / ||v||: direction and length are learned apart (arXiv 1602.07868).

    Norms that are not trained are a buffer of the same name: every parameter has a gradient and an optimizer shard.
    """

    weight_g: Tensor

    def __init__(self, dim: int, rows: int, *, train_norms: bool) -> None:
        super().__init__()
        if train_norms:
            self.weight_g = nn.Parameter(torch.ones(rows, 1))
        else:
            self.register_buffer("weight_g", torch.ones(rows, 1))
        # nn.Linear's default. The student draws it anew from its own seed.
        start = torch.empty(rows, dim).uniform_(-(dim**-0.5), dim**-0.5, generator=torch.Generator().manual_seed(0))
        self.weight_v = nn.Parameter(start)

    def forward(self, x: Tensor, targets: Tensor | None = None, temperature: float = 1.0) -> Any:
        """[n, dim] to [n, rows]; with targets [G, B, rows], what `streamed_assignment` gives instead."""
        if targets is not None:
            return streamed_assignment(x, self.weight_v, self.weight_g, targets, temperature)
        scale = self.weight_g / self.weight_v.norm(dim=1, keepdim=True)
        if torch.is_grad_enabled():
            return linear(x, self.weight_v * scale)
        return linear(x, self.weight_v).mul_(scale.mT)  # few rows: scale these, and not all prototypes


class PrototypeHead(nn.Module):
    """Projector of three layers with bias, unit length, then a weight-normed layer whose rows are the prototypes.

    With `norm_last_layer` the prototypes keep length 1: `weight_g` stays and gets no gradient. `second`: patches have so
    many prototypes of their own behind the same projector (iBOT, arXiv 2111.07832); None: they share those of the rest.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        bottleneck: int,
        prototypes: int,
        *,
        norm_last_layer: bool,
        norm: Callable[[int], nn.Module] | None = None,
        second: int | None = None,
    ) -> None:
        super().__init__()
        self.projector = projector(dim, hidden, bottleneck, bias=True, norm=norm)
        self.last_layer = WeightNormLinear(bottleneck, prototypes, train_norms=not norm_last_layer)
        self.last_layer2: WeightNormLinear | None = None
        if second is not None:
            self.last_layer2 = WeightNormLinear(bottleneck, second, train_norms=not norm_last_layer)

    def forward(
        self,
        x: Tensor,
        patches: Tensor | None = None,
        chosen: Tensor | None = None,
        targets: Tensor | None = None,
        temperature: float = 1.0,
    ) -> Any:
        """Features [n, dim] to logits [n, prototypes]; the temperature is the objective's.

        With targets [G, B, prototypes] to the log-sum-exp and the agreement of `streamed_assignment`, and no logits.
        With patches [m, dim], also theirs: (logits, patch logits [m, K], their mean [1, K]). chosen [c]: indices of the
        patches whose logits are wanted, [c, K]; the mean is over all all the same. It is that of the unit vectors put
        through the last layer, which is linear: no [m, K] is made for it.
        """
        if patches is None:
            return self.last_layer(unit(self.projector(x)), targets, temperature)
        vectors = unit(self.projector(torch.cat([x, patches])))
        rows, others = vectors[: len(x)], vectors[len(x) :]
        wanted = others if chosen is None else others[chosen]
        mean = others.mean(0, keepdim=True) if len(others) else others.new_zeros(1, others.shape[1])
        if self.last_layer2 is not None:
            second = self.last_layer2(torch.cat([wanted, mean]))
            return self.last_layer(rows), second[:-1], second[-1:]
        logits = self.last_layer(torch.cat([rows, wanted, mean]))
        return logits[: len(rows)], logits[len(rows) : -1], logits[-1:]
