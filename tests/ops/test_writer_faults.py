"""The writer on disks that refuse, on ranks that fail and in processes that are killed: the last good checkpoint stays."""

import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import gristmill.ops.writer as module
import pytest
import torch
from gristmill.ops.checkpoint import CheckpointError, Content, Part, newest
from gristmill.ops.stores import LocalStore
from gristmill.ops.writer import Writer

from ..disks import small_disk
from ..workers import Workers
from .writers import ONE, content, halves, names, steps, value, write


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


def test_a_full_disk_costs_the_checkpoint_and_not_the_run(tmp_path: Path):
    with small_disk(tmp_path / "disk", "1m") as disk:
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


# A process for each moment: the k-th time that anything is opened, renamed or removed in the folder, or after a number of
# microseconds. Each finds the checkpoint at 64 with ones, writes 64 anew with twos, then 128 with threes.
VICTIM = """
    import os, resource, signal, sys, torch
    from pathlib import Path
    from gristmill.ops.checkpoint import CheckpointError, Content, Part
    from gristmill.ops.stores import LocalStore
    from gristmill.ops.writer import Writer
    torch.set_num_threads(1)

    def write(writer, position, number, size):
        whole = {"objectives": {"queue": torch.full((9,), number)}}
        writer.begin(position, Content([Part("student", "w", 0, (size,), torch.full((size,), number))], whole, {}))
        writer.finish(list)

    def run(folder, size, moment):
        seen = 0

        def watch(event, arguments):
            nonlocal seen
            if event in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.listdir", "os.scandir"):
                if isinstance(arguments[0], (str, os.PathLike)) and str(arguments[0]).startswith(folder + "/"):
                    seen += 1
                    if seen == moment:
                        os.kill(os.getpid(), signal.SIGKILL)

        if moment > 0:
            sys.addaudithook(watch)
        else:
            signal.setitimer(signal.ITIMER_REAL, -moment / 1e6)  # its default action ends the process at once
        writer = Writer(LocalStore(Path(folder)), 0, 1, keep=2)
        write(writer, 64, 2.0, size)
        write(writer, 128, 3.0, size)
"""


@pytest.fixture(scope="module")
def victims() -> Iterator[Workers]:
    with Workers(VICTIM) as workers:
        yield workers


def kill_at(victims: Workers, folder: Path, size: int, moment: int) -> int:
    return victims.start("run(folder, size, moment)", folder=str(folder), size=size, moment=moment).join()


def test_a_limit_on_file_sizes_is_a_full_disk_for_everyone(tmp_path: Path, victims: Workers):
    write(LocalStore(tmp_path), 64)
    code = """
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try: write(Writer(LocalStore(Path(folder)), 0, 1, keep=1), 128, 1.0, 10**6)
        except CheckpointError as error: print(error)
    """
    worker = victims.start(code, folder=str(tmp_path))
    worker.join()
    assert "could not write the checkpoint" in worker.output()
    assert "make room" in worker.output()
    assert names(tmp_path) == ["000000000064"]
    assert value(LocalStore(tmp_path)) == (64, 1.0)


def test_killed_at_every_file_operation(tmp_path: Path, victims: Workers):
    """Some forty moments, one after the other; each kill leaves a mess that the next writer sweeps."""
    folder = tmp_path / "checkpoints"
    store = LocalStore(folder)
    write(store, 64, 1.0)
    found = set()
    for moment in range(1, 1000):
        code = kill_at(victims, folder, 2000, moment)
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


def test_killed_while_bytes_are_written(tmp_path: Path, victims: Workers):
    folder = tmp_path / "checkpoints"
    store = LocalStore(folder)
    write(store, 64, 1.0)
    codes = []
    for moment in range(5000, 80_000, 5000):  # 5 to 75 ms; a write of 16 MB takes about that long
        codes.append(kill_at(victims, folder, 4_000_000, -moment))
        assert value(store) in {(64, 1.0), (64, 2.0), (128, 3.0)}
        assert newest(store)[1] == []
    assert -signal.SIGALRM in codes
    write(store, 192, 4.0, keep=1)
    assert names(folder) == ["000000000192"]
