"""Dense contrast: a plain form from the paper, streamed against plain, and what a loss must not do."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gristmill.models.dense import DenseHead
from gristmill.models.student import init_weights
from gristmill.objectives import dense
from gristmill.objectives.correspondence import Matches
from gristmill.objectives.dense import DenseConfig, DenseObjective, dense_contrast, dense_contrast_reference, negatives
from gristmill.objectives.memory import RingMemory
from gristmill.objectives.protocol import Objective, StepInfo
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from . import plain_dense as plain


def unit(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype), dim=-1)


def geometry(rows: int, seed: int) -> Tensor:
    """Crops of an image of 100 x 80 pixels, half of them mirrored: [rows, 2, 3]."""
    draws = np.random.default_rng(seed)
    maps = np.zeros((rows, 2, 3))
    maps[:, [0, 1], [0, 1]] = draws.uniform(0.8, 2.0, (rows, 2))
    maps[:, :, 2] = draws.uniform(0, 30, (rows, 2))
    maps[::2, 0, 2] += maps[::2, 0, 0] * 31
    maps[::2, 0, 0] *= -1
    return torch.from_numpy(maps).float()


def made(batch: int, globals_: int, teachers: int, side: int, seed: int) -> tuple[dict, dict, StepInfo]:
    """Outputs of both networks with related features, in float64, and their step; the student has a local crop more."""
    base = unit(batch, side * side, 5, seed=seed)
    student = {
        "dense": unit(globals_ * batch, side * side, 4, seed=seed + 1),
        "dense.features": F.normalize(base.repeat(globals_, 1, 1) + 0.4 * unit(globals_ * batch, 1, 5, seed=seed + 2)),
    }
    teacher = {
        "dense": unit(teachers * batch, side * side, 4, seed=seed + 3),
        "dense.features": F.normalize(base.flip(1).repeat(teachers, 1, 1) + 0.4 * unit(1, 1, 5, seed=seed + 4)),
        "dense.pooled": unit(teachers * batch, 4, seed=seed + 5),
    }
    for side_ in (student, teacher):
        side_["dense.features"] = F.normalize(side_["dense.features"], dim=2)
    info = StepInfo(
        batch=batch,
        student_crops=globals_ + 1,
        student_globals=globals_,
        teacher_crops=teachers,
        same_views=globals_ == teachers == 2,
        student_geometry=geometry(globals_ * batch, seed),
        teacher_geometry=geometry(teachers * batch, seed + 50),
        global_size=32,
        teacher_size=32,
    )
    return student, teacher, info


@given(
    batch=st.integers(1, 3),
    crops=st.sampled_from([(1, 1), (2, 2), (1, 2), (2, 1)]),
    side=st.integers(1, 3),
    how=st.sampled_from([("features", None), ("features", 0.6), ("mutual", None), ("mutual", 0.6), ("geometry", None)]),
    temperature=st.sampled_from([0.05, 0.2, 1.0]),
    seed=st.integers(0, 100),
)
@settings(max_examples=60, deadline=None)
def test_it_is_the_papers_loss(
    batch: int, crops: tuple[int, int], side: int, how: tuple[Any, float | None], temperature: float, seed: int
) -> None:
    student, teacher, info = made(batch, *crops, side, seed)
    config = DenseConfig(queue=20, temperature=temperature, correspondence=how[0], min_similarity=how[1])
    objective = DenseObjective(config, 4, seed=seed, dtype=torch.float64)
    parts = {
        who: [part.numpy() for part in outs["dense.features"].chunk(count)]
        for who, outs, count in (("student", student, crops[0]), ("teacher", teacher, crops[1]))
    }
    assert info.student_geometry is not None
    assert info.teacher_geometry is not None
    maps = info.student_geometry.double().numpy(), info.teacher_geometry.double().numpy()

    def match(i: int, j: int, image: int) -> plain.Places:
        if how[0] == "geometry":
            pair = maps[0][j * batch + image], maps[1][i * batch + image]
            return plain.by_geometry(*pair, (32, 32), (side, side))
        pair = parts["student"][j][image], parts["teacher"][i][image]
        return plain.by_features(*pair, mutual=how[0] == "mutual", least=how[1])

    wanted = plain.dense_loss(
        [part.numpy() for part in student["dense"].chunk(crops[0])],
        [part.numpy() for part in teacher["dense"].chunk(crops[1])],
        match,
        objective.queue.rows.numpy(),
        temperature,
        info.same_views,
    )
    found = objective.loss(student, teacher, info)
    assert float(found.loss) == pytest.approx(wanted, rel=1e-10, abs=1e-10)


@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 9)),
    capacity=st.integers(1, 40),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_streamed_equals_plain(shape: tuple[int, int, int], capacity: int, seed: int) -> None:
    """Value and gradient, with some matches left out, and all of an image's."""
    batch, asked, answers = shape
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(answers, (batch, asked), generator=generator)
    kept = torch.rand(batch, asked, generator=generator) < 0.6
    matches = Matches(index, kept)
    keys, queue = unit(batch, answers, 6, seed=seed + 1), unit(capacity, 6, seed=seed + 2)
    losses, gradients = [], []
    for streamed in (False, True):
        queries = unit(batch, asked, 6, seed=seed).requires_grad_()
        if streamed:
            lse, top = negatives(queries, queue, 0.2)
            loss = dense_contrast(queries, keys, matches, lse, top, 0.2).loss
        else:
            loss = dense_contrast_reference(queries, keys, matches, queue, 0.2)
        losses.append(loss.detach())
        gradients += torch.autograd.grad(loss, queries)
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-11, atol=1e-11)


class Largest(TorchDispatchMode):
    """The most numbers that a tensor made inside has."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self.numbers = max(self.numbers, tensor.untyped_storage().nbytes() // tensor.element_size())
        return out


def test_many_places_meet_the_queue_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    queries, queue = unit(3, 7, 5, seed=0), unit(9, 5, seed=1)
    logits = queries @ queue.T / 0.2
    for together in (1, 4, 21, 100):
        monkeypatch.setattr(dense, "QUERIES", together)
        lse, top = negatives(queries, queue, 0.2)
        torch.testing.assert_close(lse, logits.logsumexp(2))
        torch.testing.assert_close(top, logits.amax(2))


def test_no_logits_of_all_places_exist() -> None:
    student, teacher, info = made(8, 2, 2, 7, 0)
    objective = DenseObjective(DenseConfig(queue=16384), 4, seed=0, dtype=torch.float64)
    for outs in (student, teacher):
        outs["dense"] = outs["dense"].requires_grad_(outs is student)
    with Largest() as seen:
        objective.loss(student, teacher, info).loss.backward()
    assert seen.numbers < 2 * 8 * 49 * 16384 / 8


def test_an_image_weighs_the_same_on_any_number_of_ranks() -> None:
    """Halves of a batch, averaged, are the whole, also where some matches are left out."""
    for how in ("features", "mutual", "geometry"):
        student, teacher, info = made(4, 2, 2, 3, 7)
        objective = DenseObjective(DenseConfig(queue=20, correspondence=how), 4, seed=0, dtype=torch.float64)
        whole = objective.loss(student, teacher, info)
        halves = []
        for half in (slice(0, 2), slice(2, 4)):

            def mine(rows: Tensor | None, half: slice = half) -> Tensor:
                assert rows is not None
                return rows.unflatten(0, (2, 4))[:, half].flatten(0, 1)

            part = StepInfo(
                *(2, 3, 2, 2),
                same_views=True,
                global_size=32,
                teacher_size=32,
                student_geometry=mine(info.student_geometry),
                teacher_geometry=mine(info.teacher_geometry),
            )
            ours, theirs = ({k: mine(v) for k, v in outs.items()} for outs in (student, teacher))
            halves.append(objective.loss(ours, theirs, part))
        torch.testing.assert_close(torch.stack([o.loss for o in halves]).mean(), whole.loss)
        gathered = torch.cat([o.commit["keys"] for o in halves])
        assert torch.equal(gathered, whole.commit["keys"])


def test_the_queue_gets_one_vector_an_image_view_by_view() -> None:
    student, teacher, info = made(3, 2, 2, 2, 1)
    objective = DenseObjective(DenseConfig(queue=16), 4, seed=0, dtype=torch.float64)
    outcome = objective.loss(student, teacher, info)
    before = objective.queue.rows.clone()
    assert objective.queue.pointer == 0
    objective.commit(outcome)
    assert torch.equal(objective.queue.rows[:6], teacher["dense.pooled"])
    assert torch.equal(objective.queue.rows[6:], before[6:])
    for _ in range(2):  # 18 rows in a ring of 16: the official code asserts that the batch divides the queue
        objective.commit(outcome)
    assert objective.queue.pointer == 2
    assert torch.equal(objective.queue.rows[:2], teacher["dense.pooled"][4:])


def test_keys_of_the_step_are_no_negatives_of_it() -> None:
    """The loss sees the queue as it was, and has no side effect; its logs and rows have no graph."""
    student, teacher, info = made(3, 2, 2, 3, 2)
    student["dense"].requires_grad_()
    teacher["dense"].requires_grad_()
    objective = DenseObjective(DenseConfig(queue=20), 4, seed=0, dtype=torch.float64)
    assert isinstance(objective, Objective)
    before = objective.state()
    first = objective.loss(student, teacher, info)
    assert all(torch.equal(before[key], value) for key, value in objective.state().items())
    assert torch.equal(first.loss, objective.loss(student, teacher, info).loss)
    first.loss.backward()
    assert student["dense"].grad is not None
    assert teacher["dense"].grad is None
    tensors = [v for v in (*first.logs.values(), *first.commit.values()) if isinstance(v, Tensor)]
    assert tensors
    assert not any(tensor.requires_grad for tensor in tensors)
    objective.commit(first)
    assert not torch.equal(first.loss, objective.loss(student, teacher, info).loss)


def test_before_start_it_counts_nothing_but_fills_the_queue() -> None:
    """The official hook holds lambda at 0; heads get gradients of zero, so that every step looks alike to an engine."""
    student, teacher, info = made(3, 2, 2, 3, 3)
    student["dense"].requires_grad_()
    objective = DenseObjective(DenseConfig(queue=20, start=0.25), 4, seed=0, dtype=torch.float64)
    assert (objective.factor(0.249), objective.factor(0.25)) == (0.0, 1.0)
    early = objective.loss(student, teacher, info)
    early.loss.backward()
    assert float(early.loss.detach()) == 0
    assert student["dense"].grad is not None
    assert not student["dense"].grad.any()
    objective.commit(early)
    assert objective.queue.pointer == 6
    late = objective.loss(student, teacher, StepInfo(**{**vars(info), "progress": 0.25}))
    assert float(late.loss.detach()) > 1
    assert early.logs["dense/factor"] == 0
    assert late.logs["dense/factor"] == 1


def test_crops_that_are_the_same_are_not_compared() -> None:
    student, teacher, info = made(2, 2, 2, 2, 4)
    objective = DenseObjective(DenseConfig(queue=20), 4, seed=0, dtype=torch.float64)
    cross = objective.loss(student, teacher, info).loss
    every = objective.loss(student, teacher, StepInfo(**{**vars(info), "same_views": False})).loss
    alone = []
    for i in range(2):
        part = StepInfo(**{**vars(info), "teacher_crops": 1, "student_globals": 1, "same_views": False})
        part = StepInfo(**{**vars(part), "student_geometry": None, "teacher_geometry": None})
        ours, theirs = ({key: rows.chunk(2)[i] for key, rows in outs.items()} for outs in (student, teacher))
        alone.append(objective.loss(ours, theirs, part).loss)
    torch.testing.assert_close(every, (2 * cross + alone[0] + alone[1]) / 4)


def test_logs_tell_what_the_matches_are_like() -> None:
    """Features that are the places' own numbers: matched by position, whatever the crops show (the leak in a ViT)."""
    batch, places = 2, 16
    leak = torch.eye(places).repeat(batch, 1, 1)
    rows = unit(batch, places, 4, seed=0, dtype=torch.float32)
    student = {"dense": rows, "dense.features": leak}
    teacher = {"dense": rows, "dense.features": leak, "dense.pooled": rows.mean(1)}
    plainly = torch.tensor([[[1.0, 0, 0], [0, 1.0, 0]]]).repeat(batch, 1, 1)
    mirrored = torch.tensor([[[-1.0, 0, 31], [0, 1.0, 0]]]).repeat(batch, 1, 1)
    objective = DenseObjective(DenseConfig(queue=8), 4, seed=0)
    for maps, correct in ((plainly, 1.0), (mirrored, 0.5)):  # columns 1 and 2 of 4 lie one apart when mirrored
        info = StepInfo(
            *(batch, 1, 1, 1), student_geometry=plainly, teacher_geometry=maps, global_size=32, teacher_size=32
        )
        logs = objective.loss(student, teacher, info).logs
        assert float(logs["dense/same_place"]) == 1
        assert float(logs["dense/matched"]) == 1
        assert float(logs["dense/overlap"]) == 1
        assert float(logs["dense/match_similarity"]) == pytest.approx(1)
        assert float(logs["dense/correct"]) == correct
        # 4 corners reach 4 of 16 cells, 8 sides 6, 4 inner ones 9.
        assert float(logs["dense/correct_by_chance"]) == pytest.approx((4 * 4 + 8 * 6 + 4 * 9) / 16 / 16)
        assert float(logs["dense/positive_similarity"]) == pytest.approx(1)
    own = DenseObjective(DenseConfig(queue=8, correspondence="geometry"), 4, seed=0).loss(student, teacher, info).logs
    assert "dense/correct" not in own  # it would be 1 whatever happens
    without = objective.loss(student, teacher, StepInfo(batch, 1, 1, 1)).logs
    assert "dense/correct" not in without
    assert "dense/same_place" in without


def test_state_comes_back() -> None:
    student, teacher, info = made(3, 2, 2, 2, 5)
    config = DenseConfig(queue=20)
    first = DenseObjective(config, 4, seed=0, dtype=torch.float64)
    first.commit(first.loss(student, teacher, info))
    second = DenseObjective(config, 4, seed=1, dtype=torch.float64)
    second.load(first.state())
    assert torch.equal(first.loss(student, teacher, info).loss, second.loss(student, teacher, info).loss)
    first.commit(first.loss(student, teacher, info))
    second.commit(second.loss(student, teacher, info))
    assert all(torch.equal(value, second.state()[key]) for key, value in first.state().items())
    with pytest.raises(ValueError, match=r"dense.queue.rows"):
        DenseObjective(DenseConfig(queue=24), 4, seed=0, dtype=torch.float64).load(first.state())
    with pytest.raises(ValueError, match="centre"):
        first.load({**first.state(), "centre.rows": torch.zeros(1)})


def test_its_queue_is_not_that_of_whole_images() -> None:
    objective = DenseObjective(DenseConfig(queue=16), 8, seed=0)
    other = RingMemory(16, 8, seed=0, unit=True, name="instance.queue")
    assert not torch.equal(objective.queue.rows, other.rows)
    again = DenseObjective(DenseConfig(queue=16), 8, seed=0)
    assert torch.equal(objective.queue.rows, again.queue.rows)


def test_bad_input_is_refused_with_a_name() -> None:
    student, teacher, info = made(2, 2, 2, 2, 6)
    objective = DenseObjective(DenseConfig(queue=20), 4, seed=0, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"student gives no 'dense', only dense.features"):
        objective.loss({"dense.features": student["dense.features"]}, teacher, info)
    with pytest.raises(ValueError, match=r"teacher gives no 'dense.features'"):
        objective.loss(student, {k: v for k, v in teacher.items() if k != "dense.features"}, info)
    with pytest.raises(ValueError, match=r"teacher gives no 'dense.pooled'"):
        objective.loss(student, {k: v for k, v in teacher.items() if k != "dense.pooled"}, info)
    with pytest.raises(ValueError, match="do not come from one batch"):
        objective.loss({**student, "dense": student["dense"][:3]}, teacher, info)
    with pytest.raises(ValueError, match="one head for both"):
        objective.loss({**student, "dense": student["dense"][..., :3]}, teacher, info)
    with pytest.raises(ValueError, match="memory holds 3"):
        DenseObjective(DenseConfig(queue=3), 4, seed=0, dtype=torch.float64).loss(student, teacher, info)
    lost = StepInfo(**{**vars(info), "student_geometry": None})
    with pytest.raises(ValueError, match=r"student_geometry.*correspondence: features"):
        DenseObjective(DenseConfig(queue=20, correspondence="geometry"), 4, seed=0).loss(student, teacher, lost)
    one = StepInfo(**{**vars(info), "student_globals": 1, "student_crops": 1, "teacher_crops": 1})
    ours, theirs = ({key: rows.chunk(2)[0] for key, rows in outs.items()} for outs in (student, teacher))
    with pytest.raises(ValueError, match="no pair to compare"):
        objective.loss(ours, theirs, one)


def test_config_is_strict() -> None:
    assert DenseConfig() == DenseConfig(queue=65536, temperature=0.2, correspondence="features", start=0)
    wrong: dict[str, Any]
    for wrong in ({"queue": 0}, {"temperature": 0}, {"correspondence": "random"}, {"start": 2}, {"grid": 7}):
        with pytest.raises(ValidationError):
            DenseConfig(**wrong)
    with pytest.raises(ValidationError, match="leave it out"):
        DenseConfig(correspondence="geometry", min_similarity=0.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_outputs_are_taken_up_in_full(dtype: torch.dtype) -> None:
    student, teacher, info = made(3, 2, 2, 3, 8)
    objective = DenseObjective(DenseConfig(queue=20), 4, seed=0)
    low = [{key: rows.to(dtype) for key, rows in outs.items()} for outs in (student, teacher)]
    exact = [{key: rows.float() for key, rows in outs.items()} for outs in low]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = objective.loss(low[0], low[1], info)
    wanted = objective.loss(exact[0], exact[1], info)
    assert found.loss.dtype == torch.float32
    assert found.commit["keys"].dtype == torch.float32
    torch.testing.assert_close(found.loss, wanted.loss, rtol=1e-6, atol=1e-6)


def learn(rate: float) -> float:
    """Accuracy after 30 steps of a head alone, on maps whose places are told apart by content."""
    generator = torch.Generator().manual_seed(0)
    head, teacher_head = DenseHead(12, 32, 8), DenseHead(12, 32, 8)
    init_weights(head, 0, "dense", default_linear=True)
    teacher_head.load_state_dict(head.state_dict())
    objective = DenseObjective(DenseConfig(queue=64), 8, seed=0)
    optimizer = torch.optim.SGD(head.parameters(), lr=rate, momentum=0.9)
    accuracies = []
    for _ in range(30):
        maps = torch.randn(8, 9, 12, generator=generator)
        order = torch.randperm(9, generator=generator)
        noisy = maps[:, order] + 0.5 * torch.randn(8, 9, 12, generator=generator)
        rows, features, _ = head(maps, (3, 3))
        with torch.no_grad():
            found = teacher_head(noisy, (3, 3))
        keys = {"dense": found.rows, "dense.features": found.features, "dense.pooled": found.pooled}
        outcome = objective.loss({"dense": rows, "dense.features": features}, keys, StepInfo(8, 1, 1, 1))
        optimizer.zero_grad()
        outcome.loss.backward()
        optimizer.step()
        for slow, fast in zip(teacher_head.parameters(), head.parameters(), strict=True):
            slow.data.lerp_(fast.data, 0.1)
        objective.commit(outcome)
        accuracies.append(float(outcome.logs["dense/accuracy"]))
    return float(np.mean(accuracies[-5:]))


def test_a_head_learns_to_match() -> None:
    assert learn(0.5) > learn(0.0) + 0.1
