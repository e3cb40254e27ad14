"""Instance discrimination against a memory bank of the whole data set: NPID (Wu et al., arXiv 1805.01978).

Every image is a class of its own, and its class vector a row that follows the student's outputs. P(i | v), eq. 2 there,
is compared either with m rows drawn at random, by noise-contrastive estimation (eq. 5 to 7) with one normalising constant Z
(eq. 8) that the first step estimates, or, without negatives, with all rows exactly. Facts: zhirongw/lemniscate.pytorch,
lib/{NCEAverage,NCECriterion,LinearAverage}.py. Draws depend on (seed, step's position, number of the image) alone. Left
out: the code's 1e-7 beside m / N, which logarithms need no more, and the paper's proximal term, which its code lacks, too.
"""

from __future__ import annotations

import hashlib
import math
import re
from typing import ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..models.host import on_host
from ..pipeline.philox import integers
from .contrast import streamed_logsumexp
from .memory import check_state
from .protocol import Outcome, StepInfo

STREAM = 5000  # third counter word of the noise draws; their seed is the bank's own
# Numbers of bank rows that are looked at together: few enough for a CPU's cache, a GPU wants few launches.
BLOCK = {"cpu": 1 << 20}
BLOCK_ELSEWHERE = 1 << 27
_NO_ROOM = re.compile("allocate|out of memory")  # what torch says, on a host and on a GPU


class BankConfig(BaseModel):
    """Non-parametric instance discrimination. Defaults: main.py of the official code, for ImageNet."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    needs_teacher: ClassVar[bool] = False
    needs_table: ClassVar[bool] = True  # something is kept for each image of the data set

    temperature: float = Field(default=0.07, gt=0)
    negatives: int | None = Field(default=4096, ge=1)  # m noise draws an image; None: softmax over the whole bank
    momentum: float = Field(default=0.5, ge=0, lt=1)  # of a row, each time its image is seen
    # How rows are kept. "full": in the objective's own type, 512 bytes for 128 numbers; "bfloat16" takes half.
    storage: Literal["full", "bfloat16"] = "full"


class BankObjective:
    """On the student's outputs called `name` [B, dim], unit rows of one crop an image; needs the numbers of the images.

    images: how many the data set has. The bank [images, dim] is equal on all ranks, and each holds all of it.
    """

    needs_teacher = False

    def __init__(
        self,
        config: BankConfig,
        dim: int,
        *,
        images: int,
        seed: int,
        name: str = "bank",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        if images < 2 or dim < 1:
            raise ValueError(f"{name}: a bank of {images} images and {dim} numbers has nothing to tell apart")
        self.config, self.dim, self.images, self.name, self.dtype = config, dim, images, name, dtype
        self.seed = seed
        kept = dtype if config.storage == "full" else torch.bfloat16
        self.bytes = images * dim * kept.itemsize
        try:
            self.rows = _uniform_rows(images, dim, seed, name, device).to(kept).to(device)
        except (MemoryError, RuntimeError) as error:  # torch's is a RuntimeError
            if not isinstance(error, MemoryError) and not _NO_ROOM.search(str(error)):
                raise
            raise ValueError(
                f"{name}: no room for one row of each of {images} images, {self.bytes / 2**30:.1f} GiB on every rank; set "
                f"objectives.{name}.storage: bfloat16, or make the head's output narrower ({error})"
            ) from error
        # On the host: it decides nothing on the device. And how many that are.
        self.seen, self.filled = torch.zeros(images, dtype=torch.bool), 0
        self.log_z: float | None = None  # logarithm of Z; None before the first step

    def context(self) -> dict[str, Tensor]:
        return {}

    def teacher_context(self) -> dict[str, Tensor]:
        return {}

    def loss(
        self,
        student: dict[str, Tensor],
        teacher: dict[str, Tensor],
        info: StepInfo,
        noise: Tensor | None = None,
    ) -> Outcome:
        """Carries rows and their numbers. `noise` [B, m]: rows to compare with instead of those drawn.

        Collective in the first step, whose Z is that of all ranks' images. ValueError for several crops, for images
        without numbers, and for a data set of another size.
        """
        config, rows = self.config, self._rows(student, info)
        index = self._index(info)
        with torch.autocast(rows.device.type, enabled=False):
            rows = rows.to(self.dtype)
            there = index.to(rows.device, non_blocking=True)
            # As they are: after the first step rows have length 1, the ones drawn at the start about that.
            own = self.rows[there].to(self.dtype)
            commit = {"index": there, "rows": rows.detach()}
            if config.negatives is None:
                lse, _ = streamed_logsumexp(rows, self.rows, config.temperature)
                loss = (lse - (rows * own).sum(1) / config.temperature).mean()
            else:
                noise = self.draw(info.position, index) if noise is None else noise
                noise = noise.to(rows.device, non_blocking=True)
                log_z = self.log_z
                if log_z is None:
                    commit["mean"] = self._log_means(rows.detach(), own, noise)
                    log_z = self._log_z(commit["mean"] if info.gather is None else info.gather(commit["mean"]))
                shift = log_z + math.log(noise.shape[1] / self.images)
                loss = noise_contrast(rows, self.rows, own, noise, shift, config.temperature).mean()
            with torch.no_grad():
                similarity = (rows * F.normalize(own, dim=1)).sum(1).mean()
        logs: dict[str, Tensor | float] = {
            f"loss/{self.name}": loss.detach(),
            f"{self.name}/positive_similarity": similarity,
            f"{self.name}/seen": self.filled / self.images,
            f"memory/{self.name}/bytes": float(self.bytes),
        }
        if self.log_z is not None:
            logs[f"{self.name}/log_z"] = self.log_z
        return Outcome(loss, logs, commit)

    def draw(self, position: int, index: Tensor) -> Tensor:
        """Numbers of the noise rows [B, m] int64, uniform over all images, the right one included, as published."""
        assert self.config.negatives is not None
        key = hashlib.blake2b(f"{self.seed}/{self.name}/{position}".encode(), digest_size=8).digest()
        drawn = integers(
            int.from_bytes(key, "little"), index.numpy(), STREAM, count=self.config.negatives, high=self.images
        )
        return torch.from_numpy(drawn)

    def _rows(self, student: dict[str, Tensor], info: StepInfo) -> Tensor:
        rows = info.output(self.name, "student", student)
        if info.student_crops != 1:
            raise ValueError(
                f"{self.name}: one crop of an image is compared with its row, not {info.student_crops}; give the recipe "
                "one view with count: 1"
            )
        if rows.shape[1:] != (self.dim,):
            raise ValueError(
                f"{self.name}: the student's rows are {list(rows.shape)}, not [n, {self.dim}]; build head and objective "
                f"from one recipe"
            )
        return rows

    def _index(self, info: StepInfo) -> Tensor:
        if info.index is None or info.index.shape != (info.batch,):
            raise ValueError(f"{self.name}: the step does not say which images it shows; pass StepInfo.index [batch]")
        if info.images != self.images or int(info.index.min()) < 0 or int(info.index.max()) >= self.images:
            raise ValueError(
                f"{self.name}: the bank has a row for each of {self.images} images, the step counts {info.images} and "
                f"shows numbers {int(info.index.min())} ... {int(info.index.max())}; a data set that grows needs a "
                "new run, or an objective with a queue"
            )
        return info.index.cpu()

    @torch.no_grad()
    def _log_means(self, rows: Tensor, own: Tensor, noise: Tensor) -> Tensor:
        """Logarithm of the mean of exp(similarity / T) over each image's row and noise, [B] float64."""
        found = []
        for part in _parts(noise, self.dim, rows.device.type):
            logits = torch.bmm(self.rows[noise[part]].to(rows.dtype), rows[part].unsqueeze(2)).squeeze(2)
            logits = torch.cat([(rows[part] * own[part]).sum(1, keepdim=True), logits], 1) / self.config.temperature
            found.append(logits.double().logsumexp(1) - math.log(logits.shape[1]))
        return torch.cat(found)

    def _log_z(self, means: Tensor) -> float:
        """Z is N times the mean over all images of the step and their noise."""
        return float(means.logsumexp(0)) - math.log(len(means)) + math.log(self.images)

    @torch.no_grad()
    def commit(self, outcome: Outcome) -> None:
        """Move the rows of the images seen, in the order of the positions: one seen twice in a step moves twice."""
        if "mean" in outcome.commit:
            self.log_z = self._log_z(outcome.commit["mean"])
        index = outcome.commit["index"].cpu()
        for turn in _turns(index):
            there = index[turn].to(self.rows.device, non_blocking=True)
            given = outcome.commit["rows"][turn.to(self.rows.device, non_blocking=True)].to(self.dtype)
            moved = torch.lerp(given, self.rows[there].to(self.dtype), self.config.momentum)
            self.rows[there] = F.normalize(moved, dim=1).to(self.rows.dtype)
        index = index.unique()
        self.filled += int((~self.seen[index]).sum())
        self.seen[index] = True

    def state(self) -> dict[str, Tensor]:
        return {key: tensor.clone(memory_format=torch.contiguous_format) for key, tensor in self._live().items()}

    def load(self, state: dict[str, Tensor]) -> None:
        check_state(self.name, state, self._live())
        self.rows = state["rows"].to(self.rows.device, copy=True, memory_format=torch.contiguous_format)
        self.seen = state["seen"].to("cpu", copy=True)
        self.filled = int(self.seen.sum())
        log_z = float(state["log_z"])
        self.log_z = None if math.isnan(log_z) else log_z

    def _live(self) -> dict[str, Tensor]:
        log_z = math.nan if self.log_z is None else self.log_z
        return {"rows": self.rows, "seen": self.seen, "log_z": torch.tensor(log_z, dtype=torch.float64)}


class _NoiseContrast(torch.autograd.Function):
    """See `noise_contrast`. The gradient is gathered on the way, so that the bank may change before backward."""

    @staticmethod
    def forward(ctx, rows: Tensor, bank: Tensor, own: Tensor, noise: Tensor, shift: float, temperature: float):  # type: ignore[override]
        right = (rows * own).sum(1) / temperature - shift
        loss = F.softplus(-right, threshold=40)
        slope = own * (-torch.sigmoid(-right) / temperature).unsqueeze(1) if ctx.needs_input_grad[0] else None
        for part in _parts(noise, rows.shape[1], rows.device.type):
            others = bank[noise[part]].to(rows.dtype)  # [b, m, D]
            wrong = torch.bmm(others, rows[part].unsqueeze(2)).squeeze(2) / temperature - shift
            loss[part] += F.softplus(wrong, threshold=40).sum(1)
            if slope is not None:
                weights = torch.sigmoid(wrong).div_(temperature)
                slope[part] += torch.bmm(weights.unsqueeze(1), others).squeeze(1)
        if slope is not None:
            ctx.save_for_backward(slope)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        (slope,) = ctx.saved_tensors
        return slope * grad.unsqueeze(1), None, None, None, None, None


def noise_contrast(rows: Tensor, bank: Tensor, own: Tensor, noise: Tensor, shift: float, temperature: float) -> Tensor:
    """-log h(own) - sum of log(1 - h(noise)), [B], with h = P / (P + m / N); streamed over the images.

    rows [B, D], bank [N, D], own [B, D] (the images' rows of it), noise [B, m] int64; `shift` is log Z + log(m / N), so that
    the logit of h is similarity / T - shift. Gradient flows to `rows` only.
    """
    return _NoiseContrast.apply(rows, bank, own.detach(), noise, shift, temperature)  # type: ignore[return-value]


def _parts(noise: Tensor, dim: int, device: str) -> list[slice]:
    """Images at a time whose noise rows fit into one block."""
    size = max(1, (BLOCK["cpu"] if on_host(device) else BLOCK_ELSEWHERE) // (noise.shape[1] * dim))
    return [slice(start, start + size) for start in range(0, len(noise), size)]


def _turns(index: Tensor) -> list[Tensor]:
    """Places of `index` [n] in rounds without a repeated value: first occurrences, second ones, ..., each in order."""
    order = index.argsort(stable=True)
    sorted_ = index[order]
    place = torch.arange(len(index))
    first = torch.cat([torch.ones(min(1, len(index)), dtype=torch.bool), sorted_[1:] != sorted_[:-1]])
    rank = torch.empty_like(place)
    rank[order] = place - torch.where(first, place, 0).cummax(0).values if len(index) else place
    return [(rank == turn).nonzero().squeeze(1) for turn in range(int(rank.max()) + 1 if len(index) else 0)]


def _uniform_rows(images: int, dim: int, seed: int, name: str, device: torch.device | str) -> Tensor:
    """Uniform in +-sqrt(3 / dim), so about 1 long, [images, dim] float32 from Philox, keyed by (seed, name).

    On the host, for any device; rows of the meta device have no numbers, and none are drawn.
    """
    if torch.device(device).type == "meta":
        return torch.empty(images, dim, device=device)
    key = int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=16).digest(), "little")
    draws = np.random.Generator(np.random.Philox(key=key)).random((images, dim), dtype=np.float32)
    return torch.from_numpy(draws).mul_(2).sub_(1).mul_(math.sqrt(3 / dim))
