"""The weighted vote equals scikit-learn's classifier, does not depend on blocks, and knows nothing from noise."""

import numpy as np
import pytest
import torch
from gristmill.ops.evaluate.features import extract, pixel_features
from gristmill.ops.evaluate.knn import knn_accuracy, knn_predict, nearest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import KNeighborsClassifier


def clusters(seed: int, rows: int, classes: int = 5, dim: int = 12, spread: float = 1.0):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, dim, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    labels = torch.randint(classes, (rows,), generator=generator)
    return centres[labels] + spread * torch.randn(rows, dim, generator=generator, dtype=torch.float64), labels


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (10, 0.07), (20, 0.04), (50, 1.0)])
def test_vote_equals_scikit_learn(k, temperature):
    reference, labels = clusters(0, 400)
    query, _ = clusters(1, 150)
    classifier = KNeighborsClassifier(
        n_neighbors=k,
        metric="cosine",
        algorithm="brute",
        weights=lambda d: np.exp((1 - d) / temperature),  # pyright: ignore[reportArgumentType]  (its stub knows strings only)
    ).fit(reference.numpy(), labels.numpy())
    ours = knn_predict(reference, labels, query, k=k, temperature=temperature, block=64)
    assert np.array_equal(ours.numpy(), classifier.predict(query.numpy()))


def test_leave_one_out_equals_asking_without_each_row():
    features, labels = clusters(2, 60)
    together = knn_predict(features, labels, k=7)
    for row in range(60):
        others = torch.arange(60) != row
        assert together[row] == knn_predict(features[others], labels[others], features[row : row + 1], k=7)[0]


@settings(deadline=None, max_examples=25)
@given(
    rows=st.integers(2, 60), asked=st.integers(1, 40), k=st.integers(1, 70), block=st.integers(1, 50),
    references=st.integers(1, 50), alone=st.booleans(),
)  # fmt: skip
def test_blocks_change_nothing(rows, asked, k, block, references, alone):
    reference, _ = clusters(3, rows)
    query = None if alone else clusters(4, asked)[0]
    whole = nearest(reference, query, k)
    pieces = nearest(reference, query, k, block=block, references=references)
    assert whole[0].shape == (rows if alone else asked, min(k, rows - alone))
    torch.testing.assert_close(whole[0], pieces[0])
    assert torch.equal(whole[1], pieces[1])
    if alone:
        assert not (whole[1] == torch.arange(rows)[:, None]).any()


def test_noise_gives_chance_and_clusters_do_not():
    generator = torch.Generator().manual_seed(5)
    features = torch.randn(3000, 16, generator=generator)
    labels = torch.arange(3000) % 4
    # Four standard deviations of a binomial with p = 1/4.
    assert abs(knn_accuracy(features, labels) - 0.25) < 4 * (0.25 * 0.75 / 3000) ** 0.5
    features, labels = clusters(6, 300, spread=0.05)
    assert knn_accuracy(features, labels, *clusters(7, 100, spread=0.05)) == 1.0


def test_small_temperature_does_not_overflow():
    features, labels = clusters(8, 50)
    nearest_only = knn_predict(features, labels, k=1)
    assert torch.equal(knn_predict(features.float(), labels, k=20, temperature=1e-4), nearest_only)


def test_what_has_no_neighbours_is_refused():
    features, labels = clusters(9, 10)
    features[3, 2] = torch.nan
    with pytest.raises(ValueError, match="1 of 10 feature rows"):
        knn_accuracy(features, labels)
    with pytest.raises(ValueError, match="no neighbours"):
        nearest(torch.ones(1, 3))
    with pytest.raises(ValueError, match="come together"):
        knn_accuracy(features, labels, features)


def test_extract_keeps_order_and_mode():
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 5), torch.nn.Dropout(0.5))
    images = torch.randn(7, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    batches = [(["a", "b", "c", "d"], images[:4]), (["e", "f", "g"], images[4:])]
    features = extract(model, batches)
    assert features.keys == list("abcdefg")
    assert model.training
    assert not features.rows.requires_grad
    torch.testing.assert_close(features.rows, model[1](images.flatten(1)).detach())
    with pytest.raises(ValueError, match="no batches"):
        extract(model, [])


def test_pixels_are_averaged_down():
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    rows = pixel_features(images)
    assert rows.shape == (2, 3 * 16 * 16)
    torch.testing.assert_close(rows.view(2, 3, 16, 16)[0, 1, 2, 3], images[0, 1, 8:12, 12:16].mean())
    assert torch.equal(pixel_features(images[..., :16, :16]), images[..., :16, :16].flatten(1))
