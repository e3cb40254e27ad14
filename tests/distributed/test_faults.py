"""Faults on whole runs of two ranks, injected for real: signals, a lost and a stopped rank, disks, damage, lost data.

Each fault is followed by the same command once more, and the run must end with the same bits as one that met no fault.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from gristmill.ops.bench.endings import tiny_data

from ..disks import small_disk
from ..servers import WEED_MISSING, end, find_weed, weed_server
from ..waiting import wait_for
from .case import END, Case
from .ferry import Ferry
from .zygote import Zygote

ERRORS_OF_PYTHON = ("Traceback", "terminate called", "Exception ignored")


@pytest.fixture
def case(zygote: Zygote, tiny: Path, tmp_path: Path) -> Case:
    return Case(zygote, tmp_path / "run", tiny)


def one_sentence(text: str) -> str:
    """The one error that a rank printed, without Python's and the libraries' noise around it."""
    assert not any(word in text for word in ERRORS_OF_PYTHON), text
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, text
    return errors[0]


def test_rank_0_speaks_for_all(straight: Case):
    assert f"training: {END}/{END} images" in straight.said[0]
    assert straight.said[1] == ""


def test_sigterm_to_one_rank_stops_all_at_the_same_step(case: Case, straight: Case):
    """Thrice at once, as a scheduler, a launcher and a terminal may pass it on: none of them cuts the saving short."""
    group = case.run(faults=({"what": "signalled", "name": "term", "at": 24, "rank": 1, "times": 3},))
    assert group.codes == [75, 75], group.errors
    for text in group.errors:
        assert "stopped at image 32; the same command goes on from there" in text
    assert case.newest().position == 32
    assert [line["position"] for line in case.trace()] == [0, 8, 16, 24]
    case.finish(straight, "going on from image 32")


def test_ctrl_c_saves_too(case: Case):
    """A terminal sends it to all ranks, and their launcher sends it again."""
    faults = tuple({"what": "signalled", "name": "int", "at": 8, "rank": rank, "times": 2} for rank in (0, 1))
    group = case.run(faults=faults)
    assert group.codes == [130, 130], group.errors
    assert case.newest().position == 16


def test_a_lost_rank_is_named_in_one_sentence(case: Case, straight: Case):
    group = case.run(faults=({"what": "signalled", "name": "kill", "at": 40, "rank": 1},))
    assert group.codes == [76, -9], group.errors
    error = one_sentence(group.errors[0])
    assert f"pid {group.pids[1]}) was lost during" in error
    assert "rank 1 (host" in error
    assert "at image 40" in error
    assert error.endswith("killed, or out of memory. The last checkpoint is good; start the same command again.")
    assert case.newest().position in (16, 32)  # the one at 32 was being written beside training
    case.finish(straight)


def test_nobody_is_blamed_who_left_because_of_another(case: Case):
    """A rank of another host is lost: its process cannot be looked for here, and ranks 0 and 2 do not accuse each other."""
    faults = ({"what": "elsewhere", "rank": 1}, {"what": "signalled", "name": "kill", "at": 12, "rank": 1})
    group = case.run("batch=12", "checkpoint.every=12", faults=faults, world=3)
    assert group.codes == [76, -9, 76], group.errors
    for rank in (0, 2):
        error = one_sentence(group.errors[rank])
        assert "another rank was lost, or the network failed, during" in error
        assert "127.0.0.1" in error
        assert "gloo/transport" not in error
    assert case.newest().position in (0, 12)


def test_a_rank_that_ends_by_its_own_error_is_not_called_lost(case: Case):
    group = case.run(faults=({"what": "raises", "at": 8, "rank": 1},))
    assert group.codes == [2, 1], group.errors
    assert f"rank 1 (host {os.uname().nodename}, pid {group.pids[1]}) ended by an error of its own" in one_sentence(
        group.errors[0]
    )
    assert group.errors[1].count("Traceback") == 1
    assert "ZeroDivisionError" in group.errors[1]


def test_a_stopped_rank_is_named_with_its_stack(case: Case, straight: Case):
    stop = {"what": "signalled", "name": "stop", "at": 40, "rank": 1, "pause": 4.0}
    group = case.run("watchdog=6", faults=(stop,), only=[0], seconds=120)
    try:
        assert group.codes == [76, None], group.errors
        assert f"rank 1 (host {os.uname().nodename}, pid {group.pids[1]}) has stopped" in group.errors[0]
        assert "rank 1 stood here:" in group.errors[0]
        assert "in signalled.<locals>.stand_here" in group.errors[0]  # where the fault struck
        assert "Traceback" not in group.errors[0]
        (event,) = case.events("stalled")
        assert "rank 1" in event["why"]
        assert "stood here" in event["why"]
    finally:
        group.ranks[1].kill()
    assert group.codes[1] == -9
    case.finish(straight)


def test_a_rank_without_data_says_why_and_all_stop_at_the_same_step(case: Case, straight: Case):
    group = case.run(faults=({"what": "unreadable", "at": 40, "rank": 1},))
    assert group.codes == [2, 2], group.errors
    assert "1 of 2 processes could not read their data" in one_sentence(group.errors[0])
    assert "the disk of this rank went away: look at its mount" in one_sentence(group.errors[1])
    assert case.newest().position == 40
    case.finish(straight, "going on from image 40")


def test_shards_cut_beyond_the_bound_end_the_run_with_everything_saved(case: Case, tiny: Path, tmp_path: Path):
    case.data = tmp_path / "shards"
    shutil.copytree(tiny, case.data)
    paths = sorted(map(str, case.data.glob("*.tar")))
    # A run long enough that not all of it can have been read ahead.
    group = case.run("images=128", faults=({"what": "cut", "paths": paths, "at": 8},))
    assert group.codes == [2, 2], group.errors
    errors = [one_sentence(text) for text in group.errors]
    assert any("truncated" in error and "gristmill verify" in error for error in errors), errors
    for error in errors:  # a rank may have had its share of that batch already
        assert "gristmill verify" in error or "could not read their data" in error
    assert case.newest().position == case.trace()[-1]["position"] + 8


def test_damaged_checkpoints_are_passed_over_by_name(case: Case, straight: Case):
    shutil.copytree(straight.folder, case.folder)
    zeroed, lacking, good = (case.folder / "checkpoints" / f"{position:012d}" for position in (END, END - 16, END - 32))
    assert good.is_dir()
    with (zeroed / "rank-00001.safetensors").open("r+b") as file:
        file.seek(-4096, os.SEEK_END)
        assert file.read(64) != bytes(64)
        file.seek(-4096, os.SEEK_END)
        file.write(bytes(64))
    (lacking / "whole-objectives.safetensors").unlink()
    group = case.finish(straight, f"going on from image {END - 32}")
    assert (
        f"checkpoint {zeroed} is damaged (rank-00001.safetensors does not match its digest) and was passed over"
        in group.errors[0]
    )
    assert (
        f"checkpoint {lacking} is damaged (whole-objectives.safetensors is missing) and was passed over"
        in group.errors[0]
    )


def test_another_recipe_or_data_set_is_refused_by_name(case: Case, straight: Case, tmp_path: Path):
    before = sorted((path, path.stat().st_mtime_ns) for path in (straight.folder / "checkpoints").rglob("*"))
    other = Case(case.zygote, straight.folder, tiny_data(tmp_path / "other", seed=1))
    log = tmp_path / "rank"
    for command, words in (
        (straight.command("optimizer.lr=0.5"), ("optimizer.lr", "0.5 now", "--out")),
        (other.command(), ("data: the checkpoint was written with", "point the recipe at the data set")),
    ):
        group = case.zygote.commands(log, command, world=1)
        assert group.codes == [2], group.errors
        for word in words:
            assert word in one_sentence(group.errors[0])
    assert before == sorted((path, path.stat().st_mtime_ns) for path in (straight.folder / "checkpoints").rglob("*"))


def test_a_full_disk_costs_checkpoints_but_not_the_run(case: Case, straight: Case):
    """Room for two and a half: full until its end, a run ends with an error; with room made on its way, it ends well."""
    one = sum(path.stat().st_size for path in (straight.folder / "checkpoints" / f"{END:012d}").iterdir())
    disk = case.folder / "checkpoints"
    with small_disk(disk, str(5 * one)):
        filler = disk / "filler"
        filler.write_bytes(bytes(one * 5 // 2))
        group = case.run()
        assert group.codes == [2, 2], group.errors
        assert f"training: {END}/{END} images" in group.errors[0]
        errors = [one_sentence(text) for text in group.errors]
        own = [error for error in errors if f"could not write the checkpoint {disk}" in error]
        assert own, errors
        for error in own:
            assert "No space left on device" in error
            assert "Older checkpoints are untouched; make room" in error
        for error in set(errors) - set(own):
            assert error.endswith("was not written: another rank could not")
        failed = case.events("checkpoint_failed")  # each of them once, and why it failed by whoever knows
        assert len(failed) > 1
        assert group.errors[0].count("warning: ") == len(failed) - 1
        assert "".join(group.errors).count("No space left on device") >= len(failed)
        assert case.newest().position == 16
        assert not list(disk.glob(".writing-*"))

        going_on = case.run(faults=({"what": "removed", "path": str(filler), "at": 56},))
        assert going_on.codes == [0, 0], going_on.errors
        assert "going on from image 16" in going_on.errors[0]
        assert "warning: " in going_on.errors[0]
        assert case.trace() == straight.trace()
        assert case.newest().digests == straight.newest().digests


def test_checkpoints_in_an_object_store_survive_a_kill(case: Case, tmp_path: Path):
    if find_weed() is None:
        pytest.skip(WEED_MISSING)
    with weed_server(tmp_path / "weed") as server:
        query = f"endpoint_override={server.endpoint}&scheme=http&allow_bucket_creation=true"
        store = f"checkpoint.store=s3://grist/runs/first?{query}"
        how: dict[str, Any] = {
            "world": 1,
            "env": {"AWS_ACCESS_KEY_ID": server.key, "AWS_SECRET_ACCESS_KEY": server.secret},
        }
        killed = case.run(store, "engine.zero=0", faults=({"what": "signalled", "name": "kill", "at": 40},), **how)
        assert killed.codes == [-9], killed.errors
        before = case.trace()
        assert [line["position"] for line in before] == list(range(0, 40, 8))
        again = case.run(store, "engine.zero=0", **how)
        assert again.codes == [0], again.errors
        position = int(again.errors[0].split("going on from image ")[1].split()[0])
        assert position in (16, 32)
        assert case.trace()[: len(before)] == before  # steps taken again are the same ones
        assert len(case.trace()) == END // 8
        assert not (case.folder / "checkpoints").exists()
        for path in case.folder.rglob("*"):
            assert server.secret not in path.read_text(errors="replace") if path.is_file() else True


def test_torchrun_restarts_in_place_and_is_stopped_by_sigterm(case: Case, straight: Case, tmp_path: Path):
    """A rank is lost and all come back by themselves; then SIGTERM to the launcher, which ends with 1 whatever ranks say."""
    faults = [
        {"what": "signalled", "name": "kill", "at": 40, "rank": 1},
        {"what": "launcher signalled", "name": "term", "at": 48, "attempt": 1},
    ]
    command = list(map(str, case.command()))
    given = (json.dumps(faults), json.dumps([command]))
    ferry, log = Ferry(case.zygote, tmp_path / "ferry", "fault_cases", given, ends=True), tmp_path / "log"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=2"]
    torchrun += ["--no-python", str(ferry.program(tmp_path / "rank.py"))]
    environ = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    with ferry, log.open("wb") as out:
        launcher = subprocess.Popen(torchrun, env=environ, stdout=out, stderr=out)

        def ended() -> bool:
            ferry.cross()
            return launcher.poll() is not None

        try:
            wait_for(ended, 300, lambda: log.read_text() + ferry.said())
        finally:
            end(launcher)
    said = ferry.said()
    assert launcher.returncode == 1, (log.read_text(), said)
    assert "rank 1 (host" in said
    assert "was lost during" in said
    assert "going on from image" in said
    assert "stopped at image 56; the same command goes on from there" in said
    assert "terminate called" not in log.read_text() + said
    assert case.newest().position == 56
    case.finish(straight, "going on from image 56")
