"""Probes take the right levels, chance stands beside each, and what cannot be computed is said."""

import subprocess
import sys

import pytest
import torch
from gristmill.ops.evaluate.knn import knn_accuracy
from gristmill.ops.evaluate.probes import chance_levels, label_free, neighbour_agreement, run_probes, uniformity
from gristmill.ops.evaluate.retrieval import expected_average_precision, retrieve

LEVELS = ["coarse", "fine", "instance"]


def noise(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tree(rows: int) -> torch.Tensor:
    """Codes [rows, 3]: 3 coarse classes, 6 fine, 24 instances, all equally common for rows % 24 == 0."""
    instance = torch.arange(rows) % 24
    return torch.stack([instance // 8, instance // 4, instance], 1)


def test_three_levels_give_their_own_probes():
    reference, query, labels, wanted = noise(0, 240, 8), noise(1, 96, 8), tree(240), tree(96)
    probes = run_probes(reference, labels, query, wanted, LEVELS)
    assert list(probes) == ["coarse_knn", "fine_knn", "instance_retrieval"]
    assert not probes.skipped
    assert probes["fine_knn"] == knn_accuracy(reference, labels[:, 1], query, wanted[:, 1])
    found = retrieve(reference, labels[:, 2], query, wanted[:, 2])
    assert probes["instance_retrieval"] == found.mean_average_precision


def test_chance_is_exact_and_has_the_same_names():
    labels, wanted = tree(240), tree(96)
    chance = chance_levels(labels, wanted, LEVELS)
    assert chance == {
        "coarse_knn": pytest.approx(1 / 3),
        "fine_knn": pytest.approx(1 / 6),
        "instance_retrieval": pytest.approx(expected_average_precision(10, 240)),
    }
    alone = chance_levels(labels, None, LEVELS)
    assert alone["instance_retrieval"] == pytest.approx(expected_average_precision(9, 239))
    assert list(run_probes(noise(2, 240, 4), labels, None, None, LEVELS)) == list(alone)


def test_noise_lies_at_chance_on_every_level():
    labels, wanted = tree(2400), tree(1200)
    probes = run_probes(noise(3, 2400, 16), labels, noise(4, 1200, 16), wanted, LEVELS)
    chance = chance_levels(labels, wanted, LEVELS)
    assert probes["coarse_knn"] == pytest.approx(chance["coarse_knn"], abs=4 * (2 / 9 / 1200) ** 0.5)
    assert probes["fine_knn"] == pytest.approx(chance["fine_knn"], abs=4 * (5 / 36 / 1200) ** 0.5)
    assert probes["instance_retrieval"] == pytest.approx(chance["instance_retrieval"], abs=0.003)


def test_chance_of_unequal_classes():
    codes = torch.tensor([0] * 6 + [1] * 3 + [2])
    chance = chance_levels(codes, None, ["class"])
    assert chance["class_knn"] == pytest.approx(0.6)
    expected = (6 * expected_average_precision(5, 9) + 3 * expected_average_precision(2, 9)) / 9
    assert chance["class_retrieval"] == pytest.approx(expected)


def test_one_and_two_levels():
    labels = tree(48)
    assert list(run_probes(noise(5, 48, 4), labels[:, 1], None, None, ["class"])) == ["class_knn", "class_retrieval"]
    two = run_probes(noise(5, 48, 4), labels[:, :2], None, None, LEVELS[:2])
    assert list(two) == ["coarse_knn", "fine_knn", "fine_retrieval"]


def test_retrieval_climbs_to_a_level_with_several_images():
    labels = torch.cat([tree(48)[:, :2], torch.arange(48)[:, None]], 1)
    probes = run_probes(noise(6, 48, 4), labels, None, None, LEVELS)
    assert list(probes) == ["coarse_knn", "fine_knn", "fine_retrieval"]
    assert probes.skipped == {
        "instance_retrieval": "only 0% of the queries have another image of their instance to find"
    }
    assert list(chance_levels(labels, None, LEVELS)) == list(probes)


def test_unknown_labels_are_left_out():
    labels, features = tree(96), noise(7, 96, 6)
    labels[::5, 1] = -1
    known = labels[:, 1] >= 0
    probes = run_probes(features, labels, None, None, LEVELS)
    assert probes["fine_knn"] == knn_accuracy(features[known], labels[known, 1])


def test_one_class_and_no_class_are_said():
    probes = run_probes(noise(8, 20, 4), torch.zeros(20, dtype=torch.int64), None, None, ["class"])
    assert not probes
    assert "same class" in probes.skipped["class_knn"]
    assert "same class" in probes.skipped["class_retrieval"]
    probes = run_probes(noise(8, 20, 4), torch.full((20,), -1), None, None, ["class"])
    assert probes.skipped["class_knn"] == "no image has a known class"


def test_labels_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"labels must be \[n, 3\]"):
        run_probes(noise(9, 20, 4), torch.zeros(20, 2), None, None, LEVELS)


def test_without_labels_only_label_free_numbers():
    probes = run_probes(noise(10, 200, 16), None, noise(11, 300, 16), None, [])
    assert list(probes) == ["rank_me", "feature_std", "uniformity", "neighbour_agreement"]
    assert probes["rank_me"] > 14
    assert probes["feature_std"] == pytest.approx(1, abs=0.05)
    chance = chance_levels(None, None, [], rows=300)["neighbour_agreement"]
    assert chance == pytest.approx(20 / 299)
    assert probes["neighbour_agreement"] == pytest.approx(chance, abs=0.01)
    assert set(label_free(noise(12, 1, 4)).skipped) == set(probes)


def test_collapse_shows():
    spread, collapsed = noise(13, 200, 8), torch.ones(200, 8) + 1e-3 * noise(14, 200, 8)
    assert label_free(collapsed)["feature_std"] < 0.01 < label_free(spread)["feature_std"]
    assert label_free(collapsed)["uniformity"] > -0.001 > label_free(spread)["uniformity"]
    assert label_free(collapsed)["rank_me"] < 2 < label_free(spread)["rank_me"]
    assert neighbour_agreement(spread, spread) == 1.0


def test_uniformity_is_the_mean_over_pairs():
    rows = torch.nn.functional.normalize(noise(15, 30, 3), dim=1)
    pairs = torch.pdist(rows.double()).square().mul(-2).exp().mean().log()
    assert uniformity(rows, block=7) == pytest.approx(float(pairs), abs=1e-5)


def test_the_package_loads_torch_only_when_asked():
    code = "import sys, gristmill.ops.evaluate as e; assert 'torch' not in sys.modules; e.knn_accuracy; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
