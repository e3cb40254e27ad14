"""Captures of one process and their replay as a user meets it: what is kept, what is refused, what is printed."""

import json
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from gristmill.ops.capture import capture
from gristmill.ops.checkpoint import DIGEST, STATE, digest_of
from gristmill.ops.cli import main
from gristmill.ops.guard import Verdict
from gristmill.ops.launch import join
from gristmill.ops.replay import CaptureError, replay
from gristmill.ops.run import Run
from gristmill.ops.runlog import read_log
from gristmill.pipeline.order import Order
from gristmill.shards.manifest import Manifest

from ..distributed.guard_cases import BATCH, go, make_data, objective, one_pixel, recipe_of

PIXEL, LOSS, HUGE = (f"{position:012d}" for position in (12, 36, 60))
OBJECTIVES = ["instance", "local_group", "group"]
BAD = Verdict(["group", "loss"], [(0, "group"), (0, "loss")], {"loss": float("nan")}, torch.ones(1), 1.0, {})


def huge(run, batch, forward):
    """Finite pixels, as a broken decoder may give them, that overflow in the first norm of both networks."""
    batch.views["global"][1, 0, 0].fill_(3e38)
    return forward()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `run`, whose steps 1, 3, 5 were bad."""
    join()  # left at exit: other tests of this process use the group, too
    folder = tmp_path_factory.mktemp("capture")
    make_data(folder, 80)
    go(folder / "run", recipe_of(folder, 6), {1: one_pixel(0, 7), 3: objective(0, "group", float("nan")), 5: huge})
    return folder


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    """A capture that may be damaged."""
    return Path(shutil.copytree(folder / "run" / "captures" / PIXEL, tmp_path / PIXEL))


@contextmanager
def opened(folder: Path, run_folder: Path, *settings: str) -> Iterator[tuple[Run, Any, list[str]]]:
    """A run with a batch at hand, and the batch's keys."""
    run = Run(recipe_of(folder, 4, *settings), run_folder, 0, 1, torch.device("cpu"))
    try:
        with run.loader() as loader:
            batch = next(loader)
        yield run, batch, run.everyones(batch.keys)
    finally:
        run.close()


def rewrite(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a capture's state as another version might have written it, with the right digest."""
    document = json.loads((path / STATE).read_text())
    change(document["state"])
    (path / STATE).write_text(text := json.dumps(document))
    (path / DIGEST).write_text(digest_of(text.encode()))


def cli(*arguments: object) -> Any:
    return CliRunner().invoke(main, ["replay", *map(str, arguments)])


# What a user sees.


def test_help_has_examples_and_the_exit_codes():
    text = cli("--help").output
    for word in ("gristmill replay runs/first/captures/", "Exit 0", "RUN/captures/POSITION", "--rank", "--json"):
        assert word in text


def test_a_bad_pixel_as_a_table(folder: Path):
    answer = cli(folder / "run" / "captures" / PIXEL)
    assert answer.exit_code == 0, answer.output
    (event,) = [
        e for e in read_log(folder / "run" / "metrics.jsonl") if e.get("event") == "skipped" and e["position"] == 12
    ]
    lines = answer.stdout.splitlines()
    assert lines[0] == "images 12 to 23, left out for instance, local_group, group, loss, gradient on rank 0"
    header = next(line for line in lines if "local_group" in line and "memory" in line)
    row = next(line for line in lines if line.startswith("rank 0  "))
    assert header.split() == [*OBJECTIVES, "loss", "memory", "gradients"]
    assert row.split()[2:7] == ["nan", "nan", "nan", "nan", "finite"]
    assert f"  pixels not finite  1 samples: {event['keys'][0]}" in lines
    assert "  first module       student.backbone.patch_embed.proj, and so is its input" in lines
    assert "  gradients          of all parameters" in lines
    assert lines[-1].startswith("reproduced: the cause is in the pixels")


def test_json_is_strict_and_complete(folder: Path):
    answer = cli(folder / "run" / "captures" / LOSS, "--json")
    assert answer.exit_code == 1

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    found = json.loads(answer.stdout, parse_constant=refuse)
    assert found["reproduced"] is False
    assert found["recorded"]["culprits"] == [[0, "group"], [0, "loss"]]
    assert found["recorded"]["losses"]["group"] == "nan"
    assert found["missing"] == [[0, "group"], [0, "loss"]]
    assert found["ranks"][0]["losses"]["instance"] == pytest.approx(found["recorded"]["losses"]["instance"], rel=1e-5)
    assert found["ranks"][0]["gradients"] == []
    assert found["not_finite_before"] == []


def test_a_fault_that_does_not_come_back_names_rank_and_host(folder: Path):
    answer = cli(folder / "run" / "captures" / LOSS)
    assert answer.exit_code == 1
    last = answer.stdout.splitlines()[-1]
    assert last.startswith("not reproduced (group, loss): suspect the hardware or software of rank 0 (on ")


def test_pixels_that_are_finite_but_overflow_show_the_module(folder: Path):
    again = replay(folder / "run" / "captures" / HUGE)
    assert again.reproduced
    (found,) = again.findings
    assert found.samples == []
    assert found.modules == dict.fromkeys(("teacher", "student"), "backbone.blocks.0.norm1")
    assert found.inputs == {"teacher": True, "student": True}
    text = "\n".join(again.lines())
    assert "teacher.backbone.blocks.0.norm1, whose input is finite" in text
    assert "the cause is in the weights or the arithmetic" in text


def test_naming_a_run_or_nothing(folder: Path, tmp_path: Path):
    several = cli(folder / "run")
    assert several.exit_code == 2
    for line in (
        f"captures/{PIXEL}  (instance, local_group",
        f"captures/{LOSS}  (group, loss, gradient)",
        "holds 3 captures",
    ):
        assert line in several.output
    assert "holds 3 captures" in cli(folder / "run" / "captures").output
    only = tmp_path / "one" / "captures" / LOSS
    shutil.copytree(folder / "run" / "captures" / LOSS, only)
    assert replay(tmp_path / "one").path == only
    for path, why in (
        (tmp_path / "nothing", "is not there; bad steps are kept in RUN/captures/"),
        (folder / "data", "holds no capture: bad steps are kept in RUN/captures/"),
        (folder / "run" / "checkpoints" / f"{0:012d}", "is a checkpoint, not a capture"),
    ):
        answer = cli(path)
        assert answer.exit_code == 2
        assert why in answer.output


def test_a_rank_that_is_not_there_or_not_named(folder: Path, tmp_path: Path):
    path = folder / "run" / "captures" / PIXEL
    assert replay(path, [0]).reproduced
    answer = cli(path, "--rank", 1)
    assert answer.exit_code == 2
    assert "taken by ranks 0 to 0" in answer.output


def test_replay_changes_nothing(folder: Path):
    path = folder / "run" / "captures" / LOSS
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    tiny, draws = torch.tensor(1e-40), torch.get_rng_state()
    flushed = bool(tiny * 1.0 == 0.0)
    replay(path)
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before
    assert bool(tiny * 1.0 == 0.0) == flushed
    assert torch.equal(torch.get_rng_state(), draws)


# What is refused.


def test_no_pickle(folder: Path):
    for path in (folder / "run" / "captures").glob("*/*"):
        assert path.suffix in (".safetensors", ".json", ".digest"), path
        start = path.read_bytes()[:9]
        assert not start.startswith((b"PK", b"\x80")), path
        assert path.suffix != ".safetensors" or start[8:] == b"{", path


@pytest.mark.parametrize("damage", ["zeros", "missing", "state", "digest"])
def test_a_damaged_capture_is_named_with_its_file(copied: Path, damage: str):
    if damage == "zeros":
        name = "rank-00000.safetensors"
        with (copied / name).open("r+b") as file:
            file.seek((copied / name).stat().st_size // 2)
            file.write(bytes(64))
    elif damage == "missing":
        name = "whole-objectives.safetensors"
        (copied / name).unlink()
    else:
        name = STATE
        (copied / (STATE if damage == "state" else DIGEST)).write_bytes(b"{")
    with pytest.raises(CaptureError, match=r"is damaged .* and cannot be fed again") as error:
        replay(copied)
    assert name in str(error.value)
    assert str(copied) in str(error.value)
    assert cli(copied).exit_code == 2


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda state: state["recipe"].update(granularity=3), "granularity: unknown key"),
        (lambda state: state["recipe"].pop("views"), "views: it has to be given"),
        (lambda state: state["recipe"]["student"].update(embed_dim=64), "the student differs in backbone.blocks.0"),
        (lambda state: state["recipe"]["student"].update(depth=3), "the student differs in backbone.blocks.2"),
        (lambda state: state["recipe"]["objectives"]["instance"].update(queue=96), "instance.queue"),
        (lambda state: state["capture"].pop("hosts"), "it lacks 'hosts'"),
        (lambda state: state.update(cursor="{}"), "version"),
    ],
)
def test_a_capture_of_another_version(copied: Path, change: Callable[[dict[str, Any]], object], why: str):
    rewrite(copied, change)
    rewrite(copied, lambda state: state["capture"].update(gristmill="9.7.5"))
    answer = cli(copied)
    assert answer.exit_code == 2, answer.output
    assert "written by Gristmill 9.7.5" in answer.output
    assert "Replay it with the version that wrote it" in answer.output
    assert why in answer.output


def test_weights_that_were_not_finite_before_the_step_are_told(copied: Path):
    """The guard's own promise is checked, too."""
    from safetensors.torch import load_file, save_file

    name = "whole-objectives.safetensors"
    tensors = load_file(copied / name)
    tensors["instance.queue.rows"][3, 2] = float("nan")
    save_file(tensors, copied / name)

    document = json.loads((copied / STATE).read_text())
    document["digests"][name] = digest_of((copied / name).read_bytes())
    (copied / STATE).write_text(text := json.dumps(document))
    (copied / DIGEST).write_text(digest_of(text.encode()))
    again = replay(copied)
    assert again.state == ["instance.queue.rows"]
    assert any("not finite before the step already" in line for line in again.lines())


# What is kept.


def test_as_many_as_the_recipe_says_over_restarts(folder: Path, tmp_path: Path):
    kept, before = tmp_path / "run" / "captures", {}
    for restart in range(2):
        with opened(folder, tmp_path / "run", "guard.captures=2") as (run, batch, keys):
            paths = []
            for _ in range(3):
                paths.append(capture(run, batch, BAD, keys))
                run.cursor = run.cursor.advance(BATCH, committed=False)
        assert paths == [kept / f"{0:012d}", kept / f"{BATCH:012d}", None], restart
        written = {path: path.stat().st_mtime_ns for path in sorted(kept.glob("*/*"))}
        assert written == (before if restart else written), "a step that comes again is not written again"
        before = written
    assert len({path.parent for path in before}) == 2
    with opened(folder, tmp_path / "run", "guard.captures=3") as (run, batch, keys):
        run.cursor = run.cursor.advance(BATCH // 2, committed=False)
        assert capture(run, batch, BAD, keys) is not None
    assert len(list(kept.iterdir())) == 3, "none is pruned, wherever the new one lies"


def test_a_limit_on_file_sizes_costs_the_capture_only(folder: Path, tmp_path: Path):
    with opened(folder, tmp_path / "run") as (run, batch, keys):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # Python ignores SIGXFSZ, so that writing fails
        try:
            assert capture(run, batch, BAD, keys) is None
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        (failed,) = read_log(run.folder / "metrics.jsonl")
        assert failed["event"] == "capture_failed"
        assert "File too large" in failed["why"]
        assert list((run.folder / "captures").iterdir()) == []
        assert capture(run, batch, BAD, keys) is not None, "there is room again"


def test_a_substitute_is_named_by_its_own_key(folder: Path, tmp_path: Path):
    """The slot's own image is damaged on disk: the log must not blame it for what another one holds."""
    shutil.copytree(folder / "data", tmp_path / "data")
    manifest = Manifest.open(tmp_path / "data" / "train")
    shards, rows = Order(manifest.counts, seed=0, lanes=1, window=65536).locate(np.array([BATCH + 7]))
    shard, row = int(shards[0]), int(rows[0])
    own = str(manifest.rows(shard).keys[row])
    with manifest.path(shard).open("r+b") as file:
        file.seek(int(manifest.rows(shard).offset[row]))
        file.write(bytes(64))
    go(tmp_path / "run", recipe_of(tmp_path, 2), {1: one_pixel(0, 7)})
    (event,) = [line for line in read_log(tmp_path / "run" / "metrics.jsonl") if line.get("event") == "skipped"]
    assert len(event["keys"]) == 1
    assert event["keys"] != [own]
    (quarantined,) = (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()
    assert own in quarantined
    assert replay(tmp_path / "run").findings[0].samples == event["keys"]
