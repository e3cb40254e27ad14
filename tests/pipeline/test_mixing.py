"""The mixture is a function of the position: exact shares, no gap in any data set's own positions, no history."""

import numpy as np
import pytest
from gristmill.pipeline.mixing import BLOCK, Mixing, MixingError, proportions
from gristmill.pipeline.order import OrderError
from hypothesis import given, settings
from hypothesis import strategies as st

weights_ = st.lists(
    st.one_of(st.integers(0, 20), st.floats(0, 10, allow_nan=False)).map(float), min_size=1, max_size=6
).filter(any)


def walk(mixing, stop):
    source, own = mixing.at(np.arange(stop))
    assert source.dtype == own.dtype == np.int64
    return source, own


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**64 - 1), weights_, st.data())
def test_own_positions_follow_each_other_and_shares_are_exact(seed, weights, data):
    """Also over changes of weights, in the middle of blocks, and for data sets that join or pause."""
    k = len(weights)
    history, at = [(0, tuple(weights))], 0
    for _ in range(data.draw(st.integers(0, 2))):
        at += data.draw(st.integers(1, 3 * BLOCK))
        history.append((at, tuple(data.draw(st.lists(st.integers(0, 9), min_size=k, max_size=k).filter(any)))))
    mixing = Mixing(seed, k, tuple(history))
    stop = at + 5 * BLOCK + 17
    source, own = walk(mixing, stop)
    for s in range(k):
        assert np.array_equal(own[source == s], np.arange((source == s).sum()))
    for p in {0, stop, *(start for start, _ in history), data.draw(st.integers(0, stop))}:
        assert mixing.counts(p).tolist() == np.bincount(source[:p], minlength=k).tolist()
    # Whole blocks of an era hold their share to less than one a halving.
    halvings = (k - 1).bit_length()
    for (start, w), end in zip(history, [start for start, _ in history[1:]] + [stop], strict=True):
        parts = np.array(proportions(w, k))
        for blocks in range(1, (end - start) // BLOCK + 1):
            got = np.bincount(source[start : start + blocks * BLOCK], minlength=k)
            assert (np.abs(got - blocks * BLOCK * parts / parts.sum()) <= halvings).all()
            assert (got[parts == 0] == 0).all()


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 2**64 - 1), weights_, st.lists(st.integers(0, 10**15), min_size=1, max_size=12))
def test_any_position_alone_gives_the_same(seed, weights, positions):
    mixing = Mixing(seed, len(weights), ((0, tuple(weights)),))
    source, own = mixing.at(np.array(positions))
    for p, s, i in zip(positions, source.tolist(), own.tolist(), strict=True):
        one = mixing.at(np.array([p]))
        assert (int(one[0][0]), int(one[1][0])) == (s, i)
        assert mixing.counts(p)[s] == i
        assert mixing.counts(p + 1)[s] == i + 1
        assert mixing.counts(p).sum() == p
        if p < 10**6:
            assert mixing.reach(s, i + 1) == p + 1


def test_every_block_has_its_share_and_a_shuffle_of_its_own():
    source, _ = walk(Mixing(7, 3, ((0, (0.5, 0.25, 0.25)),)), 400 * BLOCK)
    blocks = source.reshape(-1, BLOCK)
    for s, n in enumerate([128, 64, 64]):
        assert ((blocks == s).sum(axis=1) == n).all()
    assert len(np.unique(blocks, axis=0)) == 400
    # Each slot of a block holds each data set about as often: 400 blocks, five standard deviations.
    assert np.abs((blocks == 0).mean(axis=0) - 0.5).max() < 5 * 0.5 / 20
    other, _ = walk(Mixing(8, 3, ((0, (0.5, 0.25, 0.25)),)), 400 * BLOCK)
    assert 0.3 < (source == other).mean() < 0.45  # 0.375 by chance


def test_a_rare_data_set_comes_at_its_rate():
    source, _ = walk(Mixing(1, 2, ((0, (0.999, 0.001)),)), 200_000)
    where = np.flatnonzero(source == 1)
    assert len(where) in (199, 200, 201)
    assert np.abs(np.diff(where) - 1000).max() <= 3 * BLOCK


def test_golden_values():
    """Part of the contract, as the plain order is."""
    mixing = Mixing(1234, 3, ((0, (0.7, 0.2, 0.1)), (300, (1.0, 0.0, 3.0))))
    at = np.array([*range(12), 298, 299, 300, 301, 302, 303, 10**15])
    assert np.stack(mixing.at(at), axis=1).tolist() == GOLDEN


GOLDEN = [
    [0, 0],
    [0, 1],
    [2, 0],
    [0, 2],
    [0, 3],
    [0, 4],
    [1, 0],
    [0, 5],
    [0, 6],
    [2, 1],
    [0, 7],
    [0, 8],
    [1, 55],
    [0, 210],
    [0, 211],
    [2, 33],
    [0, 212],
    [2, 34],
    [2, 749999999999808],
]


def test_weights_are_read_as_the_decimals_they_are():
    assert proportions([0.7, 0.2, 0.1], 3) == [7, 2, 1]
    assert proportions([2, 2], 3) == [1, 1, 0]
    assert proportions([1 / 3, 2 / 3], 2)[1] / proportions([1 / 3, 2 / 3], 2)[0] == pytest.approx(2, rel=1e-5)
    assert proportions([1.0, 1e-12], 2)[1] == 1  # rare, but never silently left out


@pytest.mark.parametrize("weights", [(), (0.0,), (-1.0, 2.0), (float("nan"), 1.0), (float("inf"), 1.0), (1, 1, 1)])
def test_impossible_weights_are_refused(weights):
    with pytest.raises(MixingError, match="weight"):
        Mixing(0, 2, ((0, weights),))


def test_impossible_histories_and_positions_are_refused():
    for history in (
        (),
        ((1, (1.0, 1.0)),),
        ((0, (1.0, 1.0)), (0, (1.0, 2.0))),
        ((0, (1.0,)), (9, (1.0,)), (5, (1.0,))),
    ):
        with pytest.raises(MixingError, match="position 0"):
            Mixing(0, 2, history)
    with pytest.raises(OrderError, match="from 0 on"):
        Mixing(0, 2, ((0, (1.0, 1.0)),)).at(np.array([-1]))
    with pytest.raises(MixingError, match="weight 0"):
        Mixing(0, 2, ((0, (1.0, 0.0)),)).reach(1, 5)
