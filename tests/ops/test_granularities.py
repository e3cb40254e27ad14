"""Purity, patch segmentation, and the benchmark of objectives alone: exact on made-up features, complete on a tiny run."""

import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from gristmill.ops.bench.endings import TINY
from gristmill.ops.bench.granularities import (
    CASES,
    PROBES,
    WHO,
    baselines,
    draw_data,
    learn,
    lifted,
    settings,
    textiles,
)
from gristmill.ops.evaluate.dense import PixelClasses, expected_iou, mean_iou, patch_tokens, pixel_patches, segment
from gristmill.ops.evaluate.purity import expected_purity, neighbour_purity
from gristmill.ops.networks import build_student
from gristmill.ops.recipe import load_recipe
from gristmill.shards.demo import CLOTHS, MASKS
from gristmill.shards.demo import PATCHES as DYES
from hypothesis import given
from hypothesis import strategies as st

from ..command import in_forks
from ..workers import Workers


def at(*degrees: float) -> torch.Tensor:
    """Features on the unit circle: the nearer two angles, the nearer the rows."""
    angle = torch.deg2rad(torch.tensor(degrees))
    return torch.stack([angle.cos(), angle.sin()], 1)


def test_purity_counts_each_neighbour():
    reference, labels = at(0, 10, 20, 90, 100), torch.tensor([0, 0, 1, 1, 2])
    query, wanted = at(1, 96), torch.tensor([0, 2])
    assert neighbour_purity(reference, labels, query, wanted, k=1) == 0.5 * (1 + 1)
    assert neighbour_purity(reference, labels, query, wanted, k=2) == 0.5 * (1 + 1 / 2)
    assert neighbour_purity(reference, labels, query, wanted, k=3) == pytest.approx(0.5 * (2 / 3 + 1 / 3))
    # Leaving one out: of the two nearest of each, 1, 1, 0, 1 and 0 share its label.
    assert neighbour_purity(reference, labels, k=2) == pytest.approx((1 + 1 + 0 + 1 + 0) / 2 / 5)
    assert expected_purity(labels, wanted) == pytest.approx((2 / 5 + 1 / 5) / 2)
    assert expected_purity(labels) == pytest.approx((1 + 1 + 1 + 1 + 0) / 4 / 5)
    with pytest.raises(ValueError, match="labels"):
        neighbour_purity(reference, labels[:4])
    with pytest.raises(ValueError, match="come together"):
        neighbour_purity(reference, labels, query)


def test_purity_of_noise_lies_at_chance():
    generator = torch.Generator().manual_seed(0)
    rows, labels = torch.randn(3000, 16, generator=generator), torch.arange(3000) % 4
    labels[:600] = 0
    assert neighbour_purity(rows, labels, k=8) == pytest.approx(expected_purity(labels), abs=0.01)


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=40))
def test_intersection_over_union_is_that_of_sets(pairs: list[tuple[int, int]]):
    each = []
    for c in range(5):
        one, other = ({i for i, pair in enumerate(pairs) if pair[side] == c} for side in (0, 1))
        if one | other:
            each.append(len(one & other) / len(one | other))
    predicted, truth = torch.tensor(pairs).T
    assert mean_iou(predicted, truth) == pytest.approx(sum(each) / len(each))
    constant = max(mean_iou(torch.full_like(truth, c), truth) for c in set(truth.tolist()))
    assert expected_iou(truth) == pytest.approx(constant)


def test_a_patch_takes_its_neighbours_class():
    reference, labels = at(0, 5, 90, 95, 180, 185), torch.tensor([0, 0, 1, 1, 2, 2])
    query, wanted = at(1, 2, 91, 94, 183, 89), torch.tensor([0, 0, 1, 1, 2, 2])
    # The last one is taken for a 1: classes 0, 1 and 2 overlap by 2/2, 2/3 and 1/2.
    assert segment(reference, labels, query, wanted, k=2) == pytest.approx((1 + 2 / 3 + 1 / 2) / 3)


def test_what_lies_under_a_patch():
    masks = np.zeros((2, 4, 4), np.uint8)
    masks[0, :2, 2:] = 3
    masks[0, 2:, :2] = [[1, 1], [1, 0]]
    masks[1, 2:, 2:] = [[0, 2], [2, 0]]  # as many of each
    classes = PixelClasses(["a", "b"], masks)
    assert classes.patches(["b", "a", "a"], 2).tolist() == [[0, 0, 0, 0], [0, 3, 1, 0], [0, 3, 1, 0]]
    assert classes.patches(["a"], 1).tolist() == [[0]]
    with pytest.raises(ValueError, match="cut into 3 x 3"):
        classes.patches(["a"], 3)
    with pytest.raises(KeyError):
        classes.patches(["c"], 2)
    with pytest.raises(ValueError, match="3 images want masks"):
        PixelClasses(["a", "b", "c"], masks)


def test_patches_of_pixels_and_of_networks_come_in_the_order_of_the_masks():
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    cut = pixel_patches(8)(images).unflatten(1, (4, -1))
    assert torch.equal(cut[1, 1], images[1, :, :8, 8:].flatten())
    wide = pixel_patches(8, around=4)(images).view(2, 4, 3, 16, 16)
    assert torch.equal(wide[0, 2, :, 4:12, 4:12], images[0, :, 8:, :8])
    assert torch.equal(wide[0, 2, :, :4, 4:12], images[0, :, 4:8, :8])
    assert not wide[0, 2, :, 12:].any()

    small = [override for override in TINY if not override.startswith("objectives.")]
    network = build_student(load_recipe("demo", small)).eval()
    tokens = patch_tokens(network)
    before = tokens(images).view(2, 4, -1)
    changed = images.clone()
    changed[0, :, 8:, :8] += 3.0
    moved = (tokens(changed).view(2, 4, -1) - before).norm(dim=2)
    assert moved[0].argmax() == 2
    assert not moved[1].any()
    assert torch.equal(before, network.backbone.norm(network.backbone(images))[:, 1:])


def test_a_tiny_run_of_one_objective_gives_a_complete_row(
    tmp_path: Path, workers: Workers, monkeypatch: pytest.MonkeyPatch
):
    """A few steps by the command line; whether anything is learned is the benchmark's to say."""
    monkeypatch.setattr(subprocess, "run", in_forks(workers))
    data = draw_data(tmp_path, images=384)
    assert not (tmp_path / "images" / MASKS).exists()
    classes = textiles(data / "parts.npz")
    assert set(np.unique(classes.masks)) == set(range(len(CLOTHS) + len(DYES)))
    small = [override for override in TINY if not override.startswith(("objectives.", "views.local"))]
    small += ["images=96", "teacher.momentum=[0.5, 0.9]"]
    scores = baselines(CASES["patch"], data, more=small)
    scores["trained"] = learn(CASES["patch"], data, tmp_path / "run", more=small)
    assert tuple(scores) == WHO
    assert all(set(row) == set(PROBES) for row in scores.values())
    assert all(0 < value < 1 for row in scores.values() for value in row.values())
    assert len({row["patch_segmentation"] for row in scores.values()}) == 4
    # The chances of 16 equally common kinds and 192 instances.
    assert scores["chance"]["neighbour_purity"] == pytest.approx(1 / 16, abs=0.01)
    assert scores["chance"]["coarse_knn"] == pytest.approx(1 / 4, abs=0.08)


def test_each_objective_is_trained_alone_and_asked_by_its_own_probe(tmp_path: Path):
    for name, case in CASES.items():
        recipe = load_recipe("demo", settings(case, tmp_path, seed=3))
        assert recipe.objectives.names() == [name.split(",")[0]]
        assert (recipe.seed, recipe.images) == (3, case.images)
        assert recipe.student == load_recipe("demo").student.model_copy(
            update={k: getattr(recipe.student, k) for k in ("objectives", "patch_prototypes")}
        ), "one untrained network stands for all"
    assert {case.probe for case in CASES.values()} == set(PROBES)
    scores = {who: dict.fromkeys(PROBES, 0.2) for who in WHO}
    assert not lifted(CASES["group"], scores)
    scores["trained"]["coarse_knn"] = 0.3
    assert lifted(CASES["group"], scores)
    assert not lifted(CASES["patch"], scores)
    for who in WHO[:-1]:
        assert not lifted(CASES["group"], {**scores, who: {**scores[who], "coarse_knn": 0.31}})
