"""NPID's memory bank: its two losses against the paper's formulas, its constant, and what a step leaves in it."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gristmill.objectives import bank as bank_module
from gristmill.objectives.bank import BankConfig, BankObjective
from gristmill.objectives.protocol import Objective, Outcome, StepInfo
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from . import plain_ancestors as plain

EXACT: dict[str, Any] = {"rtol": 1e-11, "atol": 1e-12}
IMAGES, DIM = 20, 6


def rows(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1).to(dtype)


def build(dtype: torch.dtype = torch.float64, images: int = IMAGES, seed: int = 0, **config: Any) -> BankObjective:
    config = {"negatives": 7, **config}
    return BankObjective(BankConfig(**config), DIM, images=images, seed=seed, dtype=dtype)


def info(index: list[int], **more: Any) -> StepInfo:
    return StepInfo(**{
        "batch": len(index), "student_crops": 1, "student_globals": 1, "teacher_crops": 0, "images": IMAGES,
        "index": torch.tensor(index), **more,
    })  # fmt: skip


@settings(deadline=None, max_examples=25)
@given(
    index=st.lists(st.integers(0, IMAGES - 1), min_size=1, max_size=5), temperature=st.sampled_from([0.07, 0.1, 1.0]),
    negatives=st.integers(1, 9), seed=st.integers(0, 99),
)  # fmt: skip
def test_noise_contrast_is_the_papers(index: list[int], temperature: float, negatives: int, seed: int) -> None:
    """In the first step, which estimates Z, and in the second, which keeps it."""
    objective = build(temperature=temperature, negatives=negatives)
    z = None
    for step in range(2):
        given_ = rows(len(index), DIM, seed=seed + step).requires_grad_()
        place = info(index, position=step * len(index))
        noise, before = objective.draw(place.position, torch.tensor(index)), objective.rows.clone()
        outcome = objective.loss({"bank": given_}, {}, place)
        z = plain.npid_z(given_.detach(), index, before, noise, temperature) if z is None else z
        wanted = plain.npid_nce(given_, index, before, noise, z, temperature)
        torch.testing.assert_close(outcome.loss, wanted, **EXACT)
        found = torch.autograd.grad(outcome.loss, given_)[0]
        torch.testing.assert_close(found, torch.autograd.grad(wanted, given_)[0], rtol=1e-9, atol=1e-10)
        objective.commit(outcome)
        assert objective.log_z == pytest.approx(math.log(z), rel=1e-12)
        torch.testing.assert_close(objective.rows, plain.npid_update(before, given_.detach(), index, 0.5), **EXACT)


@settings(deadline=None, max_examples=25)
@given(
    index=st.lists(st.integers(0, IMAGES - 1), min_size=1, max_size=5), temperature=st.sampled_from([0.07, 0.1, 1.0]),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_without_negatives_it_is_the_softmax_over_all(index: list[int], temperature: float, seed: int) -> None:
    objective = build(temperature=temperature, negatives=None)
    given_ = rows(len(index), DIM, seed=seed).requires_grad_()
    outcome = objective.loss({"bank": given_}, {}, info(index))
    wanted = plain.npid_softmax(given_, index, objective.rows, temperature)
    torch.testing.assert_close(outcome.loss, wanted, **EXACT)
    torch.testing.assert_close(*(torch.autograd.grad(loss, given_)[0] for loss in (outcome.loss, wanted)), **EXACT)
    objective.commit(outcome)
    assert objective.log_z is None


def test_blocks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    index, given_ = [3, 1, 4, 1, 5], rows(5, DIM)
    found = []
    for block in (1 << 20, 1, 2 * 7 * DIM):
        monkeypatch.setitem(bank_module.BLOCK, "cpu", block)
        own = given_.clone().requires_grad_()
        outcome = build().loss({"bank": own}, {}, info(index))
        found.append((outcome.loss, torch.autograd.grad(outcome.loss, own)[0], outcome.commit["mean"]))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-14, atol=1e-14)


# The bank.


def test_the_first_rows_are_uniform_about_one_long_and_the_seeds() -> None:
    objective = BankObjective(BankConfig(), 128, images=500, seed=1)
    edge = math.sqrt(3 / 128)
    assert -edge <= float(objective.rows.min()) < -0.99 * edge
    assert 0.99 * edge < float(objective.rows.max()) <= edge
    assert float(objective.rows.norm(dim=1).mean()) == pytest.approx(1.0, abs=0.01)
    assert abs(float(objective.rows.mean())) < 0.01 * edge
    again, other = (BankObjective(BankConfig(), 128, images=500, seed=seed) for seed in (1, 2))
    assert torch.equal(objective.rows, again.rows)
    assert not torch.equal(objective.rows, other.rows)


@settings(deadline=None, max_examples=50)
@given(index=st.lists(st.integers(0, 5), min_size=1, max_size=12), momentum=st.sampled_from([0.0, 0.5, 0.9]))
def test_an_image_seen_twice_in_a_step_moves_twice_in_order(index: list[int], momentum: float) -> None:
    objective = build(momentum=momentum, images=6)
    given_, before = rows(len(index), DIM), objective.rows.clone()
    objective.commit(objective.loss({"bank": given_}, {}, info(index, images=6)))
    torch.testing.assert_close(objective.rows, plain.npid_update(before, given_, index, momentum), **EXACT)
    assert objective.seen.nonzero().flatten().tolist() == sorted(set(index))
    assert objective.filled == len(set(index))
    unseen = [i for i in range(6) if i not in index]
    assert torch.equal(objective.rows[unseen], before[unseen])


def test_images_seen_once_move_together() -> None:
    """As many rounds as the most frequent image has places, each without a repetition."""
    turns = bank_module._turns(torch.tensor([4, 1, 4, 2, 1, 4]))
    assert [turn.tolist() for turn in turns] == [[0, 1, 3], [2, 4], [5]]
    assert bank_module._turns(torch.zeros(0, dtype=torch.int64)) == []


@pytest.mark.parametrize("negatives", [7, None])
def test_ranks_together_are_one_process(negatives: int | None) -> None:
    """The same draws for the same images, one Z, and the same bank, bit for bit, however images are spread."""
    index, given_ = [9, 2, 5, 2, 0, 7], rows(6, DIM)
    whole, parts = build(negatives=negatives), build(negatives=negatives)
    one = whole.loss({"bank": given_}, {}, info(index))
    halves = [slice(0, 3), slice(3, 6)]
    means = (
        [parts._log_means(given_[h], parts.rows[index[h]], parts.draw(0, torch.tensor(index[h]))) for h in halves]
        if negatives
        else []
    )
    two = [
        parts.loss({"bank": given_[h]}, {}, info(index[h], gather=lambda _: torch.cat(means), world=2, rank=rank))
        for rank, h in enumerate(halves)
    ]
    torch.testing.assert_close(torch.stack([o.loss for o in two]).mean(), one.loss, **EXACT)
    whole.commit(one)
    parts.commit(Outcome(one.loss, {}, {key: torch.cat([o.commit[key] for o in two]) for key in one.commit}))
    assert torch.equal(whole.rows, parts.rows)
    assert whole.log_z == (pytest.approx(parts.log_z, rel=1e-14) if negatives else None)


def test_noise_is_the_positions_and_the_images() -> None:
    objective, index = build(negatives=4000), torch.tensor([3, 4])
    drawn = objective.draw(8, index)
    assert drawn.shape == (2, 4000)
    assert torch.equal(drawn[1:], objective.draw(8, index[1:]))
    for other in (objective.draw(16, index), build(negatives=4000, seed=1).draw(8, index), drawn.flip(0)):
        assert (other == drawn).float().mean() < 0.2
    counts = torch.bincount(drawn.flatten(), minlength=IMAGES)
    assert len(counts) == IMAGES
    assert float(((counts - 400) ** 2 / 400).sum()) < 45  # chi-squared of 19 degrees: 1 in 1000


def test_given_noise_is_taken() -> None:
    objective, given_, noise = build(), rows(2, DIM), torch.tensor([[1, 2, 3], [4, 4, 0]])
    objective.log_z = 1.5
    found = objective.loss({"bank": given_}, {}, info([0, 1]), noise=noise).loss
    wanted = plain.npid_nce(given_, [0, 1], objective.rows, noise, math.exp(1.5), 0.07)
    torch.testing.assert_close(found, wanted, **EXACT)


def test_far_logits_stay_finite() -> None:
    """exp(1 / T) overflows float32 from T = 0.011 on; the logarithms do not."""
    objective = build(torch.float32, temperature=0.005)
    given_ = rows(2, DIM, dtype=torch.float32).requires_grad_()
    objective.rows[0] = given_.detach()[0]
    outcome = objective.loss({"bank": given_}, {}, info([0, 1]))
    assert bool(outcome.finite())
    assert bool(torch.isfinite(torch.autograd.grad(outcome.loss, given_)[0]).all())


@pytest.mark.parametrize("negatives", [7, None])
def test_half_the_room(negatives: int | None) -> None:
    half = build(torch.float32, negatives=negatives, storage="bfloat16")
    full = build(torch.float32, negatives=negatives)
    full.rows = half.rows.float()
    assert half.rows.dtype == torch.bfloat16
    assert half.bytes == full.bytes / 2
    for step in range(3):
        given_ = rows(4, DIM, seed=step, dtype=torch.float32)
        outcomes = [o.loss({"bank": given_}, {}, info([4, 1, 1, 9], position=4 * step)) for o in (half, full)]
        torch.testing.assert_close(outcomes[0].loss, outcomes[1].loss, rtol=1e-6, atol=1e-6)
        assert outcomes[0].loss.dtype == torch.float32
        half.commit(outcomes[0])
        full.commit(outcomes[1])
        torch.testing.assert_close(half.rows.float(), full.rows, rtol=0.01, atol=1e-3)
        full.rows = half.rows.float()


# The protocol.


def test_loss_has_no_side_effect_and_says_how_large_it_is() -> None:
    objective = build()
    before = objective.state()
    outcome = objective.loss({"bank": rows(3, DIM).requires_grad_()}, {}, info([1, 2, 3]))
    assert isinstance(objective, Objective)
    assert not objective.needs_teacher
    assert not objective.config.needs_teacher
    assert objective.config.needs_table
    torch.testing.assert_close(objective.state(), before, rtol=0, atol=0, equal_nan=True)
    assert outcome.logs["memory/bank/bytes"] == IMAGES * DIM * 8
    assert not any(isinstance(v, Tensor) and v.requires_grad for v in outcome.logs.values())
    assert not any(t.requires_grad for t in outcome.commit.values())
    assert all(len(t) == 3 for t in outcome.commit.values())
    objective.commit(outcome)
    logs = objective.loss({"bank": rows(3, DIM)}, {}, info([1, 2, 3])).logs
    assert logs["bank/seen"] == pytest.approx(3 / IMAGES)
    assert logs["bank/log_z"] == objective.log_z


@pytest.mark.parametrize("steps", [0, 2])
def test_a_resumed_bank_goes_on_bit_for_bit(steps: int) -> None:
    """Before Z is known, too."""
    first = build()
    for step in range(steps):
        first.commit(first.loss({"bank": rows(3, DIM, seed=step)}, {}, info([1, 2, step], position=3 * step)))
    second = build(seed=0)
    second.rows += 1
    second.load(first.state())
    for objective in (first, second):
        objective.commit(objective.loss({"bank": rows(3, DIM, seed=9)}, {}, info([1, 5, 5], position=9)))
    assert all(torch.equal(a, b) for a, b in zip(first.state().values(), second.state().values(), strict=True))
    assert first.log_z == second.log_z
    assert first.filled == second.filled == int(first.seen.sum())


def test_another_banks_state_is_refused() -> None:
    objective = build()
    state = objective.state()
    for wrong in (build(images=IMAGES + 1).state(), build(torch.float32).state(), {"rows": state["rows"]}):
        with pytest.raises(ValueError, match="resume with the recipe"):
            objective.load(wrong)
    torch.testing.assert_close(objective.state(), state, rtol=0, atol=0, equal_nan=True)


def test_half_precision_outputs_are_taken_up_in_full() -> None:
    given_ = rows(3, DIM, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = build(torch.float32).loss({"bank": given_}, {}, info([1, 2, 3]))
    assert found.loss.dtype == found.commit["rows"].dtype == torch.float32
    assert torch.equal(found.loss, build(torch.float32).loss({"bank": given_.float()}, {}, info([1, 2, 3])).loss)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_shows(bad: float) -> None:
    given_ = rows(3, DIM)
    given_[0, 0] = bad
    assert not bool(build().loss({"bank": given_}, {}, info([1, 2, 3])).finite())


def test_bad_input() -> None:
    given_, place = {"bank": rows(4, DIM)}, info([1, 2, 3, 4])
    for outputs, where, said in [
        ({}, place, "the student gives no 'bank'"),
        (given_, replace(place, batch=2, student_crops=2), "one crop of an image is compared with its row, not 2"),
        ({"bank": rows(4, 5)}, place, r"rows are \[4, 5\], not \[n, 6\]"),
        (given_, replace(place, index=None), "does not say which images it shows"),
        (given_, replace(place, index=torch.tensor([1, 2])), "does not say which images it shows"),
        (given_, replace(place, images=21), "each of 20 images, the step counts 21"),
        (given_, replace(place, index=torch.tensor([1, 2, 3, 20])), "shows numbers 1 ... 20"),
        (given_, replace(place, index=torch.tensor([1, 2, 3, -1])), "shows numbers -1 ... 3"),
    ]:
        with pytest.raises(ValueError, match=said):
            build().loss(outputs, {}, where)


def test_a_bank_that_finds_no_room_says_how_much_it_wants() -> None:
    with pytest.raises(
        ValueError, match=r"bank: no room .* 1\d{6}\.\d GiB on every rank; set objectives\.bank\.storage"
    ):
        BankObjective(BankConfig(), 1 << 20, images=1 << 28, seed=0)
    with pytest.raises(RuntimeError, match="nowhere"):  # what has nothing to do with room is not called that
        BankObjective(BankConfig(), 8, images=9, seed=0, device="nowhere")
    with pytest.raises(ValueError, match="nothing to tell apart"):
        build(images=1)


def test_config() -> None:
    config = BankConfig()
    assert (config.temperature, config.negatives, config.momentum) == (0.07, 4096, 0.5)
    for wrong in ({"negatives": 0}, {"momentum": 1.0}, {"storage": "float8"}, {"temperature": 0}, {"queue": 2}):
        with pytest.raises(ValidationError):
            BankConfig.model_validate(wrong)
