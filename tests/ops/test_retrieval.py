"""Average precision equals scikit-learn's, ties included, and its chance level equals the mean over all rankings."""

import itertools

import numpy as np
import pytest
import torch
from gristmill.ops.evaluate.retrieval import expected_average_precision, retrieve
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score


def noise(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_scikit_learn(reference, labels, query, wanted, alone=False) -> float:
    unit = torch.nn.functional.normalize
    scores = (unit(query, dim=1) @ unit(reference, dim=1).T).numpy()
    values = []
    for row, label in enumerate(wanted.tolist()):
        others = np.arange(len(labels)) != (row if alone else -1)
        relevant = (labels.numpy() == label)[others]
        if relevant.any():
            values.append(average_precision_score(relevant, scores[row][others]))
    return float(np.mean(values))


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 1000), rows=st.integers(4, 60), classes=st.integers(1, 8), block=st.integers(1, 70))
def test_equals_scikit_learn(seed, rows, classes, block):
    reference, labels = noise(seed, rows, 5), torch.arange(rows) % classes
    query, wanted = noise(seed + 1, 11, 5), torch.arange(11) % (classes + 1)  # the last class is not to be found
    result = retrieve(reference, labels, query, wanted, block=block)
    assert result.mean_average_precision == pytest.approx(by_scikit_learn(reference, labels, query, wanted), abs=1e-12)
    assert result.lonely == int((wanted >= len(labels.unique())).sum())
    assert result.queries + result.lonely == 11


@pytest.mark.parametrize("block", [1, 7, 100])
def test_leave_one_out_equals_scikit_learn(block):
    features, labels = noise(3, 50, 4), torch.arange(50) // 4
    expected = by_scikit_learn(features, labels, features, labels, alone=True)
    assert retrieve(features, labels, block=block).mean_average_precision == pytest.approx(expected, abs=1e-12)


def test_ties_equal_scikit_learn_and_do_not_depend_on_storage_order():
    # Three points only, so that most similarities are equal; products of ones and zeros are exact.
    points = torch.eye(3, dtype=torch.float64)[torch.arange(30) % 3]
    labels = torch.arange(30) // 5
    expected = by_scikit_learn(points, labels, points, labels, alone=True)
    result = retrieve(points, labels)
    assert result.mean_average_precision == pytest.approx(expected, abs=1e-12)
    shuffled = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    again = retrieve(points[shuffled], labels[shuffled])
    assert again.mean_average_precision == pytest.approx(result.mean_average_precision, abs=1e-12)
    assert again.recall == pytest.approx(result.recall)


def test_collapsed_features_find_what_chance_finds():
    labels = torch.arange(40) // 4
    result = retrieve(torch.ones(40, 8), labels)
    assert result.mean_average_precision == pytest.approx(3 / 39)
    # The first of 39 equals is one of the three with probability 3 / 39, in storage order or any other.
    assert result.recall[1] == pytest.approx(3 / 39)
    assert result.recall[5] == pytest.approx(1 - np.prod([(36 - i) / (39 - i) for i in range(5)]))


def test_recall_is_the_share_of_queries_with_a_hit_in_front():
    features, labels = noise(4, 80, 6), torch.arange(80) // 4
    unit = torch.nn.functional.normalize(features, dim=1)
    scores = (unit @ unit.T).fill_diagonal_(-2)
    for k, value in retrieve(features, labels, recall_at=(1, 3, 10, 79)).recall.items():
        hit = (labels[scores.topk(k).indices] == labels[:, None]).any(1)
        assert value == pytest.approx(float(hit.double().mean()))


@pytest.mark.parametrize(("relevant", "total"), [(1, 1), (1, 6), (2, 6), (3, 7), (5, 8), (8, 8)])
def test_chance_is_the_mean_over_all_rankings(relevant, total):
    scores = -np.arange(total)
    values = [
        average_precision_score(np.isin(np.arange(total), places), scores)
        for places in itertools.combinations(range(total), relevant)
    ]
    assert expected_average_precision(relevant, total) == pytest.approx(np.mean(values), abs=1e-12)


def test_noise_gives_chance():
    labels = torch.arange(1500) // 5
    measured = retrieve(noise(5, 1500, 32), labels).mean_average_precision
    chance = expected_average_precision(4, 1499)
    assert chance == pytest.approx(0.0079, abs=1e-3)
    assert measured == pytest.approx(chance, abs=0.003)


def test_nothing_to_find_is_refused():
    with pytest.raises(ValueError, match="none of the 5 queries"):
        retrieve(noise(6, 5, 3), torch.arange(5))
    with pytest.raises(ValueError, match="at least one"):
        expected_average_precision(0, 4)
