"""The ring against a deque, the official pointer against recorded numbers, and what a memory keeps beside its rows."""

from collections import deque
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from gristmill.objectives.memory import RingMemory
from hypothesis import given, settings
from hypothesis import strategies as st

VECTORS = Path(__file__).parents[1] / "vectors"


def numbered(start: int, count: int, dim: int = 3) -> torch.Tensor:
    """Rows that tell their own number: [count, dim], row r is r, r, r."""
    return torch.arange(start, start + count, dtype=torch.float32).unsqueeze(1).expand(count, dim) + 1.0


@given(capacity=st.integers(1, 12), data=st.data())
@settings(max_examples=80, deadline=None)
def test_ring_is_a_deque(capacity: int, data: st.DataObject) -> None:
    counts = data.draw(st.lists(st.integers(0, capacity), max_size=12))
    memory = RingMemory(capacity, 3, seed=1, unit=False)
    expected: deque[tuple[float, int]] = deque(maxlen=capacity)  # (row, step of its enqueue), oldest first
    sent = 0
    for step, count in enumerate(counts):
        memory.enqueue(numbered(sent, count))
        expected.extend((float(sent + r + 1), step) for r in range(count))
        sent += count
        newest_last = memory.rows.roll(-memory.pointer, 0)[capacity - len(expected) :, 0]
        assert newest_last.tolist() == [row for row, _ in expected]
        assert memory.pointer == sent % capacity
        assert memory.filled == len(expected) == min(sent, capacity)
        stats = memory.stats()
        assert stats["fill"] == len(expected) / capacity
        if expected:
            assert stats["age"] == pytest.approx(sum(step + 1 - s for _, s in expected) / len(expected))
            assert float(stats["norm"]) == pytest.approx(sum(row for row, _ in expected) / len(expected) * 3**0.5)


@given(capacity=st.integers(1, 12), data=st.data())
@settings(max_examples=80, deadline=None)
def test_official_pointer_from_its_rule(capacity: int, data: st.DataObject) -> None:
    """Written from the notes: rows go to the pointer and on from 0; it moves by 2n, or by n where the write wrapped."""
    memory = RingMemory(capacity, 3, seed=1, unit=False, compat=True)
    slots, pointer, sent = memory.rows[:, 0].tolist(), 0, 0
    for count in data.draw(st.lists(st.integers(0, capacity), max_size=12)):
        memory.enqueue(numbered(sent, count))
        for r in range(count):
            slots[(pointer + r) % capacity] = float(sent + r + 1)
        over = pointer + count - capacity
        pointer = over if over > 0 else (pointer + 2 * count) % capacity
        sent += count
        assert memory.rows[:, 0].tolist() == slots
        assert memory.pointer == pointer


def test_official_pointer_leaves_half_of_the_slots() -> None:
    memory = RingMemory(32, 4, seed=0, unit=False, compat=True)
    for _ in range(50):
        memory.enqueue(torch.ones(4, 4))
    assert memory.stats()["fill"] == 0.5


def test_official_memory_exactly() -> None:
    """All three recorded buffers, through one memory each: rows, pointer, nearest slots and neighbours."""
    vector = torch.load(VECTORS / "mugs_memory.pt", weights_only=True)
    banks = {}
    for part in ("queue_q", "queue_k", "queue_v"):
        bank = banks[part] = RingMemory(vector["K"], vector["D"], seed=0, unit=False, compat=True)
        bank.load({**bank.state(), "rows": vector["init"][f"block.{part}"]})
    for step in vector["steps"]:
        cosine = F.normalize(step["query"], dim=1) @ F.normalize(banks["queue_q"].rows, dim=1).T
        index = cosine.topk(vector["top_n"], dim=1).indices
        assert torch.equal(index, step["index"])
        assert torch.equal(banks["queue_k"].rows[index], step["keys"])
        assert torch.equal(banks["queue_v"].rows[index], step["values"])
        rows = step["enqueue"] if step["weak_flags"] is None else step["enqueue"][step["weak_flags"]]
        for part, bank in banks.items():
            bank.enqueue(rows)
            assert torch.equal(bank.rows, step["state_after"][f"block.{part}"])
            assert bank.pointer == step["ptr_after"] == int(step["state_after"]["block.queue_ptr"])


@pytest.mark.parametrize("capacity", [8, 256, 700])
def test_caches_follow_the_rows(capacity: int) -> None:
    memory = RingMemory(capacity, 33, seed=3, unit=False)
    generator = torch.Generator().manual_seed(0)
    for count in (3, 0, 8, 5, 7, capacity, capacity - 1, 1, capacity // 2):
        memory.enqueue(torch.randn(count, 33, generator=generator))
        torch.testing.assert_close(memory.norms, memory.rows.norm(dim=1))
        fresh = RingMemory(capacity, 33, seed=4, unit=False)
        fresh.load(memory.state())
        assert torch.equal(fresh.norms, memory.norms)  # bit for bit, or a resumed search could differ
        assert fresh.stats() == memory.stats()


def test_start_is_keyed_by_seed_and_name() -> None:
    first = RingMemory(16, 4, seed=5, unit=False, name="a").rows
    before = torch.random.get_rng_state()
    assert torch.equal(first, RingMemory(16, 4, seed=5, unit=False, name="a").rows)
    assert torch.equal(before, torch.random.get_rng_state())
    assert not torch.equal(first, RingMemory(16, 4, seed=6, unit=False, name="a").rows)
    assert not torch.equal(first, RingMemory(16, 4, seed=5, unit=False, name="b").rows)
    unit = RingMemory(16, 4, seed=5, unit=True, name="a")
    torch.testing.assert_close(unit.rows.norm(dim=1), torch.ones(16))
    wide = RingMemory(4096, 8, seed=0, unit=False).rows
    assert abs(float(wide.mean())) < 0.02
    assert abs(float(wide.std()) - 1) < 0.02


@pytest.mark.parametrize("compat", [False, True])
def test_state_comes_back_bit_for_bit(compat: bool) -> None:
    memory = RingMemory(6, 3, seed=1, unit=False, compat=compat)
    memory.enqueue(numbered(0, 4))
    state = memory.state()
    assert all(tensor.is_contiguous() for tensor in state.values())
    twin = RingMemory(6, 3, seed=2, unit=False, compat=compat)
    stale = twin.norms  # a cache that a load must drop
    twin.load(state)
    assert not torch.equal(stale, twin.norms)
    for each in (memory, twin):
        each.enqueue(numbered(9, 5))
    assert state["step"] == 1  # the state is a copy, not a view of the memory
    for key, tensor in memory.state().items():
        assert torch.equal(tensor, twin.state()[key]), key
    assert torch.equal(memory.norms, twin.norms)
    assert memory.stats() == twin.stats()


def test_foreign_states_are_refused_and_change_nothing() -> None:
    memory = RingMemory(6, 3, seed=1, unit=False, name="bank")
    before = memory.state()
    for state, message in [
        (RingMemory(7, 3, seed=1, unit=False).state(), "bank.rows"),
        ({"rows": before["rows"]}, "expected"),
        ({**before, "rows": before["rows"].double()}, "float64"),
        ({**before, "pointer": torch.tensor(6)}, "bank.pointer"),
    ]:
        with pytest.raises(ValueError, match=message):
            memory.load(state)
        assert all(torch.equal(before[key], tensor) for key, tensor in memory.state().items())


def test_what_does_not_fit_is_refused() -> None:
    memory = RingMemory(6, 3, seed=1, unit=False, name="bank")
    before = memory.state()
    with pytest.raises(ValueError, match="brings 7 rows"):
        memory.enqueue(torch.zeros(7, 3))
    with pytest.raises(ValueError, match="rows of 4 numbers"):
        memory.enqueue(torch.zeros(2, 4))
    assert all(torch.equal(before[key], tensor) for key, tensor in memory.state().items())
    with pytest.raises(ValueError, match="positive"):
        RingMemory(0, 3, seed=1, unit=False)


@pytest.mark.parametrize("compat", [False, True])
@pytest.mark.parametrize(("capacity", "rows"), [(64, 4), (60, 8), (256, 16), (64, 64), (48, 2)])
def test_age_settles_at_what_was_expected(compat: bool, capacity: int, rows: int):
    memory = RingMemory(capacity, 4, seed=0, unit=False, compat=compat)
    ages = []
    for _ in range(10 * capacity // rows):
        memory.enqueue(torch.ones(rows, 4))
        ages.append(float(memory.stats()["age"]))
    if compat and (capacity, rows) == (60, 8):
        assert "expected_age" not in memory.stats()  # some slots are passed over for a long time
        return
    settled = ages[-2 * capacity // rows :]
    expected = float(memory.stats()["expected_age"])
    assert sum(settled) / len(settled) == pytest.approx(expected, rel=0.15)
    twin = RingMemory(capacity, 4, seed=1, unit=False, compat=compat)
    twin.load(memory.state())
    assert twin.stats()["expected_age"] == expected


def test_rows_that_are_not_finite_are_counted():
    memory = RingMemory(512, 4, seed=0, unit=True)
    memory.enqueue(torch.nn.functional.normalize(torch.randn(8, 4), dim=1))
    assert int(memory.stats()["nonfinite"]) == 0
    memory.enqueue(torch.tensor([[float("nan"), 0, 0, 0], [1.0, 0, 0, 0], [float("inf"), 0, 0, 0]]))
    assert int(memory.stats()["nonfinite"]) == 2
