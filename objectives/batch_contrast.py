"""Contrast inside the batch: MoCo v3 (arXiv 2104.02057, algorithm 1) and SimCLR (arXiv 2002.05709, eq. 1, algorithm 1).

MoCo v3: a student crop must find its image's other crop among the teacher's crops of all images. SimCLR: the same among
the student's own rows, so that gradient reaches a row as an anchor and as another anchor's candidate. Candidates are those
of all ranks. They and SimCLR's log-sum-exps are gathered without a graph; each rank then writes down the exact gradient of
the whole batch's loss with respect to its own rows, so the ranks' mean gradient is that of one process, and no gradient
travels. No [2N, 2N] is ever whole. Facts: facebookresearch/moco-v3, moco/builder.py; google-research/simclr, objective.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..models.host import constant
from ..models.products import product
from ..models.prototypes import rows_in_block
from .contrast import streamed_logsumexp
from .memory import check_state
from .protocol import Outcome, StepInfo

TEMPERATURES = {"moco-v3": 1.0, "simclr": 0.1}
# A positive beats the rest if none is larger by more than rounding: it is among the candidates, summed in another order.
ROUNDING = 1e-5

Gather = Callable[[Tensor], Tensor]


class BatchContrastConfig(BaseModel):
    """Which of the two, and over which images."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    form: Literal["moco-v3", "simclr"] = "moco-v3"
    # MoCo v3: 1.0 for ResNet-50, 0.2 for ViT (CONFIG.md); SimCLR: 0.1, for CIFAR-10 0.5 (README). Default: by form.
    temperature: float = Field(default=TEMPERATURES["moco-v3"], gt=0)
    # Images that are contrasted with one another, in the order of the positions; it divides a forward's images, so that
    # neither ranks nor micro-batches matter. None: all ranks' images of a micro-batch, as published; with one
    # micro-batch a step that is the whole batch, on any number of ranks.
    virtual_batch: int | None = Field(default=None, ge=2)
    # SimCLR's code adds up what the paper averages, the losses of first and second crops: twice the paper's loss.
    compat: bool = False

    @model_validator(mode="before")
    @classmethod
    def _published(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("form") in TEMPERATURES:
            return {"temperature": TEMPERATURES[given["form"]], **given}
        return given

    @model_validator(mode="after")
    def _used(self) -> BatchContrastConfig:
        if self.compat and self.form != "simclr":
            raise ValueError("compat is for form: simclr; leave it out, MoCo v3's code and paper agree")
        return self

    @property
    def needs_teacher(self) -> bool:
        return self.form == "moco-v3"

    @property
    def over_ranks_batch(self) -> bool:
        """Whether an image's loss depends on which images of other ranks share its micro-batch."""
        return self.virtual_batch is None


class BatchContrastObjective:
    """On the outputs called `name`, unit rows, crop-major: student [C*B, dim] and, for MoCo v3, teacher [G*B, dim].

    Collective without a virtual batch. It remembers nothing, and draws nothing from `seed`.
    """

    def __init__(
        self,
        config: BatchContrastConfig,
        dim: int,
        *,
        seed: int = 0,
        name: str = "batch_contrast",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.config, self.dim, self.name, self.dtype = config, dim, name, dtype
        self.needs_teacher = config.needs_teacher

    def context(self) -> dict[str, Tensor]:
        return {}

    def teacher_context(self) -> dict[str, Tensor]:
        return {}

    def loss(self, student: dict[str, Tensor], teacher: dict[str, Tensor], info: StepInfo) -> Outcome:
        """ValueError for rows of another width, and for batches in which an image has no other to differ from."""
        rows = self._rows("student", student, info)
        batch, virtual = info.batch, self.config.virtual_batch
        if virtual and batch % virtual:
            raise ValueError(f"{self.name}: virtual_batch {virtual} does not divide the {batch} images of one forward")
        if (virtual or batch * info.world) < 2:
            raise ValueError(f"{self.name}: one image has no negatives; take a larger batch")
        with torch.autocast(rows.device.type, enabled=False):
            crops = rows.to(self.dtype).view(-1, batch, self.dim)
            if self.needs_teacher:
                keys = self._rows("teacher", teacher, info).detach().to(self.dtype).view(-1, batch, self.dim)
                loss, similarity, accuracy = self._predict(crops, keys, info)
            else:
                loss, similarity, accuracy = self._agree(crops, info)
        logs: dict[str, Tensor | float] = {
            f"loss/{self.name}": loss.detach(),
            f"{self.name}/positive_similarity": similarity,
            f"{self.name}/accuracy": accuracy,
            f"{self.name}/images": float(virtual or batch * info.world),
        }
        return Outcome(loss, logs)

    def _rows(self, who: Literal["student", "teacher"], side: dict[str, Tensor], info: StepInfo) -> Tensor:
        rows = info.output(self.name, who, side)
        if rows.shape[1:] != (self.dim,):
            raise ValueError(
                f"{self.name}: the {who}'s rows are {list(rows.shape)}, not [n, {self.dim}]; build head and objective "
                f"from one recipe"
            )
        return rows

    def _groups(self, batch: int) -> list[slice]:
        size = self.config.virtual_batch or batch
        return [slice(start, start + size) for start in range(0, batch, size)]

    def _predict(self, queries: Tensor, keys: Tensor, info: StepInfo) -> tuple[Tensor, Tensor, Tensor]:
        """MoCo v3: [C, B, D] against [G, B, D]. Two directions are added up, each 2 T times its cross-entropy."""
        temperature = self.config.temperature
        weights = info.pair_weights(same=info.same_views)
        columns = keys
        if not self.config.virtual_batch:
            columns = gathered(keys.transpose(0, 1), info).transpose(0, 1)
        loss, similarity, accuracy = queries.new_zeros(3).unbind()
        for part in self._groups(info.batch):
            candidates = columns[:, part] if self.config.virtual_batch else columns
            for i, key in enumerate(keys[:, part]):
                wanted = [j for j, weight in enumerate(weights[i]) if weight]
                if not wanted:
                    continue
                rows = torch.stack([queries[j, part] for j in wanted])
                lse, top = streamed_logsumexp(rows.flatten(0, 1), candidates[i].contiguous(), temperature)
                logits = (rows * key).sum(-1) / temperature
                share = constant([weights[i][j] for j in wanted], rows) * (len(key) / info.batch)
                loss = loss + (share * (lse.view_as(logits) - logits).mean(-1)).sum()
                with torch.no_grad():
                    similarity = similarity + (share * logits.mean(-1)).sum() * temperature
                    wins = logits >= top.view_as(logits) - ROUNDING / temperature
                    accuracy = accuracy + (share * wins.to(share.dtype).mean(-1)).sum()
        return loss * (4 * temperature), similarity, accuracy

    def _agree(self, crops: Tensor, info: StepInfo) -> tuple[Tensor, Tensor, Tensor]:
        """SimCLR: two crops of each image [2, B, D]."""
        if len(crops) != 2 or info.student_globals != 2:
            raise ValueError(
                f"{self.name}: SimCLR compares two global crops of an image, not {info.student_globals} and "
                f"{info.student_crops - info.student_globals} local ones; give the recipe one view with count: 2"
            )
        whole = self.config.virtual_batch is None
        found = []
        for part in self._groups(info.batch):
            rows = crops[:, part].flatten(0, 1)
            gather: Gather | None = (lambda t: gathered(t, info)) if whole else None
            found.append(
                nt_xent(rows, self.config.temperature, first=info.rank * len(rows) if whole else 0, gather=gather)
            )
        loss, similarity, accuracy = (torch.stack(values).mean() for values in zip(*found, strict=True))
        return loss * (2 if self.config.compat else 1), similarity, accuracy

    def commit(self, outcome: Outcome) -> None:
        """Nothing is remembered."""

    def state(self) -> dict[str, Tensor]:
        return {}

    def load(self, state: dict[str, Tensor]) -> None:
        check_state(self.name, state, {})


def gathered(rows: Tensor, info: StepInfo) -> Tensor:
    """Rows [n, ...] of all ranks [world * n, ...], detached. ValueError unless they are as many as `info` says."""
    rows = rows.detach().contiguous()
    every = info.gather(rows) if info.gather is not None else rows
    if len(every) != info.world * len(rows):
        raise ValueError(
            f"{len(every)} rows gathered of {len(rows)} on each of {info.world} ranks; gather, rank and world of a step "
            "belong together"
        )
    return every


class _NTXent(torch.autograd.Function):
    """(own rows [2n, D]) to (the mean loss of these anchors, the largest logit of each).

    The gradient is that of the mean over all ranks' anchors, times the number of ranks: their mean is the batch's.
    """

    @staticmethod
    def forward(ctx, own: Tensor, temperature: float, first: int, gather: Gather | None, block: int | None):  # type: ignore[override]
        count, scale = len(own), 1.0 / temperature
        every = own.detach() if gather is None else gather(own)
        block = max(2, block or rows_in_block(count, own.device.type))
        scaled = own * scale

        def logits_of(start: int) -> Tensor:
            """[2n, b] against the candidates from `start` on, without those that are the anchors themselves."""
            logits = product(scaled, every[start : start + block])
            low, high = max(start, first), min(start + logits.shape[1], first + count)
            if low < high:
                logits[low - first : high - first, low - start : high - start].fill_diagonal_(-torch.inf)
            return logits

        top = scaled.new_full((count, 1), -torch.inf)
        mass = scaled.new_zeros((count, 1))
        for start in range(0, len(every), block):
            logits = logits_of(start)
            higher = torch.maximum(top, logits.amax(1, keepdim=True))
            mass = mass * (top - higher).exp_() + logits.sub_(higher).exp_().sum(1, keepdim=True)
            top = higher
        lse = top + mass.log()
        partners = own.roll(count // 2, 0)
        loss = (lse.squeeze(1) - (scaled * partners).sum(1)).mean()
        lses = lse.squeeze(1) if gather is None else gather(lse.squeeze(1))
        if ctx.needs_input_grad[0]:
            # As an anchor a row is drawn by its own softmax, as a candidate by every other anchor's.
            slope = partners.mul(-2)
            for start in range(0, len(every), block):
                logits = logits_of(start)
                share = (logits - lses[start : start + block]).exp_().add_(logits.sub_(lse).exp_())
                slope.addmm_(share, every[start : start + block])
            ctx.save_for_backward(slope.mul_(scale / count))
        top = top.squeeze(1)
        ctx.mark_non_differentiable(top)
        return loss, top

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor, _: Tensor):  # type: ignore[override]
        (slope,) = ctx.saved_tensors
        return slope * grad, None, None, None, None


def nt_xent(
    own: Tensor, temperature: float, *, first: int = 0, gather: Gather | None = None, block: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """SimCLR's loss of this rank's anchors; detached, the positives' mean cosine and the share that beats all negatives.

    own [2n, D]: unit rows, first crops of n images, then their second crops. gather: to all ranks' rows, of which these
    are the ones from `first` on. block: candidates at a time. The gradient is described at `_NTXent`.
    """
    loss, top = _NTXent.apply(own, temperature, first, gather, block)  # type: ignore[misc]
    with torch.no_grad():
        cosine = (own * own.roll(len(own) // 2, 0)).sum(1)
        wins = cosine / temperature >= top - ROUNDING / temperature
    return loss, cosine.mean(), wins.to(own.dtype).mean()


def nt_xent_reference(rows: Tensor, temperature: float) -> Tensor:
    """The same loss of a whole batch [2N, D] from the formula, with all of [2N, 2N]."""
    logits = (rows @ rows.T / temperature).fill_diagonal_(-torch.inf)
    positive = logits.diagonal(len(rows) // 2)
    return logits.logsumexp(1).mean() - positive.mean()
