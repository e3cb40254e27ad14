"""Nine short runs of two ranks end with 0 and leave nothing behind: most in one process, some forked, some launched.

`python -m gristmill.ops.bench.endings` makes twenty real launches.
"""

import os
from multiprocessing import get_context
from pathlib import Path

from gristmill.ops.bench.endings import SHARED, endings, left_in_shared_memory, short_run

from ..waiting import wait_for
from .zygote import Zygote

IN_ONE, FORKED, LAUNCHED = (0, 1, 2, 3, 1), (3, 2, 3), (3,)


def commands(folder: Path, data: Path, stages: tuple[int, ...]) -> list[list[object]]:
    each = enumerate(stages)
    return [["train", "demo", "--out", folder / f"run-{n}", *short_run(data, stage, steps=2)] for n, stage in each]


def test_nine_short_runs_end_well(zygote: Zygote, tiny: Path, tmp_path: Path):
    assert len(IN_ONE + FORKED + LAUNCHED) == 9
    before = os.listdir(SHARED)

    group = zygote.commands(tmp_path / "in-one", *commands(tmp_path / "in-one-runs", tiny, IN_ONE))
    assert group.codes == [0, 0], group.errors
    assert group.errors[0].count("training: 16/16 images") == len(IN_ONE)
    assert group.errors[1] == ""

    # ZeRO 3 is where gloo's threads hold the last collective when the interpreter ends.
    for number, command in enumerate(commands(tmp_path / "forked-runs", tiny, FORKED)):
        group = zygote.commands(tmp_path / f"forked-{number}", command)
        assert group.codes == [0, 0], group.errors
        assert group.errors[1] == ""
        assert "terminate called" not in group.errors[0]

    found = endings(LAUNCHED, tmp_path / "launched-runs", tiny, steps=2)
    for each in found:
        assert each["code"] == 0, each["error"]
        assert not each["aborted"]
    # Others on this machine may leave semaphores, which their resource trackers take away; what a run left would stay.
    wait_for(lambda: not left_in_shared_memory(before), 60, lambda: left_in_shared_memory(before), every=0.5)


def test_what_is_left_in_shared_memory_is_seen():
    """The check itself: a segment counts once no living process has it open."""
    before = os.listdir(SHARED)
    path = SHARED / f"gristmill-test-{os.getpid()}"
    try:
        with path.open("wb"):
            assert path.name not in left_in_shared_memory(before)
        assert path.name in left_in_shared_memory(before)
    finally:
        path.unlink()


def test_a_semaphore_of_a_living_process_is_not_left():
    """As ingests that other tests run have them: a name of its own, which is not the one that is mapped."""
    before = os.listdir(SHARED)
    semaphore = get_context("forkserver").Semaphore()
    name = semaphore._semlock.name.strip("/")  # pyright: ignore[reportAttributeAccessIssue]
    assert f"sem.{name}" in set(os.listdir(SHARED)) - set(before)
    assert f"sem.{name}" not in left_in_shared_memory(before)
