"""The writer: a true snapshot, all ranks or none, and the last good checkpoint survives whatever happens."""

import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import gristmill.ops.writer as module
import pytest
import torch
from gristmill.ops.checkpoint import CheckpointError, Content, Part, Saved, newest
from gristmill.ops.stores import LocalStore
from gristmill.ops.writer import Settled, Writer
from torch import Tensor

run_ranks = runpy.run_path(str(Path(__file__).parents[1] / "ranks.py"))["run_ranks"]
ONE = list  # `total` of a single rank


def content(tensor: Tensor, start: int = 0, size: int | None = None) -> Content:
    part = Part("student", "w", start, (size or tensor.numel(),), tensor)
    return Content([part], {"objectives": {"queue": torch.ones(9)}}, {"cursor": "{}"})


def halves(value: float, size: int = 1000) -> list[Content]:
    tensor = torch.full((size,), value)
    return [content(tensor[: size // 3], 0, size), content(tensor[size // 3 :], size // 3, size)]


def write(store: LocalStore, position: int, value: float = 1.0, keep: int = 9, keep_every: int = 0) -> Settled | None:
    writer = Writer(store, 0, 1, keep, keep_every)
    writer.begin(position, content(torch.full((1000,), value)))
    return writer.finish(ONE)


def value(store: LocalStore) -> tuple[int, float]:
    """(position, the number in it) of the newest whole checkpoint."""
    saved, _ = newest(store)
    assert saved is not None
    numbers = saved.assembled("student")["w"].unique().tolist()
    assert len(numbers) == 1
    return saved.position, numbers[0]


def step(writers: list[Writer]) -> list[Settled | None]:
    """What the loop does at each step: flags added up over ranks, then settled on all."""
    sums = [sum(column) for column in zip(*(writer.flags() for writer in writers), strict=True)]
    return [writer.settle(*sums) for writer in writers]


def steps(writers: list[Writer]) -> list[Settled]:
    """Steps until the write is settled, on all ranks at the same one."""
    until = time.monotonic() + 30
    while time.monotonic() < until:
        settled = step(writers)
        if any(settled):
            assert all(settled)
            return [each for each in settled if each]
        time.sleep(0.001)
    raise TimeoutError("the write was not settled")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class Gated(LocalStore):
    """Writes files only once `gate` is set."""

    def __init__(self, root: Path):
        super().__init__(root)
        self.gate = threading.Event()

    def put(self, position: int, name: str, chunks: Iterable[memoryview]) -> tuple[str, int]:
        assert self.gate.wait(30)
        return super().put(position, name, chunks)


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


def test_one_rank_that_cannot_write_costs_the_checkpoint_on_all(tmp_path: Path):
    store = LocalStore(tmp_path)
    writers = [Writer(store, rank, 2, keep=1) for rank in range(2)]
    for writer, part in zip(writers, halves(1.0), strict=True):
        writer.begin(64, part)
    steps(writers)
    hindrance = tmp_path / ".writing-000000000128" / "rank-00001.safetensors"
    hindrance.mkdir(parents=True)
    for writer, part in zip(writers, halves(2.0), strict=True):
        writer.begin(128, part)
    first, second = steps(writers)
    assert first.failure is not None
    assert "another rank could not" in first.failure
    assert second.failure is not None
    assert "Is a directory" in second.failure
    assert "Older checkpoints are untouched" in second.failure
    assert names(hindrance.parent) == ["rank-00001.safetensors"]  # only what was there before
    assert value(store) == (64, 1.0)
    hindrance.rmdir()
    for writer, part in zip(writers, halves(3.0), strict=True):
        writer.begin(128, part)
    assert [settled.failure for settled in steps(writers)] == [None, None]
    assert value(store) == (128, 3.0)
    assert names(tmp_path) == ["000000000128"]


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


def test_a_failure_to_publish_is_known_to_all_ranks(tmp_path: Path):
    class Broken(LocalStore):
        def publish(self, position, state, spare):
            raise OSError(28, "No space left on device")

    writers = [Writer(Broken(tmp_path), rank, 2, keep=1) for rank in range(2)]
    for writer, part in zip(writers, halves(1.0), strict=True):
        writer.begin(64, part)
    first, second = steps(writers)
    assert "No space left on device" in (first.failure or "")
    assert "another rank" in (second.failure or "")
    assert names(tmp_path) == []


def test_ranks_that_do_not_share_the_folder_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "PATIENCE", 0.2)
    writers = [Writer(LocalStore(tmp_path / str(rank)), rank, 2, keep=1) for rank in range(2)]
    for writer, part in zip(writers, halves(1.0), strict=True):
        writer.begin(64, part)
    first, _ = steps(writers)
    assert "all ranks must share this place" in (first.failure or "")
    assert [names(tmp_path / str(rank)) for rank in range(2) if (tmp_path / str(rank)).exists()] == [[], []]


def test_ranges_that_do_not_fit_are_not_published(tmp_path: Path):
    store = LocalStore(tmp_path)
    writers = [Writer(store, rank, 2, keep=1) for rank in range(2)]
    for writer, part in zip(writers, [halves(1.0)[0], content(torch.ones(10), 500, 1000)], strict=True):
        writer.begin(64, part)
    first, _ = steps(writers)
    assert "elements 333 to 500 of student w are held by no rank" in (first.failure or "")
    assert store.positions() == []


def test_faults_of_the_program_are_raised(tmp_path: Path):
    class Faulty(LocalStore):
        def put(self, position, name, chunks):
            raise ZeroDivisionError("a bug")

    writer = Writer(Faulty(tmp_path), 0, 1, keep=1)
    writer.begin(64, content(torch.ones(3)))
    with pytest.raises(ZeroDivisionError, match="a bug"):
        steps([writer])
    assert not writer.busy
    for parts in (
        [Part("g", "w", 0, (4,), torch.ones(2, 2))],
        [Part("g", "w", 3, (4,), torch.ones(2))],
        [Part("g", "w", 0, (4,), torch.ones(2)), Part("g", "w", 0, (4,), torch.ones(4))],
        [Part("../g", "w", 0, (4,), torch.ones(4))],
    ):
        with pytest.raises(ValueError, match="g"):
            writer.begin(64, Content(parts))
        assert not writer.busy
    with pytest.raises(TypeError):
        writer.begin(64, Content(state={"x": object()}))
    with pytest.raises(ValueError, match="keep"):
        Writer(LocalStore(tmp_path), 0, 1, keep=0)


def test_closing_discards_what_was_not_published(tmp_path: Path):
    store = LocalStore(tmp_path)
    write(store, 64)
    writer = Writer(store, 0, 1, keep=1)
    writer.begin(128, content(torch.ones(3)))
    writer.close()
    writer.close()
    assert names(tmp_path) == ["000000000064"]
    assert not [thread for thread in threading.enumerate() if thread.name == "checkpoint"]


@contextmanager
def small_disk(place: Path) -> Iterator[Path]:
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


def test_a_full_disk_costs_the_checkpoint_and_not_the_run(tmp_path: Path):
    with small_disk(tmp_path / "disk") as disk:
        store = LocalStore(disk)
        writer = Writer(store, 0, 1, keep=2)
        writer.begin(64, content(torch.ones(100_000)))
        assert steps([writer])[0].failure is None
        (disk / "other").write_bytes(bytes(500_000))
        for position in (128, 192):
            writer.begin(position, content(torch.full((100_000,), 2.0)))
            failure = steps([writer])[0].failure or ""
            assert "No space left on device" in failure
            assert "MB free there" in failure
            assert "make room" in failure
            assert names(disk) == ["000000000064", "other"]
            assert value(store) == (64, 1.0)
        (disk / "other").unlink()
        writer.begin(256, content(torch.full((100_000,), 3.0)))
        assert steps([writer])[0].failure is None
        assert value(store) == (256, 3.0)
        for size in (150_000, 30_000):  # no room for the data; then for the data, but not for its neighbour
            writer.begin(320, content(torch.full((size,), 4.0)))
            with pytest.raises(CheckpointError, match="make room"):
                writer.finish(ONE)
            (disk / "other").write_bytes(bytes(100_000))


def test_a_limit_on_file_sizes_is_a_full_disk_for_everyone(tmp_path: Path):
    write(LocalStore(tmp_path), 64)
    code = f"""
import resource, torch
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
from pathlib import Path
from gristmill.ops.checkpoint import CheckpointError, Content, Part
from gristmill.ops.stores import LocalStore
from gristmill.ops.writer import Writer
writer = Writer(LocalStore(Path({str(tmp_path)!r})), 0, 1, keep=1)
writer.begin(128, Content([Part("student", "w", 0, (10**6,), torch.ones(10**6))]))
try: writer.finish(list)
except CheckpointError as error: print(error)
"""
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "could not write the checkpoint" in answer.stdout, answer.stderr
    assert "make room" in answer.stdout
    assert names(tmp_path) == ["000000000064"]
    assert value(LocalStore(tmp_path)) == (64, 1.0)


# Forks one process for each moment: the k-th time that anything is opened, renamed or removed in the folder, or after a
# number of microseconds. Each finds the checkpoint at 64 with ones, writes 64 anew with twos, then 128 with threes.
VICTIM = """
import os, signal, sys, torch
from pathlib import Path
from gristmill.ops.checkpoint import Content, Part
from gristmill.ops.stores import LocalStore
from gristmill.ops.writer import Writer
folder, moment, seen = {folder!r}, int(sys.argv[1]), 0
torch.set_num_threads(1)

def write(writer, position, number):
    whole = {{"objectives": {{"queue": torch.full((9,), number)}}}}
    writer.begin(position, Content([Part("student", "w", 0, ({size},), torch.full(({size},), number))], whole, {{}}))
    writer.finish(list)

def watch(event, arguments):
    global seen
    if event in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.listdir", "os.scandir"):
        if isinstance(arguments[0], (str, os.PathLike)) and str(arguments[0]).startswith(folder + "/"):
            seen += 1
            if seen == moment:
                os.kill(os.getpid(), signal.SIGKILL)

for line in sys.stdin:
    moment = int(line)
    child = os.fork()
    if not child:
        if moment > 0:
            sys.addaudithook(watch)
        else:
            signal.setitimer(signal.ITIMER_REAL, -moment / 1e6)  # its default action ends the process at once
        writer = Writer(LocalStore(Path(folder)), 0, 1, keep=2)
        write(writer, 64, 2.0)
        write(writer, 128, 3.0)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@contextmanager
def victims(folder: Path, size: int) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", VICTIM.format(folder=str(folder), size=size), "0"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdin
    try:
        yield process
    finally:
        process.stdin.close()
        process.wait(30)


def kill_at(process: subprocess.Popen[str], moment: int) -> int:
    assert process.stdin
    assert process.stdout
    process.stdin.write(f"{moment}\n")
    process.stdin.flush()
    return int(process.stdout.readline())


def test_killed_at_every_file_operation(tmp_path: Path):
    """Some forty moments, one after the other; each kill leaves a mess that the next writer sweeps."""
    folder = tmp_path / "checkpoints"
    store = LocalStore(folder)
    write(store, 64, 1.0)
    found = set()
    with victims(folder, size=2000) as process:
        for moment in range(1, 1000):
            code = kill_at(process, moment)
            found.add(value(store))
            assert newest(store)[1] == [], "no kill leaves a damaged checkpoint"
            if code == 0:
                break
            assert code == -signal.SIGKILL
            if moment % 7 == 0:  # as if the run had begun from the first one again
                shutil.rmtree(folder / "000000000128", ignore_errors=True)
    assert moment > 20
    assert found == {(64, 1.0), (64, 2.0), (128, 3.0)}
    assert names(folder) == ["000000000064", "000000000128"]


def test_killed_while_bytes_are_written(tmp_path: Path):
    folder = tmp_path / "checkpoints"
    store = LocalStore(folder)
    write(store, 64, 1.0)
    codes = []
    with victims(folder, size=4_000_000) as process:
        for moment in range(5000, 80_000, 5000):  # 5 to 75 ms; a write of 16 MB takes about that long
            codes.append(kill_at(process, -moment))
            assert value(store) in {(64, 1.0), (64, 2.0), (128, 3.0)}
            assert newest(store)[1] == []
    assert -signal.SIGALRM in codes
    write(store, 192, 4.0, keep=1)
    assert names(folder) == ["000000000192"]


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
