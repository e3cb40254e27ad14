"""ZeRO 0 to 3 on two and three gloo ranks equal a plain loop: weights, teacher, bad steps, held groups, coverage."""

from pathlib import Path

import pytest

from .zygote import Zygote

TOLERANCE = 3e-7  # weights move by 4e-2


@pytest.fixture(scope="module", params=[2, 3])
def found(
    request: pytest.FixtureRequest, zygote: Zygote, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, float]]:
    return zygote.cases("engine_cases", request.param, tmp_path_factory.mktemp(f"ranks{request.param}"))


def test_weights_equal_a_plain_loop_that_never_saw_the_bad_steps(found):
    assert len(found) >= 11
    for case, gaps in found.items():
        assert gaps["moved"] > 4e-3, case
        assert gaps["drift"] < 2e-3, case
        # Averages over ranks are rounded to bf16 on the way there, and AdamW divides next to nothing by itself.
        assert gaps["weights"] < TOLERANCE or "bf16" in case, case


def test_teacher_is_the_fp32_average_of_the_masters(found):
    for case, gaps in found.items():
        assert gaps["ema"] == 0.0, case
        assert gaps["shadow_dtype"] == 0.0, case


def test_teacher_forward_reads_the_new_average_without_any_gather_between(found):
    for case, gaps in found.items():
        assert gaps["forward"] < 1e-6, case
        assert gaps["frozen"] == 1.0, case  # the rate of the first step is 0: only then nothing moves


def test_bad_steps_name_rank_and_objective(found):
    assert not any(gaps["culprit"] for gaps in found.values())


def test_last_layer_is_frozen_without_step_or_moments_and_then_thaws(found):
    for case, gaps in found.items():
        assert gaps["moved_frozen"] == 0.0, case
        assert gaps["held"] == 0.0, case


def test_float_buffers_stay_fp32(found):
    assert not any(gaps["buffer"] for gaps in found.values())


def test_every_element_is_written_by_exactly_one_rank(found):
    assert not any(gaps["covered"] for gaps in found.values())


def test_no_segment_is_left_in_shared_memory(found):
    assert not list(Path("/dev/shm").glob("*deepspeed*"))
