"""MoCo v3 and SimCLR inside one process: against the papers' formulas, in other blocks, and what must not matter."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gristmill.objectives.batch_contrast import (
    BatchContrastConfig,
    BatchContrastObjective,
    nt_xent,
    nt_xent_reference,
)
from gristmill.objectives.protocol import Objective, StepInfo
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from . import plain_ancestors as plain

EXACT: dict[str, Any] = {"rtol": 1e-11, "atol": 1e-12}
NAME, DIM = "batch_contrast", 6


def rows(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1).to(dtype)


def build(dtype: torch.dtype = torch.float64, **config: Any) -> BatchContrastObjective:
    return BatchContrastObjective(BatchContrastConfig(**config), DIM, dtype=dtype)


def info(batch: int, **more: Any) -> StepInfo:
    return StepInfo(**{
        "batch": batch, "student_crops": 2, "student_globals": 2, "teacher_crops": 2, "same_views": True, **more,
    })  # fmt: skip


def same_gradients(found: Tensor, wanted: Tensor, of: Tensor) -> None:
    torch.testing.assert_close(found, wanted, **EXACT)
    torch.testing.assert_close(torch.autograd.grad(found, of)[0], torch.autograd.grad(wanted, of)[0], **EXACT)


@settings(deadline=None, max_examples=25)
@given(batch=st.integers(2, 6), temperature=st.sampled_from([0.1, 0.2, 1.0]), seed=st.integers(0, 99))
def test_moco_v3_is_the_papers_algorithm(batch: int, temperature: float, seed: int) -> None:
    student, teacher = rows(2 * batch, DIM, seed=seed).requires_grad_(), rows(2 * batch, DIM, seed=seed + 1)
    (q1, q2), (k1, k2) = student.split(batch), teacher.split(batch)
    outcome = build(temperature=temperature).loss({NAME: student}, {NAME: teacher}, info(batch))
    same_gradients(outcome.loss, plain.moco_v3(q1, q2, k1, k2, temperature), student)


@settings(deadline=None, max_examples=25)
@given(batch=st.integers(2, 6), temperature=st.sampled_from([0.1, 0.5, 1.0]), seed=st.integers(0, 99))
def test_simclr_is_the_papers_algorithm(batch: int, temperature: float, seed: int) -> None:
    student = rows(2 * batch, DIM, seed=seed).requires_grad_()
    z1, z2 = student.split(batch)
    wanted = plain.simclr(z1, z2, temperature)
    found = build(form="simclr", temperature=temperature).loss({NAME: student}, {}, info(batch)).loss
    same_gradients(found, wanted, student)
    torch.testing.assert_close(nt_xent_reference(student, temperature), wanted, **EXACT)
    twice = build(form="simclr", temperature=temperature, compat=True).loss({NAME: student}, {}, info(batch)).loss
    torch.testing.assert_close(twice, 2 * found, **EXACT)


@settings(deadline=None, max_examples=20)
@given(batch=st.integers(2, 7), block=st.integers(1, 20), seed=st.integers(0, 99))
def test_blocks_do_not_matter(batch: int, block: int, seed: int) -> None:
    """Also those that hold one candidate, which may be the anchor itself."""
    student = rows(2 * batch, DIM, seed=seed).requires_grad_()
    same_gradients(nt_xent(student, 0.1, block=block)[0], nt_xent_reference(student, 0.1), student)


def test_gradients_by_finite_differences() -> None:
    student = rows(6, DIM).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: nt_xent(x, 0.5, block=4)[0], (student,))


def ranks(world: int, batch: int, side: Tensor) -> tuple[list[Tensor], Callable[..., Callable[[Tensor], Tensor]]]:
    """Rows [2 * world * batch, D] of a batch as its ranks have them, and a `gather` that gives back what they would."""
    parts = [part.flatten(0, 1) for part in side.view(2, world, batch, -1).unbind(1)]

    def meet(of_every_rank: list[list[Tensor]]) -> Callable[[Tensor], Tensor]:
        queue = iter(of_every_rank)
        return lambda _: torch.cat(next(queue))

    return parts, meet


@settings(deadline=None, max_examples=15)
@given(world=st.integers(2, 4), batch=st.integers(1, 4), block=st.integers(1, 9), seed=st.integers(0, 99))
def test_simclrs_gradient_of_a_rank_is_its_share_of_the_batchs(world: int, batch: int, block: int, seed: int) -> None:
    """As an anchor and as a candidate of the other ranks' anchors, with nothing but rows and log-sum-exps gathered."""
    whole = rows(2 * world * batch, DIM, seed=seed)
    parts, meet = ranks(world, batch, whole)
    order = torch.arange(2 * world * batch).view(2, world, batch).transpose(0, 1).flatten()
    whole = whole.requires_grad_()
    wanted = nt_xent_reference(whole, 0.2)
    (gradient,) = torch.autograd.grad(wanted, whole)
    cosine = (whole @ whole.T / 0.2).detach().fill_diagonal_(-torch.inf)
    lses = [cosine.logsumexp(1)[order].view(world, -1)]
    losses = []
    for rank, part in enumerate(parts):
        own = part.clone().requires_grad_()
        gather = meet([parts, list(lses[0])])
        loss, _, _ = nt_xent(own, 0.2, first=rank * len(own), gather=gather, block=block)
        (mine,) = torch.autograd.grad(loss, own)
        torch.testing.assert_close(mine / world, gradient[order].view(world, -1, DIM)[rank], **EXACT)
        losses.append(loss.detach())
    torch.testing.assert_close(torch.stack(losses).mean(), wanted.detach(), **EXACT)


@pytest.mark.parametrize("form", ["moco-v3", "simclr"])
def test_the_order_of_images_does_not_matter(form: str) -> None:
    student, teacher = rows(12, DIM), rows(12, DIM, seed=1)
    turn = torch.randperm(6, generator=torch.Generator().manual_seed(0))
    objective = build(form=form)
    first = objective.loss({NAME: student}, {NAME: teacher}, info(6)).loss
    s, t = (side.view(2, 6, DIM)[:, turn].flatten(0, 1) for side in (student, teacher))
    torch.testing.assert_close(objective.loss({NAME: s}, {NAME: t}, info(6)).loss, first, **EXACT)


@pytest.mark.parametrize("form", ["moco-v3", "simclr"])
def test_virtual_batches_are_batches_of_their_own(form: str) -> None:
    """And so do not gather: neither ranks nor micro-batches can matter."""
    student, teacher = rows(12, DIM).requires_grad_(), rows(12, DIM, seed=1)
    whole = build(form=form, temperature=0.2, virtual_batch=3)

    def refuse(_: Tensor) -> Tensor:
        raise AssertionError("gathered")

    found = whole.loss({NAME: student}, {NAME: teacher}, info(6, gather=refuse, world=2)).loss
    halves = []
    for part in (slice(0, 3), slice(3, 6)):
        s, t = (side.view(2, 6, DIM)[:, part].flatten(0, 1) for side in (student, teacher))
        halves.append(build(form=form, temperature=0.2).loss({NAME: s}, {NAME: t}, info(3)).loss)
    same_gradients(found, torch.stack(halves).mean(), student)


def test_all_at_one_point_cannot_tell_images_apart() -> None:
    """Every candidate is as good: the logarithm of their number, 2N - 1 with SimCLR, N with MoCo v3."""
    point = rows(1, DIM).expand(10, -1)
    found = build(form="simclr").loss({NAME: point}, {}, info(5)).loss
    torch.testing.assert_close(found, torch.tensor(9.0, dtype=torch.float64).log(), **EXACT)
    found = build(temperature=0.2).loss({NAME: point}, {NAME: point}, info(5))
    torch.testing.assert_close(found.loss, 4 * 0.2 * torch.tensor(5.0, dtype=torch.float64).log(), **EXACT)


@pytest.mark.parametrize("form", ["moco-v3", "simclr"])
def test_perfect_rows_are_recognised(form: str) -> None:
    """Images on axes of their own, both crops alike: every positive wins, in float32, too."""
    axes = torch.eye(DIM).repeat(2, 1)
    outcome = build(torch.float32, form=form, temperature=0.1).loss({NAME: axes}, {NAME: axes}, info(DIM))
    assert outcome.logs[f"{NAME}/accuracy"] == 1.0
    assert outcome.logs[f"{NAME}/positive_similarity"] == pytest.approx(1.0)
    mixed = axes.roll(1, 0)
    mixed[:DIM] = axes[:DIM]
    worse = build(torch.float32, form=form, temperature=0.1).loss({NAME: mixed}, {NAME: mixed}, info(DIM))
    assert float(worse.logs[f"{NAME}/accuracy"]) == 0.0


def test_local_crops_and_crops_of_ones_own() -> None:
    """Three crops against the teacher's two: pairs and weights are those of every other objective, twice."""
    student, teacher = rows(9, DIM), rows(6, DIM, seed=1)
    s, t = student.split(3), teacher.split(3)
    for same_views in (True, False):
        place = info(3, student_crops=3, same_views=same_views)
        weights = place.pair_weights(same=same_views)
        ce = [
            [F.cross_entropy(s[j] @ t[i].T / 0.2, torch.arange(3)) for j in range(3)] for i in range(2)
        ]  # fmt: skip
        wanted = 4 * 0.2 * sum(weights[i][j] * ce[i][j] for i in range(2) for j in range(3))
        found = build(temperature=0.2).loss({NAME: student}, {NAME: teacher}, place).loss
        torch.testing.assert_close(found, wanted, **EXACT)


@pytest.mark.parametrize("form", ["moco-v3", "simclr"])
def test_it_remembers_nothing(form: str) -> None:
    objective = build(form=form)
    outcome = objective.loss({NAME: rows(4, DIM).requires_grad_()}, {NAME: rows(4, DIM, seed=1)}, info(2))
    assert isinstance(objective, Objective)
    assert objective.needs_teacher == objective.config.needs_teacher == (form == "moco-v3")
    assert not outcome.commit
    assert not any(isinstance(v, Tensor) and v.requires_grad for v in outcome.logs.values())
    objective.commit(outcome)
    assert objective.state() == {}
    objective.load({})
    with pytest.raises(ValueError, match="resume with the recipe"):
        objective.load({"queue": torch.zeros(1)})


@pytest.mark.parametrize("form", ["moco-v3", "simclr"])
def test_half_precision_outputs_are_taken_up_in_full(form: str) -> None:
    student, teacher = rows(8, DIM, dtype=torch.bfloat16), rows(8, DIM, seed=1, dtype=torch.bfloat16)
    objective = build(torch.float32, form=form)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = objective.loss({NAME: student}, {NAME: teacher}, info(4)).loss
    assert found.dtype == torch.float32
    assert torch.equal(found, objective.loss({NAME: student.float()}, {NAME: teacher.float()}, info(4)).loss)


def test_bad_input() -> None:
    student, teacher = {NAME: rows(8, DIM)}, {NAME: rows(8, DIM, seed=1)}
    place = info(4)
    cases: list[tuple[str, tuple[dict[str, Tensor], dict[str, Tensor]], StepInfo, str]] = [
        ("moco-v3", (student, {}), place, "the teacher gives no 'batch_contrast'"),
        ("simclr", ({}, {}), place, "the student gives no 'batch_contrast'"),
        ("simclr", ({NAME: rows(8, 5)}, {}), place, r"rows are \[8, 5\], not \[n, 6\]"),
        ("moco-v3", (student, {NAME: rows(8, 5)}), place, r"the teacher's rows are \[8, 5\]"),
        ("simclr", ({NAME: rows(2, DIM)}, {}), info(1), "one image has no negatives"),
        ("simclr", (student, {}), info(2, student_crops=4), "not 2 and 2 local ones"),
        (
            "simclr",
            (student, teacher),
            replace(place, world=2, gather=lambda t: t),
            "8 rows gathered of 8 on each of 2",
        ),
        (
            "moco-v3",
            (student, teacher),
            replace(place, gather=lambda t: t.repeat(2, 1, 1)),
            "8 rows gathered of 4 on each",
        ),
    ]
    for form, given_, where, said in cases:
        with pytest.raises(ValueError, match=said):
            build(form=form).loss(*given_, where)
    with pytest.raises(ValueError, match="virtual_batch 3 does not divide the 4 images"):
        build(virtual_batch=3).loss(student, teacher, place)


@pytest.mark.parametrize("form", ["moco-v3", "simclr"])
def test_what_is_not_finite_shows(form: str) -> None:
    student = rows(8, DIM)
    student[0, 0] = torch.nan
    assert not bool(build(form=form).loss({NAME: student}, {NAME: rows(8, DIM, seed=1)}, info(4)).finite())


def test_config() -> None:
    assert BatchContrastConfig().temperature == 1.0
    assert BatchContrastConfig(form="simclr").temperature == 0.1
    assert BatchContrastConfig(form="simclr", temperature=0.5).temperature == 0.5
    assert BatchContrastConfig().over_ranks_batch
    assert not BatchContrastConfig(virtual_batch=2).over_ranks_batch
    for wrong in ({"compat": True}, {"temperature": 0}, {"virtual_batch": 1}, {"form": "moco"}, {"queue": 3}):
        with pytest.raises(ValidationError):
            BatchContrastConfig.model_validate(wrong)
