"""What the command line says of a mistake: one sentence, which names what is wrong and what to do."""

import errno
import subprocess
import time
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from gristmill.ops import commands
from gristmill.ops.cli import main
from gristmill.ops.commands import Commands
from gristmill.ops.recipe import RecipeError
from gristmill.ops.runlog import RunFolderError, RunLog

from ..disks import small_disk
from ..workers import Workers


def said(*arguments: object) -> str:
    """What a refused command prints on the error stream."""
    result = CliRunner().invoke(main, list(map(str, arguments)))
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    return result.stderr


@pytest.mark.parametrize(
    ("group", "name", "ending"),
    [
        ("bench", "nothing", "There are: ingest, learning, objectives, scale, stream, train, views."),
        ("look", "demo", "There are: matches, views."),
        ("look", "view", "Did you mean 'views'?"),
        ("monitor", "rule", "Did you mean 'rules'?"),
    ],
)
def test_a_group_names_its_commands(group: str, name: str, ending: str):
    assert f"No such command {name!r}. {ending}" in said(group, name)


def test_the_start_is_shown_under_the_help_of_all_alone():
    assert "Start here:" in CliRunner().invoke(main, ["--help"]).output
    assert "Start here:" not in CliRunner().invoke(main, ["bench", "--help"]).output


def test_a_run_is_reported_on_and_nothing_else(tmp_path: Path):
    assert f"error: {tmp_path} holds no run (no recipe.yaml, no metrics.jsonl); name" in said("report", tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_source_with_a_typing_error(tmp_path: Path):
    error = said("ingest", tmp_path / "nowhere", "--out", tmp_path / "out")
    assert f"{tmp_path / 'nowhere'} is not there: mend the path, or restore it" in error


def test_a_full_disk_names_what_was_written(tmp_path: Path):
    """A write through an open file tells no name, so that the command's `--out` has to do; other errors stay."""

    @click.group(cls=Commands)
    def group() -> None: ...

    @group.command()
    @click.option("--out", type=click.Path(path_type=Path))
    def fill(out: Path) -> None:
        with (out / "file").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(1 << 20))

    @group.command()
    @click.option("--out", type=click.Path(path_type=Path))
    def torn(out: Path) -> None:
        raise OSError(errno.EIO, "torn")

    with small_disk(tmp_path / "disk", "2m") as disk:
        result = CliRunner().invoke(group, ["fill", "--out", str(disk)])
    assert result.exit_code == 2
    assert f"no space left on the disk ({disk}): make room" in result.stderr
    result = CliRunner().invoke(group, ["torn", "--out", str(tmp_path)])
    assert isinstance(result.exception, OSError)
    assert result.exception.filename is None


def test_a_full_disk_names_the_log(tmp_path: Path):

    def fill(log: RunLog) -> None:
        while True:
            log.write("event", event="filling", numbers=[0] * 20000)

    with small_disk(tmp_path / "disk", "1m") as disk:
        log = RunLog(disk / "run")
        with pytest.raises(OSError, match="No space left") as caught:
            fill(log)
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(disk / "run" / "metrics.jsonl")


def test_a_place_that_is_no_run_folder(tmp_path: Path):
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "run", Path("/proc/run")):
        with pytest.raises(RunFolderError) as caught:
            RunLog(folder)
        assert str(caught.value).startswith(f"--out {folder} cannot be a run folder (")
        assert str(caught.value).endswith("); name a folder that can be written")
        assert f"error: --out {folder} cannot be a run folder (" in said("demo", "--tiny", "--out", folder)
    with small_disk(tmp_path / "disk", "1m") as disk:
        (disk / "begun").mkdir()
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        for folder in (disk / "new", disk / "begun"):
            with pytest.raises(RunFolderError, match=r"\(Read-only file system\)"):
                RunLog(folder)
    assert (tmp_path / "file").read_text() == "mine"


GROUP = {"WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29999"}


def test_a_wrong_recipe_is_said_once_in_a_group(workers: Workers, tmp_path: Path):
    """Processes as a launcher starts them, but for the seconds that others wait for rank 0."""
    code = "from gristmill.ops import commands\ncommands.LATER = 0.0\nos.environ.update(place)\n"
    code += "main(arguments, prog_name='gristmill')"
    arguments = ["train", "demo", "optimizer.lr=fast", "--out", str(tmp_path / "run")]
    ranks = [workers.start(code, place=GROUP | {"RANK": str(rank)}, arguments=arguments) for rank in range(3)]
    assert [rank.join() for rank in ranks] == [2, 2, 2]
    assert ranks[0].output() == "error: on the command line: optimizer.lr: 'fast' is no number\n"
    for rank in (1, 2):
        (line,) = ranks[rank].output().splitlines()
        assert line.startswith(f"error: rank {rank}: the recipe is refused, as rank 0 says;")


def test_what_one_rank_alone_finds_it_says_itself(monkeypatch: pytest.MonkeyPatch):
    @click.group(cls=Commands)
    def group() -> None: ...

    @group.command()
    @click.option("--everywhere", is_flag=True)
    def fail(everywhere: bool) -> None:
        raise RecipeError("no compiler", everywhere=everywhere)

    for name, value in (GROUP | {"RANK": "2"}).items():
        monkeypatch.setenv(name, value)
    assert CliRunner().invoke(group, ["fail"]).stderr == "error: no compiler\n"
    monkeypatch.setattr(commands, "LATER", 0.5)
    began = time.monotonic()
    assert CliRunner().invoke(group, ["fail", "--everywhere"]).stderr.startswith("error: rank 2: the recipe is refused")
    assert time.monotonic() - began >= 0.5, "a launcher that sees it end would end rank 0 before it said anything"
    monkeypatch.delenv("WORLD_SIZE")  # half a group: nobody is known to say it
    assert CliRunner().invoke(group, ["fail", "--everywhere"]).stderr == "error: no compiler\n"
