"""The signs of collapse where their values are known."""

import math

import pytest
import torch
from gristmill.objectives.health import feature_std, rank_me
from hypothesis import given, settings
from hypothesis import strategies as st


@given(rank=st.integers(1, 8), seed=st.integers(0, 100))
@settings(max_examples=30, deadline=None)
def test_rank_of_equal_singular_values(rank: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    left, _ = torch.linalg.qr(torch.randn(20, 8, generator=generator, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(8, 8, generator=generator, dtype=torch.float64))
    x = left[:, :rank] @ right[:rank]
    assert rank_me(x) == pytest.approx(rank, rel=1e-6)
    assert rank_me(x * 1e-3) == pytest.approx(rank, rel=1e-6)


def test_rank_follows_its_formula() -> None:
    x = torch.randn(30, 5, generator=torch.Generator().manual_seed(0))
    shares = torch.linalg.svdvals(x.double())
    shares = shares / shares.sum()
    assert rank_me(x) == pytest.approx(math.exp(-float((shares * shares.log()).sum())), rel=1e-9)
    assert rank_me(torch.zeros(4, 3)) == 0.0
    assert math.isnan(rank_me(torch.full((4, 3), float("nan"))))


def test_spread() -> None:
    x = torch.randn(4000, 32, generator=torch.Generator().manual_seed(0))
    assert feature_std(x) == pytest.approx(1, abs=0.02)
    assert feature_std(x[:1].expand(10, -1)) == pytest.approx(0, abs=1e-6)
    assert feature_std(x[:1] + 0.1 * x) < 0.3
    assert math.isnan(feature_std(torch.full((4, 3), float("nan"))))


def test_shapes_that_say_nothing_are_refused() -> None:
    for shape in ((1, 4), (4,)):
        with pytest.raises(ValueError, match="two rows"):
            rank_me(torch.zeros(shape))
