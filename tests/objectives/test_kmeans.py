"""k-means against faiss and scikit-learn on the same rows from the same start, and its promises of order and identity."""

import importlib
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gristmill.objectives import kmeans as module
from gristmill.objectives.kmeans import Share, first_rows, kmeans, nearest, squared_distances
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans
from torch import Tensor

faiss: Any = importlib.import_module("faiss")  # it has no types
DIM = 16


def blobs(count: int, groups: int, seed: int = 0, spread: float = 0.5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(groups, DIM, generator=generator)
    rows = centres[torch.arange(count) % groups] + spread * torch.randn(count, DIM, generator=generator)
    return F.normalize(rows, dim=1)


def by_faiss(rows: Tensor, k: int, start: Tensor | None, spherical: bool = False, niter: int = 20, nredo: int = 1):
    clustering = faiss.Clustering(DIM, k)
    clustering.niter, clustering.nredo, clustering.spherical = niter, nredo, spherical
    clustering.max_points_per_centroid, clustering.min_points_per_centroid = 10**6, 1
    if start is not None:
        faiss.copy_array_to_vector(start.numpy().ravel(), clustering.centroids)
    index = faiss.IndexFlatIP(DIM) if spherical else faiss.IndexFlatL2(DIM)
    clustering.train(rows.numpy(), index)
    centroids = faiss.vector_to_array(clustering.centroids).reshape(k, DIM)
    _, assignment = index.search(rows.numpy(), 1)
    stats = [clustering.iteration_stats.at(i) for i in range(clustering.iteration_stats.size())]
    return torch.from_numpy(centroids), torch.from_numpy(assignment[:, 0]), [each.obj for each in stats]


@pytest.mark.parametrize("spherical", [False, True])
def test_from_the_same_start_it_is_faiss(spherical: bool) -> None:
    rows = blobs(3000, 40)
    start = rows[first_rows(len(rows), 30, 3, "a")].contiguous()
    centroids, assignment, objective = by_faiss(rows, 30, start, spherical)
    ours = kmeans(rows, 30, starts=[start], spherical=spherical)
    assert not ours.reseeded.any()
    torch.testing.assert_close(ours.centroids, centroids, rtol=1e-5, atol=1e-6)
    assert torch.equal(ours.assignment, assignment)
    assert ours.objective == pytest.approx(objective[-1], rel=1e-5)


def test_from_the_same_start_it_is_scikit_learn() -> None:
    rows = blobs(2000, 12).double()
    start = rows[first_rows(len(rows), 12, 0, "a")]
    sklearn: Any = KMeans
    theirs = sklearn(12, init=start.numpy(), n_init=1, max_iter=100, tol=0, algorithm="lloyd").fit(rows.numpy())
    ours = kmeans(rows, 12, starts=[start], niter=100)
    assert not ours.reseeded.any()
    torch.testing.assert_close(ours.centroids, torch.from_numpy(theirs.cluster_centers_), rtol=1e-9, atol=1e-9)
    assert np.array_equal(ours.assignment.numpy(), theirs.labels_)
    assert ours.objective == pytest.approx(theirs.inertia_, rel=1e-9)


def test_with_its_own_start_it_is_as_good() -> None:
    rows = blobs(4000, 60, spread=0.9)
    _, _, objectives = by_faiss(rows, 50, None, nredo=5)
    last_of_each = objectives[19::20]  # faiss ends attempts early that do not improve; these are whole ones
    ours = kmeans(rows, 50, seed=1, nredo=5)
    assert ours.objective < 1.02 * min(last_of_each)
    assert ours.objective <= min(kmeans(rows, 50, seed=1, nredo=r).objective for r in (1, 2))


class Ranks:
    """What each of `world` ranks would find, by running them one after the other."""

    def __init__(self, world: int) -> None:
        self.world = world

    def nearest(self, rows: Tensor, centroids: Tensor, **how: Any) -> Tensor:
        parts: list[Tensor] = []
        for rank in range(self.world):
            nearest(
                rows,
                centroids,
                spherical=how["spherical"],
                share=Share(lambda p: parts.append(p) or p, rank, self.world),
            )
        assert len({len(part) for part in parts}) == 1  # what a gather of equal shares can carry
        return torch.cat(parts)[: len(rows)]


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK", 64)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("world", [2, 3, 5])
def test_the_bits_do_not_depend_on_the_number_of_ranks(world: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = blobs(700, 9)
    alone = kmeans(rows, 20, nredo=2, niter=5)
    monkeypatch.setattr(module, "nearest", Ranks(world).nearest)
    shared = kmeans(rows, 20, nredo=2, niter=5)
    assert torch.equal(alone.centroids, shared.centroids)
    assert torch.equal(alone.assignment, shared.assignment)
    assert alone.objective == shared.objective


@settings(max_examples=25)
@given(st.integers(1, 400), st.integers(1, 40), st.booleans(), st.integers(0, 99))
def test_what_lloyd_promises(count: int, k: int, spherical: bool, seed: int) -> None:
    rows = blobs(count, max(1, count // 7), seed)
    k = min(k, count)
    one, more = (kmeans(rows, k, seed=seed, niter=n, spherical=spherical) for n in (1, 6))
    if not more.reseeded.any():
        assert (more.objective >= one.objective - 1e-6) if spherical else (more.objective <= one.objective + 1e-6)
    assert more.assignment.min() >= 0
    assert more.assignment.max() < k
    assert torch.isfinite(more.centroids).all()
    if not spherical:
        every = torch.cdist(rows.double(), more.centroids.double()).square()
        own = every.gather(1, more.assignment[:, None]).squeeze(1)
        assert (own <= every.min(1).values + 1e-6).all()
        torch.testing.assert_close(
            squared_distances(rows, more.centroids, more.assignment).double(), own, rtol=1e-4, atol=1e-6
        )


def test_an_empty_cluster_takes_half_of_the_largest() -> None:
    rows = torch.cat([blobs(90, 1, spread=0.05), blobs(10, 1, seed=1, spread=0.05)])
    far = torch.full((1, DIM), 9.0)
    start = torch.cat([rows[:1], rows[-1:], far])
    found = kmeans(rows, 3, starts=[start], niter=8)
    assert found.reseeded.tolist() == [False, False, True]
    assert torch.bincount(found.assignment, minlength=3).min() > 5
    assert set(found.assignment[90:].tolist()) == {1}  # the small group was left whole


def test_fewer_different_rows_than_clusters_stay_finite() -> None:
    found = kmeans(torch.ones(20, DIM), 4, niter=5)
    assert torch.isfinite(found.centroids).all()
    assert found.objective == pytest.approx(0.0, abs=1e-3)


def test_a_warm_start_keeps_the_numbering() -> None:
    rows = blobs(2000, 30)
    before = kmeans(rows, 30, niter=20)
    moved = F.normalize(rows + 0.05 * torch.randn(rows.shape, generator=torch.Generator().manual_seed(1)), dim=1)
    after = kmeans(moved, 30, starts=[before.centroids], niter=5)
    assert (after.assignment == before.assignment).float().mean() > 0.95
    cold = kmeans(moved, 30, seed=7, niter=20)
    assert (cold.assignment == before.assignment).float().mean() < 0.3


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="3 rows cannot make 4 clusters"):
        kmeans(torch.randn(3, 2), 4)
    with pytest.raises(ValueError, match=r"a start of shape \(3, 2\) for 2 centroids"):
        kmeans(torch.randn(9, 2), 2, starts=[torch.randn(3, 2)])
