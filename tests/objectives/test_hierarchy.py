"""HCSC against its formulas, each switch with the masks that it draws; what it remembers, and what it refuses."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gristmill.objectives.bernoulli import keyed, uniform_block
from gristmill.objectives.concentration import concentration
from gristmill.objectives.hierarchy import HierarchyConfig, HierarchyObjective
from gristmill.objectives.protocol import Objective, Outcome, StepInfo
from gristmill.objectives.tree import grow
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from .plain_hierarchy import Given, concentrations, instance_stays, prototype_stays, total


@settings(max_examples=60)
@given(st.integers(1, 9), st.lists(st.tuples(st.integers(0, 8), st.floats(0, 4)), min_size=1, max_size=40))
def test_concentration_is_the_formula_and_never_nan(k: int, rows: list[tuple[int, float]]) -> None:
    numbers, squared = [n % k for n, _ in rows], [d for _, d in rows]
    found = concentration(torch.tensor(squared, dtype=torch.float64), torch.tensor(numbers), k, temperature=0.2)
    wanted = concentrations(squared, numbers, k, 0.2, 10.0)
    if any(map(math.isnan, wanted)):  # nobody has two members apart: the official code goes wrong here
        assert found.tolist() == [pytest.approx(0.2)] * k
    else:
        assert found.tolist() == pytest.approx(wanted, rel=1e-9)
    assert float(found.mean()) == pytest.approx(0.2)


def clustered(count: int, dim: int = 8, groups: int = 40, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(groups, dim, generator=generator)
    return F.normalize(
        centres[torch.arange(count) % groups] + 0.3 * torch.randn(count, dim, generator=generator), dim=1
    )


def test_a_cluster_an_image_is_no_division_by_zero() -> None:
    """Where the official code gives NaN and falls back to plain InfoNCE without a word."""
    rows = clustered(12)
    growth = grow(rows, (12, 12, 5), temperature=0.2)
    assert torch.equal(growth.tree.phi[0], torch.full((12,), 0.2))
    assert all(torch.isfinite(phi).all() for phi in growth.tree.phi)


def small(dtype: torch.dtype = torch.float64, **config: Any) -> HierarchyObjective:
    config = {"queue": 48, "levels": (12, 7, 3), "warmup": 0.0, **config}
    return HierarchyObjective(HierarchyConfig(**config), 8, seed=3, images=120, dtype=dtype)


def step(views: int = 3, batch: int = 6, seed: int = 0, **info: Any) -> tuple[Tensor, Tensor, StepInfo]:
    rows = clustered((views + 1) * batch, seed=seed).double()
    given: dict[str, Any] = {"index": torch.arange(batch) * 7, "images": 120, "progress": 0.5, **info}
    shape: dict[str, Any] = {"batch": batch, "student_crops": views, "student_globals": 1, "teacher_crops": 1}
    return rows[: views * batch], rows[views * batch :], StepInfo(**{**shape, **given})


SWITCHES = [
    {}, {"masked": "remove"}, {"negatives": "all"}, {"exclusion_batch": 2}, {"selection_on_local": False},
    {"instance_selection": False}, {"prototype_selection": False}, {"instance_levels": "mean", "prototype_levels": "sum"},
    {"local_crops": "mean"}, {"instance_weight": 0.0}, {"prototype_weight": 0.0}, {"instance_weight": 0.3, "prototype_weight": 2.0},
    {"levels": (20,)}, {"levels": (16, 9, 9, 2)}, {"selection_temperature": 0.07}, {"selection_temperature": 0.1, "masked": "remove"},
]  # fmt: skip


@pytest.mark.parametrize("config", SWITCHES, ids=str)
def test_each_switch_is_the_formula_with_its_own_draws(config: dict[str, Any]) -> None:
    """The masks that the objective draws, drawn here again from its probabilities, put into the plain form."""
    objective = small(**config)
    queries, keys, info = step()
    objective.refresh(clustered(120).double(), info)
    assert objective.table is not None
    lineage = objective.tree.lineage(objective.table[info.index].long())
    levels, views, made = len(objective.config.levels), 3, HierarchyConfig(**{**objective.config.model_dump()})
    plain = Given(queries.view(views, 6, 8), keys, objective.queue.rows, objective.tree, lineage)
    assert info.index is not None
    key = keyed(objective.seed, f"hierarchy/{info.position}")
    drawn = uniform_block(key, info.index, range(levels), 0, 48)
    protos = []
    for level in range(levels - 1):
        k = objective.config.levels[level]
        u = uniform_block(key, info.index, [(v + 1) << 8 | level for v in range(views)], 0, k)
        protos.append(u < prototype_stays(plain, made, level))
    plain = plain._replace(instance=drawn < instance_stays(plain, made), prototype=protos)
    rows = queries.clone().requires_grad_()
    other = queries.clone().requires_grad_()
    outcome = objective.loss({"hierarchy": rows}, {"hierarchy": keys}, info)
    wanted = total(plain._replace(queries=other.view(views, 6, 8)), made)
    torch.testing.assert_close(outcome.loss, wanted, rtol=1e-10, atol=1e-10)
    outcome.loss.backward()
    wanted.backward()
    torch.testing.assert_close(rows.grad, other.grad, rtol=1e-9, atol=1e-10)
    if objective.config.selection_temperature and levels > 1:
        assert outcome.logs["hierarchy/instance_dropped"] > 0.01


def test_official_exclusion_depends_on_the_forward_and_a_fixed_group_does_not() -> None:
    """Section 3, HCSC 5: so the one is declared, the other equal on any number of ranks."""
    queries, keys, info = step(views=1, batch=8)
    found = {}
    for group in (None, 4):
        objective = small(exclusion_batch=group)
        objective.refresh(clustered(120).double(), info)
        whole = objective.loss({"hierarchy": queries}, {"hierarchy": keys}, info).loss
        halves = []
        for rank in range(2):
            part = slice(rank * 4, rank * 4 + 4)
            assert info.index is not None
            mine = StepInfo(
                batch=4, student_crops=1, student_globals=1, teacher_crops=1, index=info.index[part], images=120,
                progress=0.5, rank=rank, world=2,
            )  # fmt: skip
            halves.append(objective.loss({"hierarchy": queries[part]}, {"hierarchy": keys[part]}, mine).loss)
        found[group] = abs(float(whole - torch.stack(halves).mean()))
        assert objective.config.over_ranks_batch == (group is None)
    assert found[4] < 1e-12 < 1e-3 < found[None]
    assert not HierarchyConfig(negatives="all").over_ranks_batch
    assert HierarchyConfig().needs_table
    assert not HierarchyConfig(assign="stream").needs_table


def test_two_teacher_crops_meet_each_others_images() -> None:
    """Mugs' views: crops 0 and 1 are both networks', each key meets the other global crop and all local ones."""
    objective = small()
    rows = clustered(6 * 5).double()
    queries, keys = rows, clustered(12, seed=4).double()
    shape: dict[str, Any] = {
        "batch": 6,
        "student_globals": 1,
        "teacher_crops": 1,
        "student_crops": 4,
        "index": torch.arange(6),
        "images": 120,
    }
    objective.refresh(clustered(120).double(), StepInfo(**shape, progress=0.5))
    info = StepInfo(
        **{**shape, "student_crops": 5, "student_globals": 2, "teacher_crops": 2}, progress=0.5, same_views=True
    )
    symmetric = objective.loss({"hierarchy": queries}, {"hierarchy": keys}, info).loss
    no_masks = small(instance_keep=(1, 1), prototype_keep=(1, 1))
    no_masks.load(objective.state())
    whole = no_masks.loss({"hierarchy": queries}, {"hierarchy": keys}, info).loss
    parts = []
    for i in range(2):
        own = queries.view(5, 6, 8)[[1 - i, 2, 3, 4]].flatten(0, 1)
        one = StepInfo(**shape, progress=0.5)
        parts.append(no_masks.loss({"hierarchy": own}, {"hierarchy": keys[6 * i : 6 * i + 6]}, one).loss)
    torch.testing.assert_close(whole, torch.stack(parts).mean(), rtol=1e-12, atol=1e-12)
    assert symmetric < whole  # what is dropped lowers the loss


def test_loss_has_no_side_effect_and_logs_no_graph() -> None:
    objective = small()
    queries, keys, info = step()
    objective.refresh(clustered(120).double(), info)
    before = objective.state()
    outcome = objective.loss({"hierarchy": queries.requires_grad_()}, {"hierarchy": keys}, info)
    assert isinstance(objective, Objective)
    assert all(torch.equal(before[key], tensor) for key, tensor in objective.state().items())
    assert not any(isinstance(v, Tensor) and v.requires_grad for v in outcome.logs.values())
    assert {
        "loss/hierarchy",
        "hierarchy/instance",
        "hierarchy/prototype",
        "hierarchy/instance_dropped",
    } <= outcome.logs.keys()
    assert torch.equal(objective.loss({"hierarchy": queries}, {"hierarchy": keys}, info).loss, outcome.loss)


def test_scores_of_the_queue_follow_it() -> None:
    """Only what was enqueued is scored anew; it is what scoring everything would give."""
    objective = small()
    for number in range(12):
        queries, keys, info = step(seed=number)
        if number == 3:
            objective.refresh(clustered(120).double(), info)
        objective.commit(objective.loss({"hierarchy": queries}, {"hierarchy": keys}, info))
    torch.testing.assert_close(objective.scores, objective.levels.score(objective.queue.rows), rtol=1e-12, atol=1e-12)


def test_warm_up_is_info_nce_and_a_clustering_is_asked_for_when_it_ends() -> None:
    objective = small(warmup=0.1, every=240)
    queries, keys, _ = step()

    def at(position: int) -> StepInfo:
        return step(position=position, progress=position / 2400)[2]

    assert not objective.stale(at(239))
    early = objective.loss({"hierarchy": queries}, {"hierarchy": keys}, at(0))
    assert early.logs["hierarchy/ramp"] == 0.0
    assert objective.stale(at(240))
    objective.refresh(clustered(120).double(), at(240))
    assert not objective.stale(at(479))
    assert objective.stale(at(480))
    late = objective.loss({"hierarchy": queries}, {"hierarchy": keys}, at(246))
    assert late.logs["hierarchy/ramp"] == 1.0
    assert late.loss > 2 * early.loss  # the official jump from one instance term to three


def test_images_that_could_not_be_read_belong_to_no_cluster_until_a_key_says() -> None:
    objective = small()
    rows = clustered(120).double()
    rows[[7, 14]] = 0.0
    queries, keys, info = step()
    objective.refresh(rows, info)
    assert objective.table is not None
    assert (objective.table < 0).nonzero().flatten().tolist() == [7, 14]
    lineage = objective._lineage(keys, info)
    assert torch.equal(lineage[0, 1:3], objective.tree.assign(keys)[1:3])
    assert torch.equal(lineage[0, [0, 3]], objective.table[torch.tensor([0, 21])].long())
    assert torch.isfinite(objective.loss({"hierarchy": queries}, {"hierarchy": keys}, info).loss)


def test_an_epoch_is_of_the_images_that_come() -> None:
    """Those that a filter leaves out have zero rows in a pass over the data; after a resume, too."""
    objective, again = small(), small()
    objective.refresh(F.pad(clustered(80), (0, 0, 0, 40)), step(position=600)[2])
    again.load(objective.state())
    for each in (objective, again):
        assert not each.stale(step(position=679)[2])
        assert each.stale(step(position=680)[2])


@pytest.mark.parametrize("form", ["table", "stream"])
def test_state_carries_everything(form: str) -> None:
    """After a round trip through tensors, the same losses bit for bit, clusterings included."""
    config = {"assign": form, "memory": 60, "every": 24, "ramp": 0.1} if form == "stream" else {"every": 24}

    def go(objective: HierarchyObjective, numbers: range) -> list[float]:
        losses = []
        for number in numbers:
            queries, keys, info = step(seed=number, position=6 * number, progress=number / 40)
            if objective.stale(info):
                objective.refresh(clustered(120, seed=number).float(), info)
            outcome = objective.loss({"hierarchy": queries.float()}, {"hierarchy": keys.float()}, info)
            objective.commit(outcome)
            after = step(position=6 * number + 6, progress=(number + 1) / 40)[2]
            objective.refit(after)
            losses.append(float(outcome.loss))
        return losses

    whole = go(small(torch.float32, **config), range(30))
    first, second = small(torch.float32, **config), small(torch.float32, **config)
    losses = go(first, range(17))
    assert first.last > 0
    second.load({key: tensor.clone() for key, tensor in first.state().items()})
    assert losses + go(second, range(17, 30)) == whole


def test_foreign_state_is_refused_and_nothing_changes() -> None:
    objective, other = small(), small(levels=(12, 7, 4))
    before = objective.state()
    with pytest.raises(ValueError, match=r"hierarchy.*means\.2"):
        objective.load(other.state())
    with pytest.raises(ValueError, match="expected"):
        objective.load({key: tensor for key, tensor in before.items() if key != "table"})
    stream = small(assign="stream", memory=60)
    was, shorter = stream.state(), small(assign="stream", memory=50)
    shorter.queue.rows += 1
    with pytest.raises(ValueError, match=r"hierarchy\.memory\.rows"):
        stream.load(shorter.state())
    assert all(torch.equal(was[key], tensor) for key, tensor in stream.state().items())
    assert all(torch.equal(before[key], tensor) for key, tensor in objective.state().items())


def test_bad_input_is_named() -> None:
    queries, keys, info = step()
    sides = {"hierarchy": queries}, {"hierarchy": keys}
    with pytest.raises(ValueError, match="100 images cannot make 3000 prototypes"):
        HierarchyObjective(HierarchyConfig(), 8, seed=0, images=100)
    with pytest.raises(ValidationError, match="must not grow"):
        HierarchyConfig(levels=(10, 20))
    with pytest.raises(ValidationError, match="2000 keys cannot make 3000"):
        HierarchyConfig(assign="stream", memory=2000)
    with pytest.raises(ValidationError, match="greater than or equal to 2"):  # one prototype tells nobody apart
        HierarchyConfig(levels=(10, 1))
    with pytest.raises(ValidationError, match="both are 0"):
        HierarchyConfig(instance_weight=0.0, prototype_weight=0.0)
    with pytest.raises(ValidationError, match="is no range"):
        HierarchyConfig(instance_keep=(0.9, 0.1))
    with pytest.raises(ValidationError, match="level"):
        HierarchyConfig(level=3)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="exclusion_batch 4 does not divide the 6 images"):
        small(exclusion_batch=4).loss(*sides, info)
    with pytest.raises(ValueError, match=r"hierarchy\.queue: a step brings 6 rows"):
        small(queue=5).loss(*sides, info)
    objective = small()
    with pytest.raises(ValueError, match="119 rows to cluster, wanted 120"):
        objective.refresh(clustered(119), info)
    with pytest.raises(ValueError, match="3 rows cannot make 12 clusters"):
        objective.refresh(F.pad(clustered(3), (0, 0, 0, 117)), info)
    objective.refresh(clustered(120), info)
    with pytest.raises(ValueError, match="the step has no index"):
        objective.loss(*sides, step(index=None)[2])
    with pytest.raises(ValueError, match="do not fit 6 of a data set of 120"):
        objective.loss(*sides, step(index=torch.arange(6) * 100)[2])
    one = StepInfo(batch=6, student_crops=3, student_globals=1, teacher_crops=1, same_views=True, index=torch.arange(6))
    with pytest.raises(ValueError, match="only global crop is the teacher's own"):
        objective.loss(*sides, one)


def test_half_precision_outputs_are_taken_up_in_full() -> None:
    objective = small(torch.float32)
    queries, keys, info = step()
    objective.refresh(clustered(120), info)
    low = {"hierarchy": queries.bfloat16()}, {"hierarchy": keys.bfloat16()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outcome = objective.loss(*low, info)
    full = objective.loss({"hierarchy": low[0]["hierarchy"].float()}, {"hierarchy": low[1]["hierarchy"].float()}, info)
    assert torch.equal(outcome.loss, full.loss)
    assert isinstance(outcome, Outcome)
