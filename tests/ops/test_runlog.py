"""The run's log: rewound on resume, whole after a torn line, one writer a folder."""

from pathlib import Path

import pytest
from gristmill.ops.runlog import RunFolderError, RunLog, read_log


def test_rewind_drops_what_will_be_taken_again(tmp_path: Path):
    log = RunLog(tmp_path)
    for position in (0, 64, 128):
        log.write("step", position=position, loss=1.0)
    log.rewind(64)
    log.write("step", position=64, loss=2.0)
    assert [(line["position"], line["loss"]) for line in read_log(log.path)] == [(0, 1.0), (64, 2.0)]
    log.close()


def test_a_torn_line_is_left_out(tmp_path: Path):
    log = RunLog(tmp_path)
    log.write("step", position=0)
    log.close()
    with log.path.open("a") as file:
        file.write('{"kind": "step", "posi')
    assert len(read_log(log.path)) == 1
    log = RunLog(tmp_path)
    log.rewind(64)
    log.write("step", position=64)
    assert [line["position"] for line in read_log(log.path)] == [0, 64]
    log.close()


def test_one_process_a_folder(tmp_path: Path):
    first = RunLog(tmp_path)
    with pytest.raises(RunFolderError, match="another process"):
        RunLog(tmp_path)
    first.close()
    RunLog(tmp_path).close()


def test_who_listens_gets_what_is_written_and_what_is_only_told(tmp_path: Path):
    log, heard = RunLog(tmp_path), []
    log.also.append(heard.append)
    log.write("step", position=0, loss=1.0)
    log.tell("state", state="probing")
    log.close()
    step = {"kind": "step", "position": 0, "loss": 1.0}
    assert heard == [step, {"kind": "state", "state": "probing"}]
    assert read_log(log.path) == [step]


def test_urls_lose_their_passwords(tmp_path: Path):
    log, heard = RunLog(tmp_path), []
    log.also.append(heard.append)
    log.write("event", event="checkpoint_failed", position=0, why="https://me:hunter2@host/x?X-Amz-Signature=abc: 403")
    log.close()
    for text in (log.path.read_text(), str(heard)):
        assert "https://host/x" in text
        assert "hunter2" not in text
        assert "abc" not in text
