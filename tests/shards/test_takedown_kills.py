"""A rewriting that is killed or finds the disk full: the old data set or the new one, and the same command finishes it."""

import json
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from gristmill.shards.collection import open_collection
from gristmill.shards.manifest import Manifest
from gristmill.shards.rewrite import RewriteError
from gristmill.shards.takedown import Wanted, take_down
from gristmill.shards.tombstones import TombstoneError
from gristmill.shards.verify import verify

from .. import disks
from .takedowns import in_child, make_set, source, tree

Picture = Callable[..., bytes]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_set(tmp_path_factory.mktemp("takedown"))


@pytest.fixture
def out(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made / "out", tmp_path / "out")
    return tmp_path / "out"


def erasing(root: Path, made: Path) -> Callable[[], object]:
    """A request that reaches both halves, several shards, and all of one."""
    train, probe = Manifest.open(root / "train"), Manifest.open(root / "probe")
    keys = [train.rows(0).keys[0], *train.rows(1).keys, probe.rows(0).keys[1]]
    wanted = Wanted(keys=keys, addresses=[source(made, "a/04.png")[0]])
    return lambda: take_down(root, wanted, "asked", erase=True)


def of_interest(root: Path) -> dict[str, bytes]:
    return {name: data for name, data in tree(root).items() if not name.startswith(".ingest/known")}


def test_killed_at_any_step_it_is_the_old_or_the_new_and_the_same_command_finishes_it(
    made: Path, tmp_path: Path
) -> None:
    """Every write, rename and removal is a place to die. In between, what opens is one data set or none, never a mixture."""
    shutil.copytree(made / "out", tmp_path / "calm")
    assert in_child(erasing(tmp_path / "calm", made)) == 0
    calm, old = of_interest(tmp_path / "calm"), of_interest(made / "out")
    assert calm != old
    digests = {
        name: {json.loads(tree_[f"{name}/dataset.json"])["digest"] for tree_ in (calm, old)}
        for name in ("train", "probe")
    }
    steps, died = 0, 0
    while True:
        root = tmp_path / f"killed-{steps}"
        shutil.copytree(made / "out", root)
        work = erasing(root, made)
        code = in_child(work, kill_at=steps)
        if code == 0:
            break
        assert code == -signal.SIGKILL
        died += 1
        for part in open_collection(root).parts:
            if (part / "dataset.json").exists():
                manifest = Manifest.open(part)
                assert manifest.digest in digests[part.name]
                assert not verify(part)
        assert in_child(work) == 0
        assert of_interest(root) == calm, steps
        shutil.rmtree(root)
        steps += 13 if steps < 45 else 6  # tests have their time; a stride of 1 does, too
    assert died > 8


def test_killed_ten_times_at_random(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "out", tmp_path / "calm")
    began = time.monotonic()
    assert in_child(erasing(tmp_path / "calm", made)) == 0
    whole = time.monotonic() - began
    shutil.copytree(made / "out", tmp_path / "out")
    work = erasing(tmp_path / "out", made)
    chance = random.Random(7)
    for _ in range(10):
        in_child(work, kill_after=chance.uniform(0, whole))
        if of_interest(tmp_path / "out") == of_interest(tmp_path / "calm"):  # it was quicker: begin anew
            shutil.rmtree(tmp_path / "out")
            shutil.copytree(made / "out", tmp_path / "out")
    assert in_child(work) == 0
    assert of_interest(tmp_path / "out") == of_interest(tmp_path / "calm")


def test_a_full_disk_changes_nothing_and_then_it_goes_on(made: Path, tmp_path: Path) -> None:
    size = sum(path.stat().st_size for path in (made / "out").rglob("*") if path.is_file())
    with disks.small_disk(tmp_path / "disk", f"{size // 1024 + 400}k") as disk:
        shutil.copytree(made / "out", disk / "out")
        work = erasing(disk / "out", made)
        disks_free = shutil.disk_usage(disk).free
        (disk / "filler").write_bytes(bytes(disks_free))
        before = {n: d for n, d in of_interest(disk / "out").items() if n.endswith(".tar")}
        with pytest.raises((OSError, RewriteError, TombstoneError), match=r"space|free|written"):
            work()
        after = of_interest(disk / "out")
        assert {n: d for n, d in after.items() if n.endswith(".tar") and ".rewrite" not in n} == before
        assert not verify(disk / "out" / "train")
        (disk / "filler").unlink()
        work()
        assert not verify(disk / "out" / "train", deep=True)
