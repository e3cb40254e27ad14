"""The benchmark of methods: every case is the method that it says, one runs to a complete row, a ResNet is asked fairly."""

import subprocess
from pathlib import Path

import pytest
import torch
from gristmill.ops.bench.endings import TINY
from gristmill.ops.bench.granularities import (
    PROBES,
    WHO,
    Case,
    Measuring,
    cell,
    draw_data,
    learn,
    lifted,
    network_eyes,
    pixel_eyes,
    settings,
    untrained,
)
from gristmill.ops.bench.methods import CASES
from gristmill.ops.evaluate.dense import pixel_patches
from gristmill.ops.networks import build_student
from gristmill.ops.recipe import RECIPES, load_recipe

from ..command import in_forks
from ..workers import Workers

GIVEN = {  # which shipped recipe each case is a small one of
    "npid": "npid-r50",
    "npid, softmax": "npid-r50",
    "moco-v1": "moco-v1-r50-200",
    "moco-v2": "moco-v2-r50-200",
    "infomin": "infomin-r50-200",
    "moco-v3": "moco-v3-vits16-300",
    "simclr": "simclr-r50",
    "byol": "byol-r50-1000",
    "simsiam": "simsiam-r50-100",
    "swav": "swav-r50-200-bs256",
    "deepcluster-v2": "deepcluster-v2-r50-400",
    "hcsc": "hcsc-r50-200",
    "hcsc, streaming": "hcsc-stream-r50",
    "densecl, ViT, by place": "densecl-vits16",
    "densecl, ResNet": "densecl-r50-200",
    "multigrain": "multigrain-vits16",
}


def test_each_case_is_its_method_in_small(tmp_path: Path):
    """Objectives, who sees which crops, and the layers and norms of the heads are the shipped recipe's."""
    for name, case in CASES.items():
        recipe = load_recipe("demo", settings(case, tmp_path, seed=3))
        assert case.probe in PROBES
        if name not in GIVEN:
            continue
        shipped = load_recipe(RECIPES / f"{GIVEN[name]}.yaml")
        assert recipe.objectives.names() == shipped.objectives.names(), name
        assert recipe.objectives.needs_teacher == shipped.objectives.needs_teacher
        if not recipe.objectives.needs_teacher:
            assert recipe.teacher.momentum == (0.0, 0.0), f"{name}: the teacher that is probed would not be the student"
        if name != "multigrain":  # there the demo's crops take the place of Mugs'
            roles = {view.role for view in shipped.views if view.name != "local"}
            assert {view.role for view in recipe.views} == (roles if recipe.objectives.needs_teacher else {"student"})
        for objective in recipe.objectives.names():
            mine, theirs = recipe.student.projection(objective), shipped.student.projection(objective)
            assert (mine is None) == (theirs is None)
            if mine and theirs:
                assert _shape(mine) == _shape(theirs), name


def _shape(head: object) -> dict:
    return head.model_dump(exclude={"hidden": True, "out": True, "grid": True, "predictor": {"hidden"}})  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_data(tmp_path_factory.mktemp("methods"), images=384)


def test_one_method_runs_to_a_complete_row(
    tmp_path: Path, data: Path, workers: Workers, monkeypatch: pytest.MonkeyPatch
):
    """HCSC with its table, clustered anew on the way, by the command line; whether it learns is the benchmark's to say."""
    monkeypatch.setattr(subprocess, "run", in_forks(workers))
    small = [override for override in TINY if not override.startswith(("objectives.", "views.local", "views.global"))]
    small += ["images=64", "checkpoint.every=64", "views.query.size=16", "views.key.size=16"]
    small += ["objectives.hierarchy.levels=[8, 4, 2]", "objectives.hierarchy.every=24"]
    scores = learn(CASES["hcsc"], data, tmp_path / "run", more=small)
    assert set(scores) == set(PROBES)
    assert all(0 < value < 1 for value in scores.values())


def test_a_resnet_is_asked_for_the_locations_of_its_map(data: Path):
    case = CASES["densecl, ResNet"]
    recipe = load_recipe("demo", settings(case, data))
    measuring = Measuring(recipe, data)
    assert (cell(recipe), measuring.side) == (32, 4)
    images = torch.randn(2, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    tokens = network_eyes(build_student(recipe).eval())(images)[2]
    assert tokens.view(2, 16, -1).shape == (2, 16, 64)
    coarse = torch.nn.functional.avg_pool2d(images, 4)
    assert torch.equal(pixel_eyes(32, 16)(images)[2], pixel_patches(8, 4)(coarse))
    fine = images[:, :, :32, :32]
    assert torch.equal(pixel_eyes(8, 4)(fine)[2], pixel_patches(8, 4)(fine))


def test_cases_share_a_baseline_only_if_they_start_alike(tmp_path: Path):
    start = {name: untrained(case, tmp_path) for name, case in CASES.items()}
    assert start["moco-v1"] == start["hcsc"] == start["byol"] == start["multigrain"]
    assert len({start["moco-v1"], start["moco-v3"], start["densecl, ResNet"]}) == 3


def test_all_granularities_at_once_may_not_cost_one():
    case = CASES["multigrain"]
    scores = {who: dict.fromkeys(PROBES, 0.2) for who in WHO} | {"trained": dict.fromkeys(PROBES, 0.3)}
    assert lifted(case, scores)
    scores["trained"]["instance_retrieval"] = 0.19
    assert not lifted(case, scores)
    assert lifted(Case(case.probe, case.images, case.settings), scores)
    scores["pixels"] = dict.fromkeys(PROBES, 0.4)
    assert not lifted(Case(case.probe, case.images, case.settings), scores)
    assert lifted(Case(case.probe, case.images, case.settings, rivals=("chance", "random")), scores)


def test_who_learns_from_few_images_is_asked_about_all(tmp_path: Path):
    recipe = load_recipe("demo", settings(CASES["npid, softmax"], tmp_path))
    assert recipe.sources[0].path == tmp_path / "few" / "train"
    assert (recipe.probes.reference, recipe.probes.query) == (tmp_path / "train", tmp_path / "probe")
