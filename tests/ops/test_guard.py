"""The verdict and the spikes in one process, number by number. On several ranks, in real runs: tests/distributed."""

import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
from gristmill.objectives import Outcome
from gristmill.ops.guard import DivergedError, Guard, GuardConfig, Spikes, Verdict
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

NAN, INF = math.nan, math.inf
SQUARES = torch.tensor([4.0, 9.0, 3.0], dtype=torch.float64)


def outcome(group: float = 1.0, instance: float = 2.0, **logs: float) -> Outcome:
    values = {"loss/instance": instance, "loss/group": group, "loss": (instance + group) / 2, **logs}
    tensors: dict[str, torch.Tensor | float] = {name: torch.tensor(value) for name, value in values.items()}
    return Outcome(
        torch.tensor((instance + group) / 2), {**tensors, "weight/group": 0.5}, {"group.mean": torch.ones(1, 4)}
    )


def judge(*outcomes: Outcome, squares: torch.Tensor = SQUARES, **settings: float) -> Verdict:
    return Guard(GuardConfig.model_validate(settings)).judge(
        list(outcomes), squares, partial=True, flags={"stop": 1.0, "fault": 0.0}
    )


def bad_verdict() -> Verdict:
    return judge(outcome(group=NAN))


def good_verdict(loss: float = 1.0) -> Verdict:
    return judge(outcome(loss, loss))


def test_a_good_step():
    verdict = judge(outcome(1.0, accuracy=0.25), outcome(3.0, accuracy=0.75))
    assert verdict.bad == []
    assert verdict.culprits == []
    assert verdict.flags == {"stop": 1.0, "fault": 0.0}
    assert verdict.logs == {"weight/group": 0.5, "loss/instance": 2.0, "loss/group": 2.0, "loss": 2.0, "accuracy": 0.5}
    assert torch.equal(verdict.norms, SQUARES.sqrt())
    assert verdict.grad_norm == 4.0


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("where", [0, 1])
def test_a_loss_in_any_micro_batch_names_its_objective(value: float, where: int):
    outcomes = [outcome(), outcome()]
    outcomes[where] = outcome(group=value)
    verdict = judge(*outcomes)
    assert verdict.bad == ["group", "loss"]
    assert verdict.culprits == [(0, "group"), (0, "loss")]
    assert not math.isfinite(verdict.logs["loss"])
    assert verdict.logs["loss/instance"] == 2.0


def test_a_loss_that_hides_behind_a_finite_log():
    one = outcome()
    one.loss = torch.tensor(NAN)
    assert judge(one).bad == ["loss"]


def test_memories_gradients_and_all_at_once():
    memory, spoiled = outcome(), SQUARES.clone()
    memory.commit["group.mean"][0, 2] = NAN
    spoiled[1] = NAN
    assert judge(outcome(), memory).culprits == [(0, "memory")]
    assert judge(outcome(), squares=spoiled).bad == ["gradient"]
    assert judge(outcome(), squares=spoiled).culprits == []
    assert math.isnan(judge(outcome(), squares=spoiled).grad_norm)
    overflowing = judge(outcome(), squares=SQUARES * 1e308)
    assert overflowing.bad == ["gradient"], "a norm that overflows would make clipping write zeros"
    assert judge(outcome(instance=INF), memory, squares=spoiled).bad == ["instance", "loss", "memory", "gradient"]


def test_other_logs_are_shown_and_decide_nothing():
    verdict = judge(outcome(accuracy=NAN, entropy=INF))
    assert verdict.bad == []
    assert math.isnan(verdict.logs["accuracy"])
    assert verdict.logs["entropy"] == INF


def test_nothing_to_remember_and_counters_that_are_whole_numbers():
    assert judge(Outcome(torch.tensor(1.0), {"loss": torch.tensor(1.0)}, {})).bad == []
    whole = Outcome(torch.tensor(1.0), {"loss": torch.tensor(1.0)}, {"weak": torch.ones(3, dtype=torch.uint8)})
    assert judge(whole).bad == []


def test_a_log_that_is_a_plain_number_is_judged_too():
    plain = Outcome(torch.tensor(1.0), {"loss/a": NAN, "loss": 1.0}, {})
    assert judge(plain).culprits == [(0, "a")]


def test_one_read_of_the_device_and_one_collective(monkeypatch: pytest.MonkeyPatch):
    """On fake CUDA tensors, which hold no numbers: every way to read one raises, but `tolist`, which is counted."""
    reads, sums = [], []
    monkeypatch.setattr(FakeTensor, "tolist", lambda self: reads.append(self.device.type) or [0.0] * self.numel())
    monkeypatch.setattr(dist, "all_reduce", lambda vector: sums.append(tuple(vector.shape)))
    with FakeTensorMode():
        zero = torch.zeros((), device="cuda")
        with pytest.raises(Exception, match="local_scalar_dense"):
            bool(zero)
        one = Outcome(
            zero, {"loss/a": zero, "loss": zero, "seen": zero, "t": 0.5}, {"rows": torch.zeros(3, 4, device="cuda")}
        )
        squares = torch.zeros(7, dtype=torch.float64, device="cuda")
        verdict = Guard(GuardConfig(), rank=1, world=3).judge(
            [one, one], squares, partial=True, flags={"stop": 0.0, "fault": 1.0}
        )
    assert reads == ["cuda"]
    assert sums == [(2 + 3 * 3 + 3 + 7,)], "flags, three kinds on three ranks, three logs, seven parameters"
    assert verdict.norms.device.type == "cuda"
    assert verdict.bad == []


# Bad steps in a row.


def test_patience_counts_in_a_row_only():
    guard = Guard(GuardConfig(patience=3))
    back = [guard.settle(v) for v in [bad_verdict(), bad_verdict(), good_verdict(), *[bad_verdict()] * 3]]
    assert back == [False] * 5 + [True]


def test_too_many_returns_end_the_run_with_what_to_do():
    guard = Guard(GuardConfig(patience=1, rollbacks=2))
    for _ in range(2):
        assert guard.settle(bad_verdict())
        guard.go_back(bad_verdict(), 96, ["a", "b", "c", "d"])
        assert guard.in_a_row == 0
    with pytest.raises(DivergedError) as error:
        guard.go_back(bad_verdict(), 144, ["a", "b", "c", "d"])
    for word in ("image 144", "group", "a, b, c)", "2 returns", "lower optimizer.lr", "gristmill replay"):
        assert word in str(error.value)


def test_state_makes_another_guard_the_same():
    first, second = Guard(GuardConfig(patience=3)), Guard(GuardConfig(patience=3))
    for verdict in (good_verdict(1.0), good_verdict(1.5), bad_verdict(), bad_verdict()):
        first.settle(verdict)
    first.rolled_back = 1
    second.load(first.state())
    assert second.state() == first.state()
    assert second.settle(bad_verdict())


# Spikes.

finite = st.floats(-1e3, 1e3, allow_nan=False)


@given(st.lists(finite, min_size=1, max_size=80), st.integers(10, 40))
@settings(deadline=None, max_examples=60)
@example([1.0] * 30, 10)
def test_mean_and_variance_are_those_of_weighted_steps(losses: list[float], window: int):
    """The reference: equal weights up to about half the window, then each step weighs 1 - share of the next one's."""
    spikes, config = Spikes(), GuardConfig(spike=6, spike_window=window)
    weights = np.zeros(0)
    for step, loss in enumerate(losses, 1):
        spikes.learn(loss, config)
        share = max(1 / step, 2 / (window + 1))
        weights = np.append(weights * (1 - share), share)
    mean = float(weights @ losses)
    assert weights.sum() == pytest.approx(1)
    assert spikes.mean == pytest.approx(mean, abs=1e-9)
    assert spikes.variance == pytest.approx(float(weights @ (np.array(losses) - mean) ** 2), rel=1e-6, abs=1e-9)
    assert spikes.steps == len(losses)


@given(st.integers(0, 2**32 - 1), st.floats(0.01, 0.5), st.floats(0.0, 3.0))
@settings(deadline=None, max_examples=60)
def test_a_noisy_falling_loss_has_none_and_fifty_times_of_it_is_one(seed: int, noise: float, fall: float):
    config, spikes = GuardConfig(spike=6), Spikes()
    draws = np.random.default_rng(seed).normal(size=400)
    losses = 5 + fall * np.exp(-np.arange(400) / 150) + noise * draws
    for loss in losses:
        assert not spikes.high(float(loss), config)
        spikes.learn(float(loss), config)
    assert spikes.high(50 * float(losses[-1]), config)
    assert not spikes.high(0.0, config), "a loss that falls is no spike"


def test_a_loss_that_stands_still_may_be_rounded():
    config, spikes = GuardConfig(spike=6), Spikes()
    for _ in range(200):
        spikes.learn(4.0, config)
    assert not spikes.high(4.0 + 1e-6, config)
    assert spikes.high(4.1, config)


def test_off_by_default_and_silent_until_the_window_is_full():
    on, off = Guard(GuardConfig(spike=6, spike_window=10)), Guard(GuardConfig())
    for step in range(12):
        for guard in (on, off):
            verdict = guard.judge([outcome(2 + step % 2, 2.0)], SQUARES, partial=True)
            assert verdict.bad == []
            guard.settle(verdict)
            high = guard.judge([outcome(100.0, 100.0)], SQUARES, partial=True)
            assert high.bad == (["spike"] if guard is on and step >= 9 else [])
    before = on.spikes.steps
    on.settle(on.judge([outcome(100.0, 100.0)], SQUARES, partial=True))
    assert on.spikes.steps == before, "what is left out teaches nothing"
