"""The evaluators agree with scikit-learn on the same features, and random features know nothing."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from gristmill.ops import evaluate_commands
from gristmill.ops.evaluate.alignment import alignment
from gristmill.ops.evaluate.battery import EVALUATORS, KnnOptions, knn_grid
from gristmill.ops.evaluate.clustering import (
    ClusteringError,
    contingency,
    mutual_information,
    purity,
    rand_index,
    run_clustering,
    shuffled_clustering,
)
from gristmill.ops.evaluate.logistic import LogisticError, LogisticOptions, SemiOptions, run_logistic, run_semi
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
from sklearn.metrics.cluster import contingency_matrix
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import normalize


def clouds(rows: int = 240, classes: int = 6, spread: float = 0.9, seed: int = 0, d: int = 8):
    """Features [n, d] around a centre for each class, and labels [n]."""
    draw = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, d, generator=torch.Generator().manual_seed(7))
    labels = torch.arange(rows) % classes
    return centres[labels] + spread * torch.randn(rows, d, generator=draw), labels


def noise(rows: int, classes: int, seed: int):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 12, generator=draw), torch.arange(rows) % classes


def within(rate: float, chance: float, rows: int) -> bool:
    """Whether a share of so many rows is no further from chance than 5 standard deviations of a binomial."""
    return abs(rate - chance) < 5 * math.sqrt(chance * (1 - chance) / rows)


def test_knn_is_scikit_learn_s_weighted_vote_on_the_whole_grid():
    reference, labels = clouds(seed=1)
    query, truth = clouds(120, seed=2)
    options = KnnOptions(neighbours=(1, 5, 30), temperatures=(0.05, 0.2), neighbour=20, temperature=0.07)
    grid = knn_grid(reference, labels, query, truth, options)
    assert set(grid) == {(k, t) for k in (1, 5, 20, 30) for t in (0.05, 0.07, 0.2)}
    for (k, t), score in grid.items():
        model = KNeighborsClassifier(
            k, metric="cosine", algorithm="brute", weights=lambda d, t=t: np.exp((1 - d) / t)  # pyright: ignore[reportArgumentType]
        )  # fmt: skip
        model.fit(reference.double().numpy(), labels.numpy())
        assert score == pytest.approx(model.score(query.double().numpy(), truth.numpy()), abs=1e-12)


@given(st.integers(1, 5), st.integers(1, 6), st.integers(2, 60), st.integers(0, 10**6))
def test_agreement_of_clusters_is_scikit_learn_s(classes, clusters, rows, seed):
    draw = np.random.default_rng(seed)
    labels, found = draw.integers(0, classes, rows), draw.integers(0, clusters, rows)
    counts = contingency(torch.from_numpy(labels), torch.from_numpy(found))
    assert rand_index(counts) == pytest.approx(adjusted_rand_score(labels, found), abs=1e-9)
    assert mutual_information(counts) == pytest.approx(normalized_mutual_info_score(labels, found), abs=1e-9)
    assert purity(counts) == pytest.approx(contingency_matrix(labels, found).max(0).sum() / rows)


def test_well_parted_classes_are_found_as_a_tree():
    coarse = torch.arange(240) % 2
    fine = torch.arange(240) % 4
    rows = torch.eye(6)[coarse] * 3 + torch.eye(6)[2 + fine]
    rows = rows + 0.05 * torch.randn(240, 6, generator=torch.Generator().manual_seed(0))
    scores = run_clustering(rows, {"coarse": coarse, "fine": fine}, "fine")
    assert scores == {name: pytest.approx(1.0) for name in scores}
    assert list(scores)[3:] == ["hierarchy_purity_fine", "hierarchy_purity_coarse"]
    blind = shuffled_clustering({"coarse": coarse, "fine": fine}, "fine")
    assert blind.keys() == scores.keys()
    assert abs(blind["clustering_ari"]) < 0.05
    with pytest.raises(ClusteringError, match="two classes"):
        run_clustering(rows, {"class": torch.zeros(240, dtype=torch.int64)}, "class")


def test_logistic_is_scikit_learn_s_at_the_strength_that_it_chose():
    features, labels = clouds(spread=1.5, seed=3)
    query, truth = clouds(150, spread=1.5, seed=4)
    scores = run_logistic(features, labels, query, truth)
    model = LogisticRegression(C=scores["logistic_c"], max_iter=1000).fit(normalize(features.numpy()), labels.numpy())
    assert scores["logistic_top1"] == pytest.approx(model.score(normalize(query.numpy()), truth.numpy()))
    assert scores["logistic_top1"] < scores["logistic_top5"] <= 1.0
    alone = LogisticOptions(strengths=(scores["logistic_c"],))
    assert run_logistic(features, labels, query, truth, alone) == scores


def test_strength_is_chosen_without_the_queries():
    features, labels = clouds(spread=1.5, seed=3)
    query, truth = clouds(150, spread=1.5, seed=4)
    one, other = (run_logistic(features, labels, query, each) for each in (truth, truth.roll(1)))
    assert one["logistic_c"] == other["logistic_c"]


def test_semi_supervised_trains_on_as_many_of_each_class_as_it_says():
    features, labels = clouds(600, spread=0.3, seed=5)
    scores = run_semi(features, labels, features, labels, SemiOptions(shares=(0.01, 0.1), draws=2), seed=3)
    assert set(scores) == {"semi_1_top1", "semi_1_std", "semi_10_top1", "semi_10_std"}
    assert scores["semi_10_top1"] > 0.9
    assert run_semi(features, labels, features, labels, SemiOptions(draws=2), seed=3) == scores


def test_queries_of_unknown_classes_are_wrong_and_two_classes_will_do():
    features, labels = clouds(80, classes=2, spread=0.1)
    assert run_logistic(features, labels, features, labels)["logistic_top1"] == 1.0
    assert run_logistic(features, labels, features, labels + 2)["logistic_top1"] == 0.0
    with pytest.raises(LogisticError, match="one class"):
        run_logistic(features, labels * 0, features, labels)


def test_random_features_give_chance():
    (reference, labels), (query, truth) = noise(900, 5, 1), noise(800, 5, 2)
    for score in knn_grid(reference, labels, query, truth, KnnOptions()).values():
        assert within(score, 0.2, 800)
    assert within(run_logistic(reference, labels, query, truth)["logistic_top1"], 0.2, 800)
    for name, score in run_semi(reference, labels, query, truth).items():
        if name.endswith("top1"):
            assert within(score, 0.2, 800)
    scores = run_clustering(reference, {"class": labels}, "class")
    assert abs(scores["clustering_ari"]) < 0.02
    assert scores["clustering_nmi"] < 0.03


def test_alignment_is_the_mean_of_squared_distances():
    pairs = torch.randn(40, 2, 5, generator=torch.Generator().manual_seed(1))
    unit = torch.nn.functional.normalize(pairs.double(), dim=-1)
    squared = (unit[:, None, 0] - unit[None, :, 1]).square().sum(-1)
    own = torch.eye(40, dtype=torch.bool)
    found = alignment(pairs)
    assert found["alignment"] == pytest.approx(float(squared[own].mean()), abs=1e-6)
    assert found["alignment_strangers"] == pytest.approx(float(squared[~own].mean()), abs=1e-6)
    assert alignment(pairs[:, :1].expand(-1, 2, -1))["alignment"] == 0.0


def test_the_command_names_all_evaluators_and_their_settings():
    assert tuple(EVALUATORS) == evaluate_commands.NAMES
    for one in EVALUATORS.values():
        assert one.options is not None
        assert dataclasses.is_dataclass(one.options())
