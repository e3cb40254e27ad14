"""BYOL and SimSiam against the papers' formulas, and the signs of a collapse that neither loss can show."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gristmill.objectives.bootstrap import BootstrapConfig, BootstrapObjective, spread
from gristmill.objectives.health import feature_std
from gristmill.objectives.protocol import Objective, StepInfo
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from . import plain_ancestors as plain

EXACT: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-12}
NAME, TARGET, DIM = "bootstrap", "bootstrap.projection", 6
FORMS = ("byol", "simsiam")


def rows(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1).to(dtype)


def build(form: str, dtype: torch.dtype = torch.float64) -> BootstrapObjective:
    return BootstrapObjective(BootstrapConfig.model_validate({"form": form}), DIM, dtype=dtype)


def info(batch: int, **more: Any) -> StepInfo:
    return StepInfo(**{
        "batch": batch, "student_crops": 2, "student_globals": 2, "teacher_crops": 2, "same_views": True, **more,
    })  # fmt: skip


def sides(form: str, predictions: Tensor, targets: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    if form == "byol":
        return {NAME: predictions}, {NAME: targets}
    return {NAME: predictions, TARGET: targets}, {}


@settings(deadline=None, max_examples=40)
@given(form=st.sampled_from(FORMS), batch=st.integers(1, 6), seed=st.integers(0, 99))
def test_the_papers_losses(form: str, batch: int, seed: int) -> None:
    """The gradient reaches the predictions alone, whoever the targets come from. Through the norm: distances and cosines
    of unit rows differ in the direction that the norm takes away."""
    raw = (3 * rows(2 * batch, DIM, seed=seed)).requires_grad_()
    predictions, targets = plain.unit(raw), rows(2 * batch, DIM, seed=seed + 1).requires_grad_()
    outcome = build(form).loss(*sides(form, predictions, targets), info(batch))
    given_ = (*predictions.split(batch), *targets.detach().split(batch))
    wanted = plain.byol(*given_) if form == "byol" else plain.simsiam(*given_)
    torch.testing.assert_close(outcome.loss, wanted, **EXACT)
    found = torch.autograd.grad(outcome.loss, [raw, targets], allow_unused=True, retain_graph=True)
    torch.testing.assert_close(found[0], torch.autograd.grad(wanted, raw)[0], **EXACT)
    assert found[1] is None


@pytest.mark.parametrize("form", FORMS)
def test_the_order_of_images_does_not_matter(form: str) -> None:
    predictions, targets = rows(12, DIM), rows(12, DIM, seed=1)
    turn = torch.randperm(6, generator=torch.Generator().manual_seed(0))
    turned = [side.view(2, 6, DIM)[:, turn].flatten(0, 1) for side in (predictions, targets)]
    losses = [build(form).loss(*sides(form, *given_), info(6)).loss for given_ in ((predictions, targets), turned)]
    torch.testing.assert_close(*losses, **EXACT)


@pytest.mark.parametrize("form", FORMS)
def test_ranks_means_are_the_batchs(form: str) -> None:
    predictions, targets = rows(12, DIM), rows(12, DIM, seed=1)
    parts = []
    for part in (slice(0, 3), slice(3, 6)):
        mine = [side.view(2, 6, DIM)[:, part].flatten(0, 1) for side in (predictions, targets)]
        parts.append(build(form).loss(*sides(form, *mine), info(3)).loss)
    whole = build(form).loss(*sides(form, predictions, targets), info(6)).loss
    torch.testing.assert_close(torch.stack(parts).mean(), whole, **EXACT)


@pytest.mark.parametrize(("form", "least"), [("byol", 0.0), ("simsiam", -1.0)])
def test_a_collapse_has_the_least_loss_and_shows_in_the_spread(form: str, least: float) -> None:
    """All images at one point solve either task; evenly spread outputs that agree do, too, and look otherwise."""
    point = rows(1, DIM).expand(12, -1)
    collapsed = build(form).loss(*sides(form, point, point), info(6))
    assert float(collapsed.loss) == pytest.approx(least, abs=1e-12)
    assert float(collapsed.logs[f"{NAME}/prediction_std"]) == pytest.approx(0.0, abs=1e-7)
    axes = torch.eye(DIM, dtype=torch.float64).repeat(2, 1)
    healthy = build(form).loss(*sides(form, axes, axes), info(6))
    assert float(healthy.loss) == pytest.approx(least, abs=1e-12)
    assert float(healthy.logs[f"{NAME}/target_std"]) == pytest.approx(1.0, abs=1e-12)


def test_spread_is_the_papers_sign() -> None:
    even = rows(4000, 64)
    assert float(spread(even)) == pytest.approx(1.0, abs=0.02)
    assert float(spread(even)) == pytest.approx(feature_std(even), rel=1e-12)
    assert float(spread(even[:1])) == 0.0


def test_local_crops_predict_the_global_ones() -> None:
    """Weights are the pairs'; a local crop is never a target."""
    for form, factor in (("byol", 2), ("simsiam", 1)):
        predictions, targets = rows(9, DIM), rows(9 if form == "simsiam" else 6, DIM, seed=1)
        place = info(3, student_crops=3)
        weights = place.pair_weights(same=True)
        p, z = predictions.split(3), targets.split(3)
        cosine = sum(weights[i][j] * (p[j] * z[i]).sum(1).mean() for i in range(2) for j in range(3))
        wanted = factor * (2 - 2 * cosine) if form == "byol" else -cosine
        torch.testing.assert_close(build(form).loss(*sides(form, predictions, targets), place).loss, wanted, **EXACT)


def test_crops_of_the_teachers_own_are_all_compared() -> None:
    predictions, targets = rows(4, DIM), rows(4, DIM, seed=1)
    p, z = predictions.split(2), targets.split(2)
    wanted = 2 * sum(((p[j] - z[i]) ** 2).sum(1).mean() for i in range(2) for j in range(2)) / 4
    found = build("byol").loss({NAME: predictions}, {NAME: targets}, info(2, same_views=False)).loss
    torch.testing.assert_close(found, wanted, **EXACT)


@pytest.mark.parametrize("form", FORMS)
def test_it_remembers_nothing(form: str) -> None:
    objective = build(form)
    outcome = objective.loss(*sides(form, rows(4, DIM).requires_grad_(), rows(4, DIM, seed=1)), info(2))
    assert isinstance(objective, Objective)
    assert objective.needs_teacher == objective.config.needs_teacher == (form == "byol")
    assert not outcome.commit
    assert not any(isinstance(v, Tensor) and v.requires_grad for v in outcome.logs.values())
    objective.commit(outcome)
    assert objective.state() == {}
    objective.load({})
    with pytest.raises(ValueError, match="resume with the recipe"):
        objective.load({"center": torch.zeros(1)})


@pytest.mark.parametrize("form", FORMS)
def test_half_precision_outputs_are_taken_up_in_full(form: str) -> None:
    predictions, targets = rows(8, DIM, dtype=torch.bfloat16), rows(8, DIM, seed=1, dtype=torch.bfloat16)
    objective = build(form, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = objective.loss(*sides(form, predictions, targets), info(4)).loss
    assert found.dtype == torch.float32
    assert torch.equal(found, objective.loss(*sides(form, predictions.float(), targets.float()), info(4)).loss)


def test_bad_input() -> None:
    given_ = rows(8, DIM)
    cases: list[tuple[str, tuple[dict[str, Tensor], dict[str, Tensor]], StepInfo, str]] = [
        ("byol", ({NAME: given_}, {}), info(4), "the teacher gives no 'bootstrap'"),
        ("byol", ({}, {NAME: given_}), info(4), "the student gives no 'bootstrap'"),
        ("byol", ({NAME: given_}, {NAME: rows(8, 5)}), info(4), r"targets are \[8, 5\], not \[n, 6\]"),
        ("byol", ({NAME: given_}, {NAME: given_}), info(3), "8 rows of the student for 2 crops of 3 images"),
        ("simsiam", ({NAME: given_}, {}), info(4), "'bootstrap.projection', are missing; give its head a predictor"),
        ("simsiam", ({NAME: given_, TARGET: given_[:4]}, {}), info(4), r"are \[4, 6\]"),
        ("simsiam", ({NAME: rows(8, 5), TARGET: given_}, {}), info(4), r"predictions are \[8, 5\]"),
        ("simsiam", ({NAME: given_, TARGET: given_}, {}), info(8, student_crops=1, student_globals=1), "it sees 1"),
    ]
    for form, outputs, place, said in cases:
        with pytest.raises(ValueError, match=said):
            build(form).loss(*outputs, place)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_shows(form: str, bad: float) -> None:
    predictions = rows(8, DIM)
    predictions[0, 0] = bad
    assert not bool(build(form).loss(*sides(form, predictions, rows(8, DIM, seed=1)), info(4)).finite())


def test_config() -> None:
    assert BootstrapConfig().form == "byol"
    for wrong in ({"form": "dino"}, {"temperature": 1.0}):
        with pytest.raises(ValidationError):
            BootstrapConfig.model_validate(wrong)
