"""Dense contrast: every place of a crop must find the place of the other crop that shows the same (DenseCL, arXiv 2011.09157).

Places are matched by correspondence.py, on backbone features or by geometry; what is compared are the dense head's
unit rows, the positive against a queue of other images. That queue holds one vector an image, the mean over places of the
head's raw output, normalised afterwards (reference/densecl-hcsc.md 1.2; equation 3 of the paper). The queue passes in blocks as in
contrast.py, once for all places of a crop: 32 images of 196 places against 65,536 rows would be 1.6 GB of logits.
DenseCL's other half, on whole images, is the objective `instance` with all pairs, at the same weight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from ..models.host import on_host
from .contrast import streamed_logsumexp
from .correspondence import Counterparts, Matches, counterparts, match_features, match_geometry
from .instance import strip
from .memory import RingMemory
from .protocol import Outcome, StepInfo, pair_weights

# Places that meet the queue together on a CPU: their sums stay in its cache while the blocks pass, a fifth of the time less.
QUERIES = 2048


class DenseConfig(BaseModel):
    """Dense contrast with a queue of negatives."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    queue: int = Field(default=65536, ge=1)  # pooled teacher vectors kept as negatives; DenseCL: 65536
    temperature: float = Field(default=0.2, gt=0)  # of all logits; DenseCL: 0.2
    # How a place of the student's crop finds its place in the teacher's: "features", the nearest backbone feature; "mutual",
    # where each is the other's nearest; "geometry", where the crops overlap. DenseCL: features.
    correspondence: Literal["features", "mutual", "geometry"] = "features"
    # Leave out matches whose features have a smaller cosine; None: none. DenseCL: none (its author's pictures: 0.9, mutual).
    min_similarity: float | None = Field(default=None, ge=-1, le=1)
    # Share of the run before which the loss counts nothing, while the queue fills. DenseCL: 0 (its author advises 10,000
    # steps where it diverges, of 1 M).
    start: float = Field(default=0.0, ge=0, le=1)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.min_similarity is not None and self.correspondence == "geometry":
            raise ValueError("min_similarity is of matched features; with correspondence geometry leave it out")
        return self


class DenseObjective:
    """InfoNCE of places, on the outputs `name` [n, S2, dim], `name`.features [n, S2, d] and the teacher's `name`.pooled."""

    def __init__(
        self,
        config: DenseConfig,
        dim: int,
        *,
        seed: int,
        name: str = "dense",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.config, self.name = config, name
        self.queue = RingMemory(
            config.queue, dim, seed=seed, unit=True, name=f"{name}.queue", dtype=dtype, device=device
        )

    def context(self) -> dict[str, Tensor]:
        return {}

    def teacher_context(self) -> dict[str, Tensor]:
        return {}

    def factor(self, progress: float) -> float:
        """What the loss is multiplied by: 0 before `start` of the run, 1 from there on."""
        return 0.0 if progress < self.config.start else 1.0

    def loss(self, student: dict[str, Tensor], teacher: dict[str, Tensor], info: StepInfo) -> Outcome:
        """Adds no more than logs and the pooled teacher vectors to enqueue, [B, G, dim].

        Terms are teacher crop i with each global student crop j, but j = i where these are the same crop; all weigh the same.
        ValueError when outputs are missing, do not come from one batch, or geometry is asked for and not given.
        """
        name, crops, dtype = self.name, info.student_globals, self.queue.rows.dtype
        queries = _places(name, "student", student, crops, info)
        keys = _places(name, "teacher", teacher, info.teacher_crops, info).detach()
        pooled = info.output(f"{name}.pooled", "teacher", teacher).detach()
        self.queue.check(*pooled.shape)
        if queries.shape[2:] != keys.shape[2:]:
            raise ValueError(f"{name}: rows of {queries.shape[2]} and {keys.shape[2]} numbers; use one head for both")
        weights = pair_weights(info.teacher_crops, crops, crops, equal=True, same=info.same_views)
        pairs = [(i, j, weight) for i, row in enumerate(weights) for j, weight in enumerate(row) if weight]
        terms: list[Tensor] = []
        logs: dict[str, Tensor | float] = {f"{name}/factor": self.factor(info.progress)}
        with torch.autocast(self.queue.rows.device.type, enabled=False):
            queries, keys, pooled = (rows.to(dtype) for rows in (queries, keys, pooled))
            if self.factor(info.progress):
                matches = self._matches(student, teacher, info)
                lse, top = negatives(queries, self.queue.rows, self.config.temperature)
                for i, j, weight in pairs:
                    found, where = matches(i, j)
                    own = slice(j * info.batch, (j + 1) * info.batch)
                    key = _crop(keys, i, info)
                    term = dense_contrast(queries[own], key, found, lse[own], top[own], self.config.temperature)
                    terms.append(weight * term.loss)
                    signs = {"positive_similarity": term.similarity, "accuracy": term.accuracy}
                    for sign, value in (signs | _signs(found, where, key.shape[1])).items():
                        logs[f"{name}/{sign}"] = logs.get(f"{name}/{sign}", 0.0) + weight * value
        # Of nothing with a graph: every rank's head has a gradient, and its optimizer a step.
        loss = torch.stack(terms).sum() if terms else queries.sum() * 0
        logs |= {f"loss/{name}": loss.detach(), **self.queue.logs()}
        pooled = pooled.view(info.teacher_crops, info.batch, -1).transpose(0, 1).contiguous()
        return Outcome(loss, logs, {"keys": pooled})

    def _matches(
        self, student: dict[str, Tensor], teacher: dict[str, Tensor], info: StepInfo
    ) -> Callable[[int, int], tuple[Matches, Counterparts | None]]:
        """What finds the matches of teacher crop i and student crop j, and where the places lie, if the step says it."""
        key, how = f"{self.name}.features", self.config.correspondence
        asked = _places(key, "student", student, info.student_globals, info)
        answers = _places(key, "teacher", teacher, info.teacher_crops, info)
        known = info.student_geometry is not None and info.teacher_geometry is not None
        if how == "geometry" and not known:
            raise ValueError(
                f"{self.name}: correspondence geometry needs the step's student_geometry and teacher_geometry; take "
                "correspondence: features where crops come without"
            )

        def find(i: int, j: int) -> tuple[Matches, Counterparts | None]:
            where = _where(i, j, asked, answers, info) if known else None
            if how == "geometry" and where is not None:
                return match_geometry(where), where
            rows = _crop(asked, j, info), _crop(answers, i, info)
            return match_features(*rows, mutual=how == "mutual", min_similarity=self.config.min_similarity), where

        return find

    def commit(self, outcome: Outcome) -> None:
        """Enqueue view by view, images (of all ranks, in order) inside a view."""
        self.queue.enqueue(outcome.commit["keys"].transpose(0, 1).flatten(0, 1))

    def state(self) -> dict[str, Tensor]:
        return {f"queue.{key}": tensor for key, tensor in self.queue.state().items()}

    def load(self, state: dict[str, Tensor]) -> None:
        self.queue.load(strip(self.name, state, "queue")["queue"])


def negatives(queries: Tensor, queue: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-sum-exp and maximum of the logits of queries [n, S2, D] against the queue [K, D], [n, S2] each, streamed."""
    rows = queries.flatten(0, 1)
    parts = rows.split(QUERIES) if on_host(rows.device.type) else [rows]
    found = [streamed_logsumexp(part, queue, temperature) for part in parts]
    lse, top = (torch.cat(each).view(queries.shape[:2]) for each in zip(*found, strict=True))
    return lse, top


class DenseContrast(NamedTuple):
    """Scalars of one pair of crops: the loss, and, detached, two signs of life over the matches that are kept."""

    loss: Tensor
    similarity: Tensor  # mean cosine of the positives
    accuracy: Tensor  # share of matches whose positive beats every negative


def dense_contrast(
    queries: Tensor, keys: Tensor, matches: Matches, lse: Tensor, top: Tensor, temperature: float
) -> DenseContrast:
    """InfoNCE of queries [B, Sq, D] against their matches among keys [B, Sk, D], unit rows.

    `lse`, `top` [B, Sq]: log-sum-exp and maximum of the queries' logits against the negatives. An image's loss is the
    mean over the matches it keeps, zero if none, and the loss is the mean over images: so an image weighs the same
    whatever others are on its rank. Where all are kept it is the mean over all places, as in the official code.
    """
    matched = keys.gather(1, matches.index.unsqueeze(2).expand(-1, -1, keys.shape[2]))
    positive = (queries * matched).sum(2)
    kept = matches.kept.to(positive.dtype)
    # threshold: beyond it softplus is taken for the identity; its default of 20 would cost digits in float64.
    terms = F.softplus(lse - positive / temperature, threshold=40)
    loss = ((terms * kept).sum(1) / kept.sum(1).clamp(min=1)).mean()
    with torch.no_grad():
        found = kept.sum().clamp(min=1)
        accuracy = ((positive / temperature > top) * kept).sum() / found
        return DenseContrast(loss, (positive * kept).sum() / found, accuracy)


def dense_contrast_reference(
    queries: Tensor, keys: Tensor, matches: Matches, queue: Tensor, temperature: float
) -> Tensor:
    """The same loss from the formula: [B, Sq, K + 1] logits and a cross-entropy a place."""
    losses = []
    for query, key, index, kept in zip(queries, keys.detach(), matches.index, matches.kept, strict=True):
        logits = torch.cat([(query * key[index]).sum(1, keepdim=True), query @ queue.detach().T], 1) / temperature
        terms = F.cross_entropy(logits, torch.zeros_like(index), reduction="none")[kept]
        losses.append(terms.mean() if len(terms) else terms.sum())
    return torch.stack(losses).mean()


def _signs(matches: Matches, where: Counterparts | None, places: int) -> dict[str, Tensor]:
    """What the matches are like, shares from 0 to 1 of those that are kept: some only where geometry is known."""
    kept = matches.kept
    found: dict[str, Tensor] = {"matched": kept.float().mean()}
    if matches.index.shape[1] == places:
        # Positions leak into a ViT's patches: a place that always matches its own number looks at nothing.
        own = torch.arange(places, device=kept.device)
        found["same_place"] = _share(matches.index == own, kept)
    if matches.similarity is not None:
        found["match_similarity"] = _share(matches.similarity.float(), kept)
    if where is not None:
        found["overlap"] = where.inside.float().mean()
        if matches.similarity is not None:  # else geometry would be held against itself
            among = kept & where.inside
            found["correct"] = _share(where.correct(matches.index), among)
            found["correct_by_chance"] = _share(where.chance(), among)
    return found


def _where(i: int, j: int, asked: Tensor, answers: Tensor, info: StepInfo) -> Counterparts:
    """Where the places of student crop j lie in teacher crop i."""
    assert info.student_geometry is not None
    assert info.teacher_geometry is not None
    return counterparts(
        _crop(info.student_geometry, j, info),
        _crop(info.teacher_geometry, i, info),
        query_size=info.global_size,
        key_size=info.teacher_size,
        query_places=asked.shape[1],
        key_places=answers.shape[1],
        device=asked.device,
    )


def _share(what: Tensor, among: Tensor) -> Tensor:
    return (what * among).sum() / among.sum().clamp(min=1)


def _crop(rows: Tensor, crop: int, info: StepInfo) -> Tensor:
    """Rows [B, ...] of one crop, of crop-major ones."""
    return rows[crop * info.batch : (crop + 1) * info.batch]


def _places(key: str, who: str, side: dict[str, Tensor], crops: int, info: StepInfo) -> Tensor:
    """[crops * B, S2, ...] of one network. ValueError when it lacks them or has others."""
    if key not in side:
        raise ValueError(
            f"objective {key.partition('.')[0]}: the {who} gives no {key!r}, only {', '.join(side) or 'nothing'}; build it "
            "with dense among student.objectives"
        )
    if side[key].ndim != 3 or len(side[key]) != crops * info.batch:
        raise ValueError(
            f"objective {key.partition('.')[0]}: {list(side[key].shape)} of the {who} for the places of {crops} global crops "
            f"of {info.batch} images; outputs and step do not come from one batch"
        )
    return side[key]
