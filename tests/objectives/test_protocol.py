"""Who is compared with whom, and what an outcome can say about itself."""

import pytest
import torch
from gristmill.objectives.protocol import Outcome, StepInfo, pair_weights
from hypothesis import given
from hypothesis import strategies as st


def test_mugs_two_and_ten() -> None:
    weights = pair_weights(2, 12, 2)
    assert [weights[0][0], weights[0][1], weights[1][0], weights[1][1]] == [0.0, 0.25, 0.25, 0.0]
    assert all(weights[i][j] == 0.5 / 20 for i in range(2) for j in range(2, 12))


@given(teacher=st.integers(1, 4), large=st.integers(0, 4), small=st.integers(0, 6))
def test_weights_sum_to_one_and_halves_are_even(teacher: int, large: int, small: int) -> None:
    crops = large + small
    if crops == 0 or (teacher == 1 and crops == 1):
        with pytest.raises(ValueError, match="no pair"):
            pair_weights(teacher, crops, large)
        return
    weights = torch.tensor(pair_weights(teacher, crops, large), dtype=torch.float64)
    assert float(weights.sum()) == pytest.approx(1)
    assert all(weights[i, i] == 0 for i in range(min(teacher, crops)))
    halves = [float(weights[:, :large].sum()), float(weights[:, large:].sum())]
    assert halves == pytest.approx([0.5, 0.5]) or sorted(halves) == pytest.approx([0.0, 1.0])


def test_more_globals_than_crops_is_refused() -> None:
    with pytest.raises(ValueError, match="student_globals=3"):
        StepInfo(batch=4, student_crops=2, student_globals=3, teacher_crops=2).pair_weights()


def test_outcome_sees_what_is_not_finite() -> None:
    good = Outcome(torch.tensor(1.0), {}, {"rows": torch.ones(2, 2), "weak": torch.ones(2, dtype=torch.uint8)})
    assert bool(good.finite())
    assert not bool(Outcome(torch.tensor(float("nan")), {}, good.commit).finite())
    assert not bool(Outcome(good.loss, {}, {"rows": torch.tensor([1.0, float("inf")])}).finite())
