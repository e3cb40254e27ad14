"""SwAV against its formulas; its codes over ranks; the life of the queue; what cannot work is refused."""

import math
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gristmill.objectives.protocol import Objective, StepInfo
from gristmill.objectives.swapped import SwappedConfig, SwappedObjective
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from .plain_swapped import sinkhorn, swapped_loss

CROPS, BATCH, DIM, K, QUEUE = 4, 6, 8, 10, 18
EXACT: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-10}
INFO = StepInfo(batch=BATCH, student_crops=CROPS, student_globals=2, teacher_crops=0, progress=0.5)


def unit(*shape: int, seed: int = 0) -> Tensor:
    rows = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return F.normalize(rows, dim=-1)


PROTOTYPES = unit(K, DIM, seed=99)


def build(**config: Any) -> SwappedObjective:
    given = SwappedConfig(**{"queue": 0, **config})
    return SwappedObjective(given, DIM, prototypes=K, seed=0, dtype=torch.float64)


def student(rows: Tensor, objective: SwappedObjective, prototypes: Tensor = PROTOTYPES) -> dict[str, Tensor]:
    """What the student's head gives out of unit rows [C*B, DIM], as models/mlp.py has it."""
    out = {"swapped": rows @ prototypes.T, "swapped.projection": rows.detach()}
    if (queue := objective.context().get("swapped.queue")) is not None:
        out["swapped.queue_scores"] = (queue @ prototypes.T).detach()
    return out


def fill(objective: SwappedObjective, steps: int = QUEUE // BATCH, seed: int = 1) -> None:
    for step in range(steps):
        rows = unit(CROPS * BATCH, DIM, seed=seed + step)
        objective.commit(objective.loss(student(rows, objective), {}, INFO))


def test_it_is_an_objective_of_the_student_alone() -> None:
    assert isinstance(build(), Objective)
    assert not build().needs_teacher


@settings(max_examples=20, deadline=None)
@given(
    crops=st.integers(2, 5),
    batch=st.integers(1, 6),
    assigning=st.integers(1, 2),
    queue=st.booleans(),
    iterations=st.integers(1, 4),
    epsilon=st.sampled_from([0.05, 0.3]),
    seed=st.integers(0, 999),
)
def test_loss_and_gradients_are_the_formulas(
    crops: int, batch: int, assigning: int, queue: bool, iterations: int, epsilon: float, seed: int
) -> None:
    config = SwappedConfig(queue=batch if queue else 0, iterations=iterations, epsilon=epsilon, start=0)
    objective = SwappedObjective(config, DIM, prototypes=K, crops=assigning, seed=0, dtype=torch.float64)
    info = StepInfo(batch=batch, student_crops=crops, student_globals=assigning, teacher_crops=0)
    before = unit(crops * batch, DIM, seed=seed + 1)
    objective.commit(objective.loss(student(before, objective), {}, info))
    assert objective.in_use == queue
    known = before[: assigning * batch].view(assigning, batch, DIM) @ PROTOTYPES.T if queue else None

    rows = unit(crops * batch, DIM, seed=seed).requires_grad_()
    prototypes = PROTOTYPES.clone().requires_grad_()
    outcome = objective.loss(student(rows, objective, prototypes), {}, info)
    scores = (rows @ prototypes.T).view(crops, batch, K)
    plain = swapped_loss(scores, assigning, epsilon=epsilon, iterations=iterations, queue=known)
    torch.testing.assert_close(outcome.loss, plain, **EXACT)
    ours, theirs = (torch.autograd.grad(loss, [rows, prototypes]) for loss in (outcome.loss, plain))
    torch.testing.assert_close(ours, theirs, **EXACT)


def test_sharp_codes_neither_overflow_nor_vanish() -> None:
    """exp(1 / 0.002) is beyond float32: the plain form divides infinities here."""
    config = SwappedConfig(queue=0, epsilon=0.002)
    objective = SwappedObjective(config, DIM, prototypes=K, seed=0)
    rows = unit(CROPS * BATCH, DIM).float()
    outcome = objective.loss(student(rows, objective, PROTOTYPES.float()), {}, INFO)
    assert bool(outcome.finite())
    assert not bool(torch.isfinite(sinkhorn(rows @ rows.T, 0.002, 3)).all())


def test_codes_are_balanced_and_the_queue_counts() -> None:
    objective = build(iterations=200)
    scores = unit(2, BATCH * 4, DIM) @ PROTOTYPES.T
    info = replace(INFO, batch=BATCH * 4)
    codes = objective.codes(scores, None, info)
    torch.testing.assert_close(codes.sum(2), torch.ones(2, BATCH * 4, dtype=torch.float64))
    torch.testing.assert_close(codes.sum(1), torch.full((2, K), BATCH * 4 / K, dtype=torch.float64), rtol=1e-4, atol=0)
    # A queue that is full of one prototype's rows leaves none of it to this batch.
    crowd = PROTOTYPES[3].expand(2, 400, DIM) @ PROTOTYPES.T
    assert float(objective.codes(scores, crowd, info)[..., 3].sum()) < 0.1 * float(codes[..., 3].sum())


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 99), order=st.permutations(range(BATCH)))
def test_the_order_of_the_images_does_not_matter(seed: int, order: list[int]) -> None:
    objective = build()
    rows = unit(CROPS, BATCH, DIM, seed=seed)
    losses = [objective.loss(student(x.flatten(0, 1), objective), {}, INFO).loss for x in (rows, rows[:, order])]
    torch.testing.assert_close(losses[0], losses[1], **EXACT)


def test_collapse_shows() -> None:
    """All rows the same: the only balanced code is no preference, which is foretold no better than by chance."""
    objective = build()
    same = torch.zeros(CROPS * BATCH, DIM, dtype=torch.float64)  # equally far from all prototypes
    logs = objective.loss(student(same, objective), {}, INFO).logs
    assert float(logs["loss/swapped"]) == pytest.approx(math.log(K))
    assert float(logs["swapped/code_entropy_ratio"]) == pytest.approx(1)
    sharp = build(epsilon=0.005).loss(student(unit(CROPS * BATCH, DIM), objective), {}, INFO).logs
    assert float(sharp["swapped/code_entropy_ratio"]) < 0.5 < float(sharp["swapped/batch_entropy_ratio"])


def test_crops_that_agree_foretell_each_other() -> None:
    objective = build()
    rows = unit(BATCH, DIM).repeat(CROPS, 1)
    agreeing = objective.loss(student(rows, objective), {}, INFO).logs
    apart = objective.loss(student(unit(CROPS * BATCH, DIM), objective), {}, INFO).logs
    assert float(agreeing["loss/swapped"]) < float(apart["loss/swapped"])
    assert float(agreeing["swapped/accuracy"]) > float(apart["swapped/accuracy"])


def on_ranks(world: int, work: Callable[[int, Callable[[Tensor], Tensor]], Any]) -> list[Any]:
    """Run `work(rank, gather)` in a thread a rank; gather concatenates what all of them bring, in rank order."""
    barrier, slots, results = threading.Barrier(world, timeout=120), [Tensor()] * world, [None] * world

    def run(rank: int) -> None:
        def gather(rows: Tensor) -> Tensor:
            slots[rank] = rows
            barrier.wait()
            everyones = torch.cat(slots)
            barrier.wait()
            return everyones

        results[rank] = work(rank, gather)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("virtual", [None, 2])
@pytest.mark.parametrize("queue", [0, QUEUE - 1])  # one that no number of ranks divides
def test_codes_do_not_depend_on_the_number_of_ranks(world: int, virtual: int | None, queue: int) -> None:
    objective = build(virtual_batch=virtual)
    scores = unit(2, BATCH, DIM) @ PROTOTYPES.T
    past = unit(2, queue, DIM, seed=5) @ PROTOTYPES.T if queue else None
    whole = objective.codes(scores, past, INFO)
    share = BATCH // world

    def work(rank: int, gather: Callable[[Tensor], Tensor]) -> Tensor:
        info = replace(INFO, batch=share, rank=rank, world=world, gather=gather)
        return objective.codes(scores[:, rank * share : (rank + 1) * share].contiguous(), past, info)

    parts = on_ranks(world, work) if virtual is None or share % virtual == 0 else None
    if parts is None:
        with pytest.raises(ValueError, match=r"virtual_batch 2 does not divide the 3 images of one forward"):
            objective.loss({"swapped": scores[0]}, {}, replace(INFO, batch=3, student_crops=2))
        return
    joined = torch.cat(parts, 1)
    if virtual:
        assert torch.equal(joined, whole)
    torch.testing.assert_close(joined, whole, **EXACT)


# The queue.


def test_the_queue_fills_from_its_start_and_is_used_once_full() -> None:
    objective = build(queue=QUEUE, start=0.4)
    rows = unit(CROPS * BATCH, DIM)
    early = objective.loss(student(rows, objective), {}, replace(INFO, progress=0.39))
    assert early.commit == {}
    objective.commit(early)
    for step in range(QUEUE // BATCH):
        assert objective.context() == {}
        outcome = objective.loss(student(unit(CROPS * BATCH, DIM, seed=step), objective), {}, INFO)
        assert float(outcome.logs["swapped/queue_in_use"]) == 0
        objective.commit(outcome)
    assert objective.context()["swapped.queue"].shape == (2 * QUEUE, DIM)
    # Each global crop has its own queue, oldest first, and codes are balanced with it.
    wanted = torch.cat([unit(CROPS * BATCH, DIM, seed=step).view(CROPS, BATCH, DIM)[:2] for step in range(3)], 1)
    assert torch.equal(objective.context()["swapped.queue"].view(2, QUEUE, DIM), wanted)
    outcome = objective.loss(student(rows, objective), {}, INFO)
    plain = swapped_loss((rows @ PROTOTYPES.T).view(CROPS, BATCH, K), 2, queue=wanted @ PROTOTYPES.T)
    torch.testing.assert_close(outcome.loss, plain, **EXACT)
    assert float(outcome.logs["swapped/queue_in_use"]) == 1
    assert float(outcome.logs["memory/swapped.queue0/fill"]) == 1


def test_loss_changes_nothing_and_a_resumed_queue_goes_on() -> None:
    ours, theirs = build(queue=QUEUE, start=0), build(queue=QUEUE, start=0)
    fill(ours, steps=4)
    before = ours.state()
    rows = unit(CROPS * BATCH, DIM)
    outcome = ours.loss(student(rows, ours), {}, INFO)
    assert all(torch.equal(before[key], tensor) for key, tensor in ours.state().items())
    theirs.load(before)
    again = theirs.loss(student(rows, theirs), {}, INFO)
    assert torch.equal(outcome.loss, again.loss)
    for objective, found in ((ours, outcome), (theirs, again)):
        objective.commit(found)
    assert all(torch.equal(ours.state()[key], tensor) for key, tensor in theirs.state().items())
    assert not any(isinstance(v, Tensor) and v.requires_grad for v in outcome.logs.values())


def test_rows_of_several_ranks_are_enqueued_in_the_order_of_the_positions() -> None:
    whole, parts = build(queue=QUEUE, start=0), build(queue=QUEUE, start=0)
    rows = unit(CROPS, BATCH, DIM)
    fill_ = whole.loss(student(rows.flatten(0, 1), whole), {}, INFO)
    whole.commit(fill_)
    half = replace(INFO, batch=BATCH // 2)
    outcomes = [
        parts.loss(student(part.flatten(0, 1), parts), {}, half)
        for part in (rows[:, : BATCH // 2], rows[:, BATCH // 2 :])
    ]
    joined = torch.cat([outcome.commit["projections"] for outcome in outcomes])
    parts.commit(replace(outcomes[0], commit={"projections": joined}))
    assert all(torch.equal(whole.state()[key], tensor) for key, tensor in parts.state().items())


def test_it_learns_which_crops_belong_together() -> None:
    """Two noisy crops of each of eight things, a linear map and prototypes: the loss falls far below chance."""
    draws = torch.Generator().manual_seed(3)
    things = torch.randn(8, 16, generator=draws)
    weight = (torch.randn(16, DIM, generator=draws) / 4).requires_grad_()
    prototypes = torch.randn(K, DIM, generator=draws).requires_grad_()
    objective = SwappedObjective(SwappedConfig(queue=64, start=0.2), DIM, prototypes=K, seed=0)
    optimizer = torch.optim.SGD([weight, prototypes], lr=0.5, momentum=0.9)
    for step in range(120):
        which = torch.randint(8, (32,), generator=draws)
        seen = things[which].repeat(2, 1) + 0.3 * torch.randn(64, 16, generator=draws)
        rows = F.normalize(seen @ weight, dim=1)
        info = StepInfo(batch=32, student_crops=2, student_globals=2, teacher_crops=0, progress=step / 120)
        outcome = objective.loss(student(rows, objective, F.normalize(prototypes, dim=1)), {}, info)
        optimizer.zero_grad()
        outcome.loss.backward()
        optimizer.step()
        objective.commit(outcome)
    assert objective.in_use
    assert float(outcome.logs["loss/swapped"]) < 0.6 * math.log(K)
    assert float(outcome.logs["swapped/accuracy"]) > 0.9
    assert float(outcome.logs["swapped/batch_entropy_ratio"]) > 0.8


# What cannot work.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"swapped": torch.zeros(CROPS * BATCH, K + 1)}, r"swapped: 11 scores for 10 prototypes"),
        ({"swapped": torch.zeros(3, K)}, r"3 rows of the student for 4 crops of 6 images"),
        ({"swapped": None}, r"the student gives no 'swapped'"),
        ({"swapped.projection": None}, r"the student gives no 'swapped.projection'"),
        ({"swapped.projection": torch.zeros(CROPS * BATCH, DIM + 1)}, r"rows of 9 numbers do not fit a memory of 8"),
        ({"swapped.queue_scores": None}, r'"swapped.queue_scores" is nothing where \(36, 10\) is expected'),
        ({"swapped.queue_scores": torch.zeros(4, K)}, r"hand this objective's context\(\) to the student's forward"),
    ],
)
def test_outputs_that_do_not_fit_are_named(change: dict[str, Tensor | None], message: str) -> None:
    objective = build(queue=QUEUE, start=0)
    fill(objective)
    outputs = student(unit(CROPS * BATCH, DIM), objective) | change
    with pytest.raises(ValueError, match=message):
        objective.loss({key: value for key, value in outputs.items() if value is not None}, {}, INFO)


def test_steps_and_states_that_do_not_fit_are_named() -> None:
    objective = build(queue=QUEUE, start=0)
    rows = unit(CROPS * BATCH, DIM)
    with pytest.raises(ValueError, match=r"3 global crops and the objective codes for 2"):
        objective.loss(student(rows, objective), {}, replace(INFO, student_globals=3))
    alone = SwappedObjective(SwappedConfig(queue=0), DIM, prototypes=K, crops=1, seed=0, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"leave no pair to compare"):
        alone.loss(student(rows, alone), {}, replace(INFO, batch=24, student_crops=1, student_globals=1))
    many = StepInfo(batch=24, student_crops=2, student_globals=2, teacher_crops=0, progress=1)
    with pytest.raises(ValueError, match=r"a step brings 24 rows but the memory holds 18"):
        objective.loss(student(unit(48, DIM), objective), {}, many)
    with pytest.raises(ValueError, match=r"swapped: the saved state has 'queue2.rows'"):
        objective.load({**objective.state(), "queue2.rows": rows})
    with pytest.raises(ValueError, match="two prototypes"):
        SwappedObjective(SwappedConfig(), DIM, prototypes=1, seed=0)


def test_not_a_number_is_seen() -> None:
    objective = build(queue=QUEUE, start=0)
    rows = unit(CROPS * BATCH, DIM)
    rows[5] = torch.nan
    assert not bool(objective.loss(student(rows, objective), {}, INFO).finite())
