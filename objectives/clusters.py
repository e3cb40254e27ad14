"""Clusters of the whole data set as labels: DeepCluster v2 (SwAV's appendix, arXiv 2006.09882; DeepCluster, 1807.05520).

A memory keeps the latest projection of each global crop of every image. Once an epoch it is clustered by spherical
k-means, several times over (once a head, from other seeds and from the crops in turn), and until the next time all crops
of an image are to find its cluster among the centroids, which nobody trains. As facebookresearch/swav,
main_deepclusterv2.py, but for three things: the memory is first filled with centre crops (there: the first random ones);
an image that an epoch leaves out keeps its last row (there: it has no label); a centroid without rows takes half of the
largest cluster (there: it stays where it was). Projections stream through the centroids in blocks.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from .contrast import streamed_logsumexp
from .kmeans import Share, kmeans
from .memory import check_state
from .protocol import Outcome, StepInfo


class ClustersConfig(BaseModel):
    """Labels by k-means over a memory of the data set. Values are DeepCluster v2's."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    needs_teacher: ClassVar[bool] = False
    needs_table: ClassVar[bool] = True

    # Clusters of each head; DeepCluster v2: three times 3000.
    prototypes: tuple[Annotated[int, Field(ge=2)], ...] = Field(default=(3000, 3000, 3000), min_length=1)
    temperature: float = Field(default=0.1, gt=0)  # of the predictions; DeepCluster v2: 0.1
    iterations: int = Field(default=10, ge=1)  # of k-means; DeepCluster v2: 10
    every: int | None = Field(
        default=None, ge=1
    )  # images between two clusterings; None: as many as the last one gave a label, an epoch


class ClustersObjective:
    """On unit rows [C*B, dim] called `name`, of the student alone. images: of the data set; crops: global ones, kept.

    The memory takes crops * images * dim numbers on every rank, and in every checkpoint.
    """

    needs_teacher = False

    def __init__(
        self,
        config: ClustersConfig,
        dim: int,
        *,
        images: int,
        crops: int = 2,
        seed: int,
        name: str = "clusters",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        if images < max(config.prototypes):
            raise ValueError(
                f"{name}: {images} images cannot make {max(config.prototypes)} clusters; lower objectives.{name}.prototypes"
            )
        self.config, self.name, self.seed = config, name, seed
        self.memory = torch.zeros(crops, images, dim, dtype=dtype, device=device)
        self.centroids = [torch.zeros(k, dim, dtype=dtype, device=device) for k in config.prototypes]
        self.assignments = torch.zeros(
            len(config.prototypes), images, dtype=torch.int32
        )  # on the host, as `index`; -1: no label
        self.clustered = -1  # position of the last clustering; -1: none yet, the memory is empty

    def context(self) -> dict[str, Tensor]:
        return {}

    def teacher_context(self) -> dict[str, Tensor]:
        return {}

    def stale(self, info: StepInfo) -> bool:
        """Whether a pass over the data is wanted: before the first step alone, to have something to cluster."""
        return self.clustered < 0

    @torch.no_grad()
    def refresh(self, features: Tensor, info: StepInfo) -> None:
        """Fill the memory with features [images, dim], unit rows, and cluster it. ValueError for another shape.

        A zero row stands for an image that could not be read or is left out: it takes part in no clustering, and has no
        label, until a step has shown the image. ValueError when fewer rows are whole than there are clusters.
        """
        if features.shape != self.memory.shape[1:]:
            raise ValueError(
                f"{self.name}: features {tuple(features.shape)} of a pass over the data for a memory of "
                f"{tuple(self.memory.shape[1:])}"
            )
        self.memory.copy_(features.expand_as(self.memory))
        self._cluster(info)

    def refit(self, info: StepInfo) -> dict[str, Tensor | float]:
        """Cluster anew whenever `every` images went by. Equal on all ranks; collective when it happens."""
        # An epoch is of the images that have a label: a filter's others never come.
        every = self.config.every or max(1, int((self.assignments[0] >= 0).sum()))
        if self.clustered < 0 or info.position // every == self.clustered // every:
            return {}
        return self._cluster(info)

    @torch.no_grad()
    def _cluster(self, info: StepInfo) -> dict[str, Tensor | float]:
        """Each head's k-means, on the global crops in turn, with a start drawn for this position."""
        logs: dict[str, Tensor | float] = {}
        used, cosines = [], []
        for head, k in enumerate(self.config.prototypes):
            rows = self.memory[head % len(self.memory)]
            known = rows.square().sum(1) > 0.25
            rows = rows[known]
            found = kmeans(
                rows,
                k,
                seed=self.seed,
                name=f"{self.name}.{head}/{info.position}",
                niter=self.config.iterations,
                spherical=True,
                share=Share.of(info),
            )
            self.centroids[head].copy_(found.centroids)
            self.assignments[head] = -1
            self.assignments[head, known.cpu()] = found.assignment.to("cpu", torch.int32)
            used.append(float((torch.bincount(found.assignment, minlength=k) > 0).double().mean()))
            cosines.append(found.objective / len(rows))
        self.clustered = info.position
        logs[f"{self.name}/used"] = sum(used) / len(used)  # share of the clusters that have an image
        logs[f"{self.name}/tightness"] = sum(cosines) / len(cosines)  # mean cosine of an image and its centroid
        return logs

    def loss(self, student: dict[str, Tensor], teacher: dict[str, Tensor], info: StepInfo) -> Outcome:
        """Carries the global crops' projections [B, crops, dim] and the images' numbers [B].

        An image without a label adds nothing, and counts in the mean: so each weighs the same whatever others are on its
        rank. ValueError before there are clusters, without the images' numbers, or when the data set has another size.
        """
        rows = info.output(self.name, "student", student)
        index = self._check(rows, info)
        labels = self.assignments[:, index].to(rows.device, torch.int64, non_blocking=True)  # [heads, B]
        with torch.autocast(rows.device.type, enabled=False):
            rows = rows.to(self.memory.dtype)
            terms, hits, close = [], [], []
            for centroids, label in zip(self.centroids, labels, strict=True):
                has = (label >= 0).to(rows.dtype).repeat(info.student_crops)  # crop-major, as the rows
                own = centroids[label.clamp(min=0)].repeat(info.student_crops, 1)
                positive = (rows * own).sum(1) / self.config.temperature
                lse, top = streamed_logsumexp(rows, centroids, self.config.temperature)
                terms.append(((lse - positive) * has).mean())
                # The own centroid is one of all: where it is the best, the two differ by rounding at most.
                labelled = has.sum().clamp(min=1)
                hits.append(((positive.detach() > top - 1e-4) * has).sum() / labelled)
                close.append((positive.detach() * has).sum() / labelled * self.config.temperature)
            loss = torch.stack(terms).mean()
        crops = len(self.memory)
        kept = rows.detach()[: crops * info.batch].view(crops, info.batch, -1).transpose(0, 1).contiguous()
        logs: dict[str, Tensor | float] = {
            f"loss/{self.name}": loss.detach(),
            f"{self.name}/accuracy": torch.stack(hits).mean(),
            f"{self.name}/positive_similarity": torch.stack(close).mean(),
            f"{self.name}/age": float(info.position - self.clustered),  # of the clusters, in images
        }
        return Outcome(loss, logs, {"projections": kept, "index": index.to(rows.device, non_blocking=True)})

    def _check(self, rows: Tensor, info: StepInfo) -> Tensor:
        crops, images, dim = self.memory.shape
        if self.clustered < 0:
            raise ValueError(
                f"{self.name}: nothing is clustered yet; hand `refresh` the features of all images before the first step"
            )
        if rows.shape[1] != dim or info.student_globals != crops:
            raise ValueError(
                f"{self.name}: rows of {rows.shape[1]} numbers and {info.student_globals} global crops for a memory of "
                f"{dim} and {crops}; build head and objective from one recipe"
            )
        if info.index is None or info.images != images:
            raise ValueError(
                f"{self.name}: it keeps a row for each of {images} images, and the step "
                + ("numbers none" if info.index is None else f"has a data set of {info.images}")
                + "; this objective needs a data set that does not grow (stream.take_up: never)"
            )
        index = info.index
        if index.shape != (info.batch,) or (len(index) and not 0 <= int(index.min()) <= int(index.max()) < images):
            raise ValueError(f"{self.name}: the step's image numbers are not {info.batch} of 0 ... {images - 1}")
        return index.to("cpu", torch.int64)

    @torch.no_grad()
    def commit(self, outcome: Outcome) -> None:
        """Keep the rows of all ranks, in the order of the positions: of an image seen twice, the later one stays."""
        numbers = outcome.commit["index"].cpu().numpy()
        _, last = np.unique(numbers[::-1], return_index=True)
        at = torch.from_numpy(len(numbers) - 1 - last)
        index, at = (x.to(self.memory.device, non_blocking=True) for x in (torch.from_numpy(numbers)[at], at))
        self.memory[:, index] = outcome.commit["projections"][at].transpose(0, 1).to(self.memory)

    def state(self) -> dict[str, Tensor]:
        return {key: tensor.clone() for key, tensor in self._live().items()}

    def load(self, state: dict[str, Tensor]) -> None:
        check_state(self.name, state, self._live())
        for key, tensor in self._live().items():
            tensor.copy_(state[key])
        self.clustered = int(state["clustered"])

    def _live(self) -> dict[str, Tensor]:
        return {
            "memory": self.memory,
            "assignments": self.assignments,
            **{f"centroids.{head}": centroids for head, centroids in enumerate(self.centroids)},
            "clustered": torch.tensor(self.clustered, dtype=torch.int64),
        }
