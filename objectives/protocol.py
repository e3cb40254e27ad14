"""What the training step and an objective agree on.

An objective turns student and teacher outputs into a loss and keeps memories, but holds no trainable weight. Its
`loss` changes nothing, so that a bad step can be dropped; what it would remember travels in the outcome and is taken
over by `commit` once the optimizer step was applied. Who is compared with whom follows Mugs (sections 1.2 and 1.4 of
the notes on the official code): teacher crop i with every student crop j but j = i, global and local crops
averaged apart, or as in DINO all pairs alike.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor


@dataclass(frozen=True)
class StepInfo:
    """Shape and place of one step. Outputs are crop-major: row `crop * batch + image`, global crops first."""

    batch: int  # images on this rank
    student_crops: int  # crops of each image that the student saw, globals first
    student_globals: int
    teacher_crops: int
    position: int = 0  # place in the stream of the step's first sample, over all ranks
    progress: float = 0.0  # share of the run that is done, 0 to 1
    weak: Tensor | None = None  # [batch] bool: the student's global crops of this image are weakly augmented
    same_views: bool = False  # the student's global crops are the teacher's; j = i is left out either way (official)
    masks: Tensor | None = (
        None  # [teacher_crops * batch, h, w] bool: patches hidden from the student, True where hidden
    )
    # Rows [n, ...] of every rank in the order of the positions, [ranks * n, ...]; None: this rank is all there is.
    gather: Callable[[Tensor], Tensor] | None = None
    rank: int = 0
    world: int = 1
    index: Tensor | None = None  # [batch] int64, on the host: the image's number in the data set, shard by shard
    images: int = 0  # how many images the data set has, which is what `index` counts
    # [crops * batch, 2, 3] float, on the host: crop pixel (x, y, 1) to pixel of the upright source; the student's globals.
    student_geometry: Tensor | None = None
    teacher_geometry: Tensor | None = None
    global_size: int = 0  # pixels a side of the student's global crops
    teacher_size: int = 0  # pixels a side of the teacher's crops

    def pair_weights(self, equal: bool = False, same: bool = True) -> list[list[float]]:
        """`[teacher_crops][student_crops]` weights of the terms, summing to one. See `pair_weights`."""
        return pair_weights(self.teacher_crops, self.student_crops, self.student_globals, equal, same)

    def outputs(self, name: str, student: dict[str, Tensor], teacher: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """What both networks give out under `name`: [student_crops * batch, ...] and [teacher_crops * batch, ...].

        ValueError, naming the network and the remedy, when one lacks it or has other rows.
        """
        return self.output(name, "student", student), self.output(name, "teacher", teacher)

    def output(self, name: str, who: Literal["student", "teacher"], side: dict[str, Tensor]) -> Tensor:
        """What one network gives out under `name`, checked as in `outputs`."""
        crops = self.student_crops if who == "student" else self.teacher_crops
        if name not in side:
            raise ValueError(
                f"objective {name}: the {who} gives no {name!r}, only {', '.join(side) or 'nothing'}; build it with "
                f"{name} among student.objectives"
            )
        if len(side[name]) != crops * self.batch:
            raise ValueError(
                f"objective {name}: {len(side[name])} rows of the {who} for {crops} crops of {self.batch} images; "
                f"outputs and step do not come from one batch"
            )
        return side[name]


@dataclass
class Outcome:
    """A loss with what it saw. `loss` is a scalar with a graph; `logs` are detached.

    Every tensor in `commit` has samples (or ranks) first: to make the memories of several ranks equal, concatenate
    each over the ranks along dimension 0 and hand the result to `commit`.
    """

    loss: Tensor
    logs: dict[str, Tensor | float] = field(default_factory=dict)
    commit: dict[str, Tensor] = field(default_factory=dict)

    def finite(self) -> Tensor:
        """Scalar bool tensor (no host synchronisation): the loss and everything to be remembered is finite."""
        return torch.isfinite(self.loss.detach()).all() & self.finite_rows().to(self.loss.device, non_blocking=True)

    def finite_rows(self) -> Tensor:
        """Scalar bool tensor (no host synchronisation): everything to be remembered is finite."""
        flags = [torch.isfinite(rows).all() for rows in self.commit.values() if rows.is_floating_point()]
        return torch.stack(flags).all() if flags else torch.ones((), dtype=torch.bool)


@runtime_checkable
class Objective(Protocol):
    """One granularity. Implementations: the classes called `...Objective`, and `Mixture`.

    Some have more, which the mixture asks for by name. `needs_teacher` (true where absent): whether `loss` reads the
    teacher's outputs. `refit(info)`: called after the commit of each applied step, with the position reached, to cluster
    what is remembered anew. `stale(info)`, `refresh(features, info)`: for a form that wants a pass over the data, features
    [images, dim] of all of them in the order of `index`, unit rows, before the step that found it stale.
    """

    name: str

    def context(self) -> dict[str, Tensor]:
        """Read-only tensors that the student's forward needs, named `<objective>.<what>`."""
        ...

    def teacher_context(self) -> dict[str, Tensor]:
        """The same for the teacher's forward, under the same names."""
        ...

    def loss(self, student: dict[str, Tensor], teacher: dict[str, Tensor], info: StepInfo) -> Outcome:
        """Loss of one step, without any side effect."""
        ...

    def commit(self, outcome: Outcome) -> None:
        """Remember what `outcome` carries; called once, after its optimizer step was applied."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Everything that a resumed run needs: contiguous copies under stable names."""
        ...

    def load(self, state: dict[str, Tensor]) -> None:
        """Take over what `state` returned; ValueError naming the tensor when names, shapes or types differ."""
        ...


def images_of(student: Tensor, teacher: Tensor, student_crops: int, teacher_crops: int) -> int:
    """B of student rows [C*B, D] and teacher rows [G*B, D]. ValueError when they do not come from one batch."""
    batch = student.shape[0] // student_crops
    if student.shape[0] != batch * student_crops or teacher.shape != (batch * teacher_crops, student.shape[1]):
        raise ValueError(
            f"student {tuple(student.shape)} with {student_crops} crops and teacher {tuple(teacher.shape)} with "
            f"{teacher_crops} crops do not come from one batch"
        )
    return batch


def pair_weights(
    teacher_crops: int, student_crops: int, student_globals: int, equal: bool = False, same: bool = True
) -> list[list[float]]:
    """Weight of each term (teacher crop i, student crop j): half for global j, half for local j, each spread evenly.

    Pairs j = i are left out if `same`, as Mugs does whether or not these are the same crops. Where one half has no pair (no local crops, or a single global crop on both sides), the
    other gets all the weight; the official code divides by zero there. With `equal` all pairs weigh the same, as in
    DINO. Raises ValueError when no pair is left.
    """
    if not 0 <= student_globals <= student_crops:
        raise ValueError(f"student_globals={student_globals} must lie between 0 and student_crops={student_crops}")
    pairs = [(i, j) for i in range(teacher_crops) for j in range(student_crops) if j != i or not same]
    large = sum(j < student_globals for _, j in pairs)
    small = len(pairs) - large
    if not pairs:
        raise ValueError(
            f"{teacher_crops} teacher and {student_crops} student crops leave no pair to compare, since equal indices "
            "are skipped: give the recipe another student view"
        )
    halves = (large > 0) + (small > 0)
    weights = [[0.0] * student_crops for _ in range(teacher_crops)]
    for i, j in pairs:
        weights[i][j] = 1.0 / (len(pairs) if equal else halves * (large if j < student_globals else small))
    return weights
