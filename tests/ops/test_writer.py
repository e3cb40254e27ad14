"""The writer: a true snapshot, all ranks or none, and the last good checkpoint survives whatever happens."""

import json
import threading
import time
from pathlib import Path

import pytest
import torch
from gristmill.ops.checkpoint import CheckpointError, Content, Part, Saved
from gristmill.ops.stores import LocalStore
from gristmill.ops.writer import Writer

from ..ranks import run_ranks
from ..waiting import wait_for
from .writers import ONE, Gated, content, halves, names, step, steps, value, write


def test_the_copy_is_a_snapshot(tmp_path: Path):
    store = Gated(tmp_path)
    tensors = {kind: torch.ones(3, 5, dtype=kind) for kind in (torch.float32, torch.bfloat16, torch.int64)}
    scalar, queue, state = torch.tensor(1.0), torch.ones(7).view(7, 1).expand(7, 2), {"cursor": [1]}
    parts = [Part("g", str(kind), 0, tuple(t.shape), t.view(-1)) for kind, t in tensors.items()]
    parts.append(Part("g", "scalar", 0, (), scalar.view(1)))
    writer = Writer(store, 0, 1, keep=1)
    waited = writer.begin(64, Content(parts, {"objectives": {"queue": queue, "scalar": scalar}}, state))
    assert waited >= 0
    for tensor in (*tensors.values(), scalar, queue[:, :1]):
        tensor.zero_()
    state["cursor"].append(2)
    assert writer.flags() == [0.0, 0.0]
    assert writer.busy
    store.gate.set()
    assert steps([writer])[0].failure is None
    assert not writer.busy
    saved = Saved(store, 64)
    for kind, tensor in tensors.items():
        assert torch.equal(saved.assembled("g")[str(kind)], torch.ones_like(tensor))
    assert saved.assembled("g")["scalar"].item() == saved.whole("objectives")["scalar"].item() == 1
    assert torch.equal(saved.whole("objectives")["queue"], torch.ones(7, 2))
    assert saved.state == {"cursor": [1]}


def test_asynchronous_equals_synchronous_bit_for_bit(tmp_path: Path):
    generator = torch.Generator().manual_seed(0)
    tensor = torch.randint(0, 256, (100_003 * 4,), dtype=torch.uint8, generator=generator).view(torch.float32)
    files = []
    for asynchronous in (True, False):
        folder = tmp_path / str(asynchronous)
        writer = Writer(LocalStore(folder), 0, 1, keep=1, asynchronous=asynchronous)
        for _ in range(2):  # the second time into the same host buffer
            writer.begin(64, content(tensor))
            writer.finish(ONE)
        files.append({path.name: path.read_bytes() for path in (folder / "000000000064").iterdir()})
    assert files[0] == files[1]
    assert files[0].keys() == {
        "rank-00000.safetensors",
        "whole-objectives.safetensors",
        "state.json",
        "state.digest",
    }


def test_the_host_buffer_is_kept_and_grows(tmp_path: Path):
    writer = Writer(LocalStore(tmp_path), 0, 1, keep=1)
    places = []
    for position, size in ((1, 1000), (2, 999), (3, 50_000), (4, 10)):
        writer.begin(position, content(torch.full((size,), float(position))))
        assert writer._buffer is not None
        places.append(writer._buffer.data_ptr())
        writer.finish(ONE)
        assert value(writer.store) == (position, position)  # pyright: ignore[reportArgumentType]
    assert places[0] == places[1]
    assert places[2] == places[3]


def test_nothing_is_published_before_all_ranks_have_written(tmp_path: Path):
    slow = Gated(tmp_path)
    writers = [Writer(LocalStore(tmp_path), 0, 2, keep=1), Writer(slow, 1, 2, keep=1)]
    for writer, part in zip(writers, halves(5.0), strict=True):
        writer.begin(64, part)
    until = time.monotonic() + 20
    while writers[0].flags() != [1.0, 0.0] and time.monotonic() < until:
        time.sleep(0.001)
    assert step(writers) == [None, None]
    assert LocalStore(tmp_path).positions() == []
    with pytest.raises(RuntimeError, match="64 is in flight"):
        writers[0].begin(128, halves(6.0)[0])
    slow.gate.set()
    settled = steps(writers)
    assert [each.position for each in settled] == [64, 64]
    assert settled[0].bytes == sum(path.stat().st_size for path in (tmp_path / "000000000064").glob("*.safetensors"))
    assert value(LocalStore(tmp_path)) == (64, 5.0)
    assert names(tmp_path) == ["000000000064"]
    assert step(writers) == [None, None]
    assert [writer.flags() for writer in writers] == [[0.0, 0.0]] * 2


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("asynchronous", [True, False])
def test_finish_publishes_on_all_ranks(tmp_path: Path, world: int, asynchronous: bool):
    def work(rank, total):
        writer = Writer(LocalStore(tmp_path), rank, world, keep=1, asynchronous=asynchronous)
        total([0.0])
        assert writer.finish(total) is None
        for position in (64, 128):
            writer.begin(position, content(torch.full((10,), float(position)), rank * 10, world * 10))
            settled = writer.finish(total)
            assert settled is not None
            assert (settled.position, writer.busy) == (position, False)
        writer.close()
        return settled

    results = run_ranks(world, work)
    assert [result.position for result in results] == [128] * world, results
    assert names(tmp_path) == ["000000000128"]
    assert value(LocalStore(tmp_path)) == (128, 128.0)


@pytest.mark.parametrize(
    ("keep", "keep_every", "left"),
    [
        (1, 0, [640]),
        (3, 0, [512, 576, 640]),
        (1, 128, [128, 256, 384, 512, 640]),
        (2, 256, [256, 512, 576, 640]),
        (1, 200, [256, 448, 640]),  # no position is a multiple: the first beyond each one
    ],
)
def test_what_is_kept(tmp_path: Path, keep: int, keep_every: int, left: list[int]):
    store = LocalStore(tmp_path)
    for position in range(64, 641, 64):
        settled = write(store, position, keep=keep, keep_every=keep_every)
        assert settled is not None
        assert settled.warning is None
    assert sorted(store.positions()) == left


def test_the_one_just_written_outlives_damaged_and_abandoned_ones_beyond_it(tmp_path: Path):
    store = LocalStore(tmp_path)
    for position in (64, 192, 256):
        write(store, position)
    (tmp_path / "000000000256" / "rank-00000.safetensors").unlink()  # passed over on loading
    write(store, 128, 3.0, keep=1)  # after going back to 64
    assert value(store) == (128, 3.0)
    assert names(tmp_path) == ["000000000128"]


def test_the_same_position_is_replaced(tmp_path: Path):
    store = LocalStore(tmp_path)
    for number in (1.0, 2.0):
        write(store, 64, number, keep=1)
        assert value(store) == (64, number)
    assert names(tmp_path) == ["000000000064"]


def test_finish_raises_on_all_ranks(tmp_path: Path):
    (tmp_path / ".writing-000000000064" / "rank-00001.safetensors").mkdir(parents=True)

    class Unswept(LocalStore):
        def prepare(self) -> None:
            pass

    def work(rank, total):
        writer = Writer(Unswept(tmp_path), rank, 2, keep=1)
        writer.begin(64, halves(1.0)[rank])
        writer.finish(total)

    for error in run_ranks(2, work):
        assert isinstance(error, CheckpointError)


def test_ranges_that_do_not_fit_are_not_published(tmp_path: Path):
    store = LocalStore(tmp_path)
    writers = [Writer(store, rank, 2, keep=1) for rank in range(2)]
    for writer, part in zip(writers, [halves(1.0)[0], content(torch.ones(10), 500, 1000)], strict=True):
        writer.begin(64, part)
    first, _ = steps(writers)
    assert "elements 333 to 500 of student w are held by no rank" in (first.failure or "")
    assert store.positions() == []


def test_closing_discards_what_was_not_published(tmp_path: Path):
    store = LocalStore(tmp_path)
    write(store, 64)
    writer = Writer(store, 0, 1, keep=1)
    writer.begin(128, content(torch.ones(3)))
    writer.close()
    writer.close()
    assert names(tmp_path) == ["000000000064"]
    # What `close` waits for is the last that the thread does, and it is alive for a moment yet.
    wait_for(lambda: "checkpoint" not in [thread.name for thread in threading.enumerate()], 60)


def test_the_state_is_json_that_a_person_can_read(tmp_path: Path):
    write(LocalStore(tmp_path), 64)
    text = (tmp_path / "000000000064" / "state.json").read_text()
    document = json.loads(text)
    assert document["index"] == [["student", "w", 0, 1000, "rank-00000.safetensors"]]
    assert document["tensors"] == {"student": {"w": {"dtype": "F32", "shape": [1000]}}}
    assert text.splitlines()[1:4] == ['"version": 2,', '"position": 64,', '"state": {"cursor": "{}"},']


@pytest.mark.gpu
def test_from_a_gpu_into_pinned_memory(tmp_path: Path):
    store = Gated(tmp_path)
    writer = Writer(store, 0, 1, keep=1)
    tensor = torch.full((10_000_000,), 5.0, device="cuda")
    writer.begin(64, content(tensor))
    tensor.zero_()
    assert writer._buffer is not None
    assert writer._buffer.is_pinned()
    store.gate.set()
    steps([writer])
    assert value(store) == (64, 5.0)
