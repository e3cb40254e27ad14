"""HCSC against the numbers that its official code printed: losses, terms, gradients, probabilities, what follows from centroids."""

from pathlib import Path
from typing import Any

import pytest
import torch
from gristmill.objectives.concentration import concentration
from gristmill.objectives.hierarchy import HierarchyConfig, HierarchyObjective, Masks
from gristmill.objectives.kmeans import squared_distances
from gristmill.objectives.protocol import StepInfo
from gristmill.objectives.tree import Tree
from torch import Tensor

from .plain_hierarchy import Given, instance_stays, prototype_stays, terms, total

VECTORS = Path(__file__).parents[1] / "vectors"
NAMES = ["single", "single_noinst", "single_noproto", "single_noselect", "multi_local", "multi_nolocal"]
LEVELS = (30, 14, 6)


def read(name: str) -> dict[str, Any]:
    return torch.load(VECTORS / f"hcsc_{name}.pt", weights_only=True)


def official_tree(dtype: torch.dtype = torch.float32) -> tuple[Tree, Tensor]:
    """The recorded tree and each image's number on level 0."""
    vector = read("hkmeans")
    result = vector["result"]
    tree = Tree(
        [raw.to(dtype) for raw in vector["raw_centroids"]],
        [phi.to(dtype) for phi in result["density"]],
        result["cluster2cluster"],
        [int(table.max()) for table in result["im2cluster"]],
    )
    return tree, result["im2cluster"][0]


def official(
    name: str, **changed: Any
) -> tuple[dict, HierarchyObjective, StepInfo, dict[str, Tensor], dict[str, Tensor]]:
    vector = read(name)
    meta, views = vector["meta"], vector["q_views"]
    config = HierarchyConfig(
        queue=meta["K"], levels=LEVELS, temperature=meta["T"], selection_on_local=meta["selection_on_local"],
        instance_selection=meta["instance_selection"], prototype_selection=meta["proto_selection"], **changed,
    )  # fmt: skip
    objective = HierarchyObjective(config, 8, seed=0, images=600)
    objective.load({**objective.state(), "queue.rows": vector["state_before"]["queue"].T.contiguous()})
    count = len(vector["index"])
    info = StepInfo(
        batch=count, student_crops=len(views), student_globals=1, teacher_crops=1, index=vector["index"], images=600,
        progress=0.5, position=4096,
    )  # fmt: skip
    if not name.startswith("warmup"):
        plant(objective, info)
    student = {"hierarchy": torch.cat(views).requires_grad_()}
    teacher = {"hierarchy": vector["state_after"]["queue"].T[:count].contiguous()}
    return vector, objective, info, student, teacher


def plant(objective: HierarchyObjective, info: StepInfo) -> None:
    tree, numbers = official_tree(objective.queue.rows.dtype)
    objective.plant(tree, info)
    if objective.table is not None:
        objective.table.copy_(numbers)


def recorded(vector: dict[str, Any], objective: HierarchyObjective, info: StepInfo) -> Masks:
    """The official masks as ours are laid out. Theirs cover negatives alone, ours all prototypes of a level."""
    masks, meta = vector["bernoulli_masks"], vector["meta"]
    order = []  # of the draws: the first crop's prototypes, the queue, each local crop's prototypes
    views, above = info.student_crops, len(LEVELS) - 1
    protos = above if meta["proto_selection"] else 0
    order += [("prototype", 0, level) for level in range(protos)]
    order += [("instance", 0, level) for level in range(len(LEVELS) if meta["instance_selection"] else 0)]
    order += [("prototype", view, level) for view in range(1, views) for level in range(protos)]
    assert len(order) == len(masks)
    instance: dict[int, Tensor] = {}
    prototype = [torch.ones(views, info.batch, k, dtype=torch.bool) for k in LEVELS[:above]]
    assert objective.table is not None
    lineage = objective.tree.lineage(objective.table[vector["index"]].long())
    for (kind, view, level), mask in zip(order, masks, strict=True):
        if kind == "instance":
            instance[level] = mask
        else:
            negatives = ~objective.levels.no_negatives(lineage[level], level)[0]
            prototype[level][view][:, negatives] = mask
    stacked = torch.stack([instance[level] for level in sorted(instance)]) if instance else None
    return Masks(stacked, prototype)


@pytest.mark.parametrize("name", [*NAMES, "warmup", "warmup_multicrop"])
def test_official_losses_and_gradients(name: str) -> None:
    vector, objective, info, student, teacher = official(name)
    masks = None if name.startswith("warmup") else recorded(vector, objective, info)
    outcome = objective.loss(student, teacher, info, masks)
    torch.testing.assert_close(outcome.loss, vector["total"], rtol=1e-6, atol=1e-5)
    outcome.loss.backward()
    assert student["hierarchy"].grad is not None
    torch.testing.assert_close(
        student["hierarchy"].grad * info.batch, torch.cat(vector["grad_q_views"]) * info.batch, rtol=1e-5, atol=1e-5
    )
    objective.commit(outcome)
    torch.testing.assert_close(objective.queue.rows.T, vector["state_after"]["queue"], rtol=0, atol=0)
    assert objective.queue.pointer == int(vector["state_after"]["queue_ptr"])


@pytest.mark.parametrize("name", NAMES)
def test_every_official_term(name: str) -> None:
    """The plain form that ours is held to below gives each cross-entropy of the official code."""
    vector, objective, info, student, teacher = official(name)
    masks, views = recorded(vector, objective, info), info.student_crops
    lineage = objective.tree.lineage(official_tree()[1][vector["index"]])
    queries = student["hierarchy"].detach().view(views, info.batch, -1)
    queue = vector["state_before"]["queue"].T
    have = Given(queries, teacher["hierarchy"], queue, objective.tree, lineage, masks.instance, masks.prototype)
    instance, prototype = terms(have, objective.config)
    if objective.config.instance_selection and not objective.config.selection_on_local:
        found = [*instance[:, 0], *instance[0, 1:]]
    else:
        # The first crop's levels, then each level's local crops.
        found = [*instance[:, 0], *instance[:, 1:].flatten()]
    found += list(prototype.T.flatten())
    assert len(found) == vector["meta"]["n_ce"]
    torch.testing.assert_close(torch.stack(found), torch.stack(vector["ce_terms"]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(total(have, objective.config), vector["total"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["single", "multi_local"])
def test_official_probabilities(name: str) -> None:
    vector, objective, _, _, teacher = official(name)
    scene_lineage = objective.tree.lineage(official_tree()[1][vector["index"]])
    have = Given(vector["q_views"][0][None], teacher["hierarchy"], objective.queue.rows, objective.tree, scene_lineage)
    config = objective.config
    for level in range(2):
        negatives = ~objective.levels.no_negatives(scene_lineage[level], level)[0]
        ours = prototype_stays(have, config, level)
        torch.testing.assert_close(ours[:, negatives], vector["bernoulli_probs"][level], rtol=1e-5, atol=1e-6)
        chosen = objective.levels.sharpened(level + 1)[scene_lineage[level + 1]]
        member = (chosen @ objective.tree.prototypes[level].T - objective.levels.above()[level]).exp()
        torch.testing.assert_close((1 - member).clamp(1e-4, 0.999), ours, rtol=1e-5, atol=1e-5)
    for level, ours in enumerate(instance_stays(have, config)):
        torch.testing.assert_close(ours, vector["bernoulli_probs"][2 + level], rtol=1e-5, atol=1e-6)
        chosen = objective.levels.sharpened(level)[scene_lineage[level]]
        member = (chosen @ objective.queue.rows.T - objective.scores[level]).exp()
        torch.testing.assert_close((1 - member).clamp(0, 0.999), ours, rtol=1e-5, atol=1e-5)


def test_what_follows_from_official_centroids() -> None:
    vector = read("hkmeans")
    tree, _ = official_tree()
    numbers = tree.assign(vector["x"])
    assert torch.equal(numbers, vector["level_assign"][0])
    for found, table in zip(tree.lineage(numbers), vector["result"]["im2cluster"], strict=True):
        assert torch.equal(found, table)
    points = vector["x"]
    for level in range(3):
        assignment = vector["level_assign"][level]
        squared = squared_distances(points, vector["raw_centroids"][level], assignment)
        torch.testing.assert_close(squared.double(), vector["level_sqdist"][level], rtol=1e-4, atol=1e-6)
        phi = concentration(vector["level_sqdist"][level], assignment, LEVELS[level], temperature=0.2)
        torch.testing.assert_close(phi.float(), vector["result"]["density"][level], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(tree.prototypes[level], vector["result"]["centroids"][level], rtol=1e-5, atol=1e-6)
        if level < 2:
            torch.testing.assert_close(tree.logits(level), vector["result"]["logits"][level], rtol=1e-5, atol=1e-6)
        points = tree.prototypes[level]


def test_masked_zero_and_remove_differ_as_noted() -> None:
    """Section 3, HCSC 1: 3.057/2.896/3.002 by the code, 3.044/2.861/2.957 by the paper, 3.114 without selection."""
    sums = {}
    for masked in ("zero", "remove"):
        vector, objective, info, student, teacher = official("single", masked=masked, prototype_weight=0.0)
        sums[masked] = float(objective.loss(student, teacher, info, recorded(vector, objective, info)).loss.detach())
    assert sums["zero"] == pytest.approx(3.057 + 2.896 + 3.002, abs=2e-3)
    assert sums["remove"] == pytest.approx(3.044 + 2.861 + 2.957, abs=2e-3)
