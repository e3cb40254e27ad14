"""DeepCluster v2 against its formulas; when it clusters; equal bits on any number of ranks and after a resume."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gristmill.objectives.clusters import ClustersConfig, ClustersObjective
from gristmill.objectives.kmeans import first_rows
from gristmill.objectives.protocol import Objective, Outcome, StepInfo
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from .plain_swapped import clusters_loss, spherical_kmeans
from .test_swapped import on_ranks

IMAGES, CROPS, BATCH, DIM = 60, 3, 5, 6
THINGS = 4
EXACT: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-10}


def unit(*shape: int, seed: int = 0) -> Tensor:
    rows = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return F.normalize(rows, dim=-1)


def blobs(images: int = IMAGES, noise: float = 0.15, seed: int = 0) -> Tensor:
    """Unit rows [images, DIM] around as many directions as there are things, image i around i modulo their number."""
    centres = torch.eye(DIM, dtype=torch.float64)[:THINGS]
    draws = torch.randn(images, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return F.normalize(centres[torch.arange(images) % THINGS] + noise * draws, dim=1)


def build(dtype: torch.dtype = torch.float64, **config: Any) -> ClustersObjective:
    given = ClustersConfig(**{"prototypes": (4, 5, 4), **config})
    return ClustersObjective(given, DIM, images=IMAGES, seed=0, dtype=dtype)


def info(position: int = 0, index: Tensor | None = None, **more: Any) -> StepInfo:
    index = torch.arange(position, position + BATCH) % IMAGES if index is None else index
    shape = {"student_crops": CROPS, "student_globals": 2, "teacher_crops": 0, "images": IMAGES}
    return StepInfo(**{**shape, "batch": len(index), "position": position, "index": index, **more})


def ready(objective: ClustersObjective | None = None) -> ClustersObjective:
    objective = objective or build()
    objective.refresh(blobs().to(objective.memory.dtype), info())
    return objective


def step(objective: ClustersObjective, position: int, **more: Any) -> Outcome:
    """One step whose rows are drawn from its position, and all that comes after it; the position is then one further."""
    now = info(position, **more)
    rows = unit(CROPS * now.batch, DIM, seed=position + 1).to(objective.memory.dtype)
    outcome = objective.loss({"clusters": rows}, {}, now)
    objective.commit(outcome)
    outcome.logs |= objective.refit(replace(now, position=position + now.batch))
    return outcome


def test_it_is_an_objective_of_the_student_alone() -> None:
    assert isinstance(build(), Objective)
    assert not build().needs_teacher


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 999), batch=st.integers(1, 6), crops=st.integers(2, 4), temperature=st.floats(0.05, 1))
def test_loss_and_gradients_are_the_formulas(seed: int, batch: int, crops: int, temperature: float) -> None:
    objective = ready(build(temperature=temperature))
    index = torch.from_numpy(np.random.default_rng(seed).integers(0, IMAGES, batch))
    rows = unit(crops * batch, DIM, seed=seed).requires_grad_()
    outcome = objective.loss({"clusters": rows}, {}, info(index=index, student_crops=crops))
    labels = [[int(own[i]) for i in index] for own in objective.assignments]
    plain = clusters_loss(rows.view(crops, batch, DIM), objective.centroids, labels, temperature)
    torch.testing.assert_close(outcome.loss, plain, **EXACT)
    ours, theirs = (torch.autograd.grad(loss, rows) for loss in (outcome.loss, plain))
    torch.testing.assert_close(ours, theirs, **EXACT)


def test_clusters_are_those_of_plain_kmeans_on_each_crop_in_turn() -> None:
    objective = ready(build(iterations=3))
    objective.memory[1] = blobs(noise=0.3, seed=7)  # the second crop has rows of its own
    objective.refit(info(IMAGES))
    for head, k in enumerate(objective.config.prototypes):
        rows = objective.memory[(0, 1, 0)[head]]
        start = rows[first_rows(IMAGES, k, 0, f"clusters.{head}/{IMAGES}/0")]
        centroids, assignment = spherical_kmeans(rows, start, 3)
        torch.testing.assert_close(objective.centroids[head], centroids, **EXACT)
        assert objective.assignments[head].tolist() == assignment
    assert not torch.equal(objective.centroids[0], objective.centroids[2])  # heads start from other rows


def test_things_become_clusters_and_agreeing_crops_are_rewarded() -> None:
    objective = ready(build(prototypes=(THINGS,) * 6))
    things = torch.arange(IMAGES) % THINGS
    pure = [len(set(zip(things.tolist(), own.tolist(), strict=True))) == THINGS for own in objective.assignments]
    assert sum(pure) >= 2  # one start of k-means in several finds them all
    now = info(index=torch.arange(12))
    right = objective.loss({"clusters": blobs()[:12].repeat(CROPS, 1)}, {}, now).logs
    wrong = objective.loss({"clusters": blobs()[1:13].repeat(CROPS, 1)}, {}, now).logs
    assert float(right["clusters/accuracy"]) > 0.9 > 0.2 > float(wrong["clusters/accuracy"])
    assert float(right["loss/clusters"]) < 0.5 * math.log(THINGS) < float(wrong["loss/clusters"])
    assert float(right["clusters/positive_similarity"]) > 0.8


def test_the_memory_is_filled_once_and_clustered_every_epoch() -> None:
    objective = build()
    assert objective.stale(info())
    assert objective.refit(info(IMAGES)) == {}
    ready(objective)
    assert not objective.stale(info())
    assert objective.clustered == 0
    positions = []
    for position in range(0, 3 * IMAGES + 30, BATCH):
        logs = step(objective, position).logs
        assert float(logs["clusters/age"]) < IMAGES
        if "clusters/used" in logs:
            assert 0 < float(logs["clusters/used"]) <= 1
            assert 0 < float(logs["clusters/tightness"]) <= 1
            positions.append(position + BATCH)
    assert positions == [IMAGES, 2 * IMAGES, 3 * IMAGES]
    assert not objective.stale(info(3 * IMAGES))
    # Steps that do not land on the boundary cluster at the first one beyond it, also after one that was skipped.
    odd = ready(build(every=40))
    assert [p for p in range(7, 140, 7) if odd.refit(info(p))] == [42, 84, 126]


def test_an_epoch_later_the_memory_holds_every_images_last_rows() -> None:
    objective = ready(build(every=10**6))
    before = objective.memory.clone()
    for position in range(0, IMAGES, BATCH):
        step(objective, position)
    rows = [unit(CROPS * BATCH, DIM, seed=position + 1) for position in range(0, IMAGES, BATCH)]
    wanted = torch.cat([row.view(CROPS, BATCH, DIM)[:2] for row in rows], 1)
    assert torch.equal(objective.memory, wanted)
    assert not torch.equal(before, wanted)


def test_of_an_image_seen_twice_the_later_rows_stay() -> None:
    objective = ready()
    index = torch.tensor([3, 8, 3, 9, 8])
    before = objective.memory.clone()
    rows = unit(CROPS, 5, DIM)
    objective.commit(objective.loss({"clusters": rows.flatten(0, 1)}, {}, info(index=index)))
    for image, row in ((3, 2), (8, 4), (9, 3)):
        assert torch.equal(objective.memory[:, image], rows[:2, row])
    others = [i for i in range(IMAGES) if i not in (3, 8, 9)]
    assert torch.equal(objective.memory[:, others], before[:, others])


def test_images_left_out_are_in_no_cluster_and_have_no_label() -> None:
    """A pass over the data gives them zero rows. Clusters are those of the others alone; a step gives an image its row."""
    rows, left = blobs(), torch.arange(IMAGES) % 3 == 0
    objective, others = build(), ClustersObjective(ClustersConfig(prototypes=(4, 5, 4)), DIM, images=40, seed=0,
        dtype=torch.float64)  # fmt: skip
    objective.refresh(rows.masked_fill(left[:, None], 0.0), info())
    others.refresh(rows[~left], info(images=40))
    for ours, theirs in zip(objective.centroids, others.centroids, strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(objective.assignments[:, ~left], others.assignments)
    assert (objective.assignments[:, left] == -1).all()

    index = torch.tensor([1, 3, 2, 5])  # of which number 3 was left out
    seen = unit(CROPS * 4, DIM).requires_grad_()
    outcome = objective.loss({"clusters": seen}, {}, info(index=index))
    outcome.loss.backward()
    assert seen.grad is not None
    assert not seen.grad.view(CROPS, 4, DIM)[:, 1].any()
    some = seen.detach().view(CROPS, 4, DIM)[:, [0, 2, 3]].flatten(0, 1)
    without = objective.loss({"clusters": some}, {}, info(index=index[[0, 2, 3]]))
    torch.testing.assert_close(outcome.loss.detach(), without.loss * 3 / 4, **EXACT)
    for sign in ("accuracy", "positive_similarity"):
        torch.testing.assert_close(outcome.logs[f"clusters/{sign}"], without.logs[f"clusters/{sign}"], **EXACT)
    objective.commit(outcome)
    assert not objective.refit(info(39))
    assert objective.refit(info(40))  # an epoch of the images that come
    assert (objective.assignments[:, 3] >= 0).all()
    assert int((objective.assignments[0] < 0).sum()) == 19
    with pytest.raises(ValueError, match="3 rows cannot make 4 clusters"):
        build().refresh(F.pad(blobs()[:3], (0, 0, 0, IMAGES - 3)), info())


def run(rank: int, world: int, gather: Callable[[Tensor], Tensor] | None) -> dict[str, Tensor]:
    """Two epochs of global batches of six, of which each rank has its share; the state at the end."""
    objective, share = build(torch.float32), 6 // world
    objective.refresh(blobs().float(), info(rank=rank, world=world, gather=gather))
    for position in range(0, 2 * IMAGES, 6):
        index = (torch.arange(position, position + 6) * 7) % IMAGES
        rows = unit(CROPS, 6, DIM, seed=position + 1).float()[:, rank * share : (rank + 1) * share]
        now = info(
            position, index=index[rank * share : (rank + 1) * share], rank=rank, world=world, gather=gather
        )  # fmt: skip
        outcome = objective.loss({"clusters": rows.flatten(0, 1)}, {}, now)
        if gather:
            outcome.commit = {key: gather(tensor.contiguous()) for key, tensor in outcome.commit.items()}
        objective.commit(outcome)
        objective.refit(replace(now, position=position + 6))
    return objective.state()


@pytest.mark.parametrize("world", [2, 3])
def test_any_number_of_ranks_gives_the_same_bits(world: int) -> None:
    alone = run(0, 1, None)
    assert int(alone["clustered"]) == 2 * IMAGES
    for state in on_ranks(world, lambda rank, gather: run(rank, world, gather)):
        assert all(torch.equal(alone[key], tensor) for key, tensor in state.items())


def test_loss_changes_nothing_and_a_resumed_run_goes_on_bit_for_bit() -> None:
    ours, theirs = ready(), build()
    for position in range(0, 80, BATCH):
        step(ours, position)
    before = ours.state()
    outcome = ours.loss({"clusters": unit(CROPS * BATCH, DIM)}, {}, info(80))
    assert all(torch.equal(before[key], tensor) for key, tensor in ours.state().items())
    assert not any(isinstance(v, Tensor) and v.requires_grad for v in outcome.logs.values())
    theirs.load(before)
    for position in range(80, 160, BATCH):
        assert torch.equal(step(ours, position).loss, step(theirs, position).loss)
    assert all(torch.equal(ours.state()[key], tensor) for key, tensor in theirs.state().items())
    assert ours.clustered == 120


# What cannot work.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"index": None}, r"each of 60 images, and the step numbers none"),
        ({"images": 61}, r"the step has a data set of 61; .* does not grow \(stream.take_up: never\)"),
        ({"index": torch.tensor([0, 1, 2, 3, 60])}, r"image numbers are not 5 of 0 \.\.\. 59"),
        ({"index": torch.tensor([0, 1, 2, 3, -1])}, r"image numbers are not 5 of 0 \.\.\. 59"),
        ({"index": torch.arange(4)}, r"image numbers are not 5 of 0 \.\.\. 59"),
        ({"student_globals": 1}, r"1 global crops for a memory of 6 and 2"),
    ],
)
def test_steps_that_do_not_fit_are_named(change: dict[str, Any], message: str) -> None:
    now = replace(info(), **change)
    with pytest.raises(ValueError, match=message):
        ready().loss({"clusters": unit(CROPS * BATCH, DIM)}, {}, now)


def test_what_else_does_not_fit_is_named() -> None:
    with pytest.raises(ValueError, match=r"nothing is clustered yet; hand `refresh`"):
        build().loss({"clusters": unit(CROPS * BATCH, DIM)}, {}, info())
    with pytest.raises(ValueError, match=r"rows of 7 numbers"):
        ready().loss({"clusters": unit(CROPS * BATCH, 7)}, {}, info())
    with pytest.raises(ValueError, match=r"features \(59, 6\) of a pass over the data"):
        build().refresh(blobs()[1:], info())
    with pytest.raises(ValueError, match=r"60 images cannot make 61 clusters; lower objectives.clusters.prototypes"):
        build(prototypes=(4, 61))
    with pytest.raises(ValueError, match=r"clusters.memory: the saved state is \(2, 60, 6\) torch.float64"):
        build(torch.float32).load(ready().state())


def test_not_a_number_is_seen() -> None:
    rows = unit(CROPS * BATCH, DIM)
    rows[0] = torch.nan
    assert not bool(ready().loss({"clusters": rows}, {}, info()).finite())
