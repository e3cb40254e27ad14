"""HCSC without epochs: clusterings of a memory, warm-started, while a small network really learns."""

import itertools
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gristmill.objectives.hierarchy import HierarchyConfig, HierarchyObjective
from gristmill.objectives.protocol import StepInfo
from torch import Tensor

BATCH, STEPS, WIDTH, DIM = 32, 120, 24, 8
CONFIG: dict[str, Any] = {
    "queue": 256, "levels": (24, 12, 6), "assign": "stream", "memory": 512, "every": 20 * BATCH, "warmup": 0.1, "ramp": 0.15,
    "exclusion_batch": 8, "local_crops": "mean", "instance_levels": "mean",
}  # fmt: skip


@dataclass
class Run:
    """What a small network saw while it learned: one linear layer, SGD, a momentum teacher, noise for augmentation."""

    objective: HierarchyObjective
    losses: list[float] = field(default_factory=list)
    ramps: list[float] = field(default_factory=list)
    fits: list[tuple[int, float, float, dict[str, float]]] = field(
        default_factory=list
    )  # step, loss before, after, logs

    def go(self, steps: int = STEPS, seed: int = 0) -> "Run":
        generator = torch.Generator().manual_seed(seed)
        centres = torch.randn(16, WIDTH, generator=generator)
        student = (torch.randn(WIDTH, DIM, generator=generator) / WIDTH**0.5).requires_grad_()
        teacher = student.detach().clone()
        held = centres[torch.arange(64) % 16] + 0.5 * torch.randn(
            64, WIDTH, generator=generator
        )  # one batch to compare on

        def noisy(images: Tensor) -> Tensor:
            return images + 0.3 * torch.randn(images.shape, generator=generator)

        for step in range(steps):
            images = centres[torch.randint(16, (BATCH,), generator=generator)]
            images = images + 0.5 * torch.randn(BATCH, WIDTH, generator=generator)
            info = self.info(step, steps)
            sides = self.sides(torch.cat([noisy(images), noisy(images)]), noisy(images), student, teacher)
            outcome = self.objective.loss(*sides, info)
            student.grad = None
            outcome.loss.backward()
            assert student.grad is not None
            with torch.no_grad():
                student -= 0.02 * student.grad
                teacher.lerp_(student, 0.02)
            self.objective.commit(outcome)
            self.losses.append(float(outcome.loss.detach()))
            self.ramps.append(float(outcome.logs["hierarchy/ramp"]))
            self._fit(step, steps, self.sides(torch.cat([held, held]), held, student.detach(), teacher))
        return self

    def _fit(self, step: int, steps: int, sides: tuple[dict[str, Tensor], dict[str, Tensor]]) -> None:
        after = self.info(step + 1, steps)
        still = self.info(step + 1, steps, batch=64)
        before = float(self.objective.loss(*sides, still).loss)
        logs = self.objective.refit(after)
        if logs:
            found = {name: float(value) for name, value in logs.items()}
            self.fits.append((step, before, float(self.objective.loss(*sides, still).loss), found))

    @staticmethod
    def info(step: int, steps: int, batch: int = BATCH) -> StepInfo:
        where: dict[str, Any] = {"position": step * BATCH, "progress": step / steps}
        return StepInfo(batch=batch, student_crops=2, student_globals=1, teacher_crops=1, **where)

    @staticmethod
    def sides(
        queries: Tensor, keys: Tensor, student: Tensor, teacher: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return {"hierarchy": F.normalize(queries @ student, dim=1)}, {"hierarchy": F.normalize(keys @ teacher, dim=1)}


def make(**changed: Any) -> HierarchyObjective:
    return HierarchyObjective(HierarchyConfig(**{**CONFIG, **changed}), DIM, seed=0)


@pytest.fixture(scope="module")
def run() -> Run:
    return Run(make()).go()


def test_clusterings_come_when_they_should(run: Run) -> None:
    """After the warm-up, with the memory full, then every 20 steps."""
    steps = [step for step, *_ in run.fits]
    assert steps[0] == 15  # 512 keys, which is after a tenth of the run
    assert [b - a for a, b in itertools.pairwise(steps)] == [20] * (len(steps) - 1)
    assert len(steps) == 6


def test_the_loss_does_not_jump(run: Run) -> None:
    """On the same images right before and after a clustering: none at the first, for the ramp begins at zero."""
    _, before, after, _ = run.fits[0]
    assert after == before
    for _, before, after, _ in run.fits[1:]:
        assert abs(after - before) < 0.05 * before
    changes = [abs(b - a) for a, b in zip(run.losses, run.losses[1:], strict=False)]
    first = run.fits[0][0]
    assert max(changes) < 0.25 * max(run.losses[first:])
    assert run.ramps[15] == 0.0
    assert run.ramps[-1] == 1.0
    assert all(b >= a for a, b in zip(run.ramps, run.ramps[1:], strict=False))


def test_prototypes_keep_their_identities(run: Run) -> None:
    """Their nearest earlier one is themselves; without the warm start hardly any is."""
    for _, _, _, logs in run.fits[1:]:
        assert logs["hierarchy/level0_stable"] > 0.85
        assert logs["hierarchy/level1_stable"] > 0.7
        assert logs["hierarchy/level2_stable"] > 0.6

    class Cold(HierarchyObjective):
        def _grow(self, rows: Tensor, before: Any, info: StepInfo) -> Any:
            self.seed += 1
            return super()._grow(rows, None, info)

    cold = Run(Cold(HierarchyConfig(**CONFIG), DIM, seed=0)).go()
    stable = [logs["hierarchy/level0_stable"] for *_, logs in cold.fits[1:]]
    assert max(stable) < 0.4


def test_the_network_learns_groups(run: Run) -> None:
    """The loss of the same kind (no ramp under way) falls."""
    full = [loss for loss, ramp in zip(run.losses, run.ramps, strict=True) if ramp == 1.0]
    assert sum(full[-10:]) < sum(full[:10])


def test_nothing_is_clustered_before_the_memory_is_full() -> None:
    run = Run(make(memory=2048)).go(63)
    assert not run.fits
    assert set(run.ramps) == {0.0}


def test_dead_prototypes_are_given_new_members_and_counted() -> None:
    objective = make(ramp=0.0)
    generator = torch.Generator().manual_seed(0)
    wide = F.normalize(torch.randn(512, DIM, generator=generator), dim=1)
    narrow = F.normalize(torch.ones(DIM) + 0.3 * torch.randn(512, DIM, generator=generator), dim=1)
    infos = [
        StepInfo(batch=8, student_crops=1, student_globals=1, teacher_crops=1, position=p, progress=0.5)
        for p in (0, 640)
    ]
    assert objective.memory is not None
    objective.memory.enqueue(wide)
    first = objective.refit(infos[0])
    assert "hierarchy/level0_stable" not in first
    objective.memory.enqueue(narrow)
    logs = objective.refit(infos[1])
    assert logs["hierarchy/level0_reseeded"] > 5
    used = torch.bincount(objective.tree.assign(narrow), minlength=24)
    assert (used > 0).sum() > 20


def test_frozen_assignments_are_the_official_form() -> None:
    """The whole data set in the memory, keys that are the rows that were clustered: the same tree, the same loss, bit for bit."""
    generator = torch.Generator().manual_seed(0)
    rows = F.normalize(torch.randn(512, DIM, generator=generator), dim=1)
    index = torch.randint(512, (16,), generator=generator)
    shape: dict[str, Any] = {"batch": 16, "student_crops": 3, "student_globals": 1, "teacher_crops": 1}
    info = StepInfo(**shape, index=index, images=512, position=512, progress=0.5)
    common: dict[str, Any] = {"exclusion_batch": None, "warmup": 0.0, "ramp": 0.0}
    table = HierarchyObjective(HierarchyConfig(**{**CONFIG, **common, "assign": "table"}), DIM, seed=0, images=512)
    stream = make(**common)
    assert stream.memory is not None
    stream.memory.enqueue(rows)
    assert table.stale(info)
    assert not stream.stale(info)
    table.refresh(rows, info)
    stream.refit(info)
    queries = F.normalize(torch.randn(48, DIM, generator=generator), dim=1)
    found = []
    for objective in (table, stream):
        student = queries.clone().requires_grad_()
        outcome = objective.loss({"hierarchy": student}, {"hierarchy": rows[index]}, info)
        outcome.loss.backward()
        found.append((outcome.loss, student.grad))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    assert not table.refit(info)
