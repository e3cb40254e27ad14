"""Draws of labelled images: balanced, nested, by the seed alone."""

import numpy as np
import pytest
import torch
from gristmill.ops.evaluate.subsets import SubsetError, draw_balanced, draw_stratified
from hypothesis import given
from hypothesis import strategies as st

LABELS = st.lists(st.integers(-1, 5), min_size=1, max_size=120).filter(lambda codes: max(codes) >= 0)


@given(LABELS, st.floats(0.01, 1.0), st.integers(0, 2**64 - 1))
def test_balanced_takes_as_many_of_each_class(codes: list[int], share: float, seed: int):
    labels = torch.tensor(codes)
    rows = draw_balanced(labels, share, seed)
    assert rows.tolist() == sorted(set(rows.tolist()))
    known = labels[labels >= 0]
    each = max(1, round(share * len(known) / len(known.unique())))
    for label in known.unique():
        assert int((labels[rows] == label).sum()) == min(each, int((known == label).sum()))
    assert int(labels[rows].min()) >= 0
    assert rows.equal(draw_balanced(labels.numpy(), share, seed))


@given(LABELS, st.integers(0, 1000))
def test_a_small_share_lies_in_a_large_one(codes: list[int], seed: int):
    labels = torch.tensor(codes)
    few, more = (set(draw_balanced(labels, share, seed).tolist()) for share in (0.05, 0.4))
    assert few <= more


@given(LABELS, st.floats(0.01, 0.9), st.integers(0, 1000))
def test_stratified_leaves_every_class_on_both_sides(codes: list[int], share: float, seed: int):
    labels = torch.tensor(codes)
    sizes = {int(label): codes.count(int(label)) for label in labels.unique() if label >= 0}
    if max(sizes.values()) < 2:
        with pytest.raises(SubsetError, match="no class has two images"):
            draw_stratified(labels, share, seed)
        return
    held = labels[draw_stratified(labels, share, seed)]
    for label, size in sizes.items():
        assert int((held == label).sum()) == min(size - 1, max(1, round(share * size)))


def test_the_seed_draws_and_classes_do_not_share_draws():
    labels = torch.arange(4).repeat_interleave(100)
    rows = draw_balanced(labels, 0.1, 0)
    assert rows.tolist() != draw_balanced(labels, 0.1, 1).tolist()
    assert len({tuple(part.tolist()) for part in (rows % 100).split(10)}) == 4
    # A class that goes moves no other's draw.
    without = draw_balanced(labels[100:], 0.1, 0) + 100
    assert without.tolist() == rows[10:].tolist()


@pytest.mark.parametrize(
    ("labels", "share", "said"),
    [([0, 1], 0.0, "share of 0.0"), ([0, 1], 1.5, "share of 1.5"), ([-1, -1], 0.5, "known label"), ([], 0.5, "known")],
)
def test_refused(labels: list[int], share: float, said: str):
    with pytest.raises(SubsetError, match=said):
        draw_balanced(np.array(labels, np.int64), share, 0)
