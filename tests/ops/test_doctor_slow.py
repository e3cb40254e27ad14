"""Checks that import much, each once for real: DALI, compiled loops, two processes over gloo, two ranks of a group."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from gristmill.ops.doctor import Asked, Finding, worst
from gristmill.ops.doctor.group import Told
from gristmill.ops.doctor.judging import judge_talk, judge_together
from gristmill.ops.doctor.loops import check_loops
from gristmill.ops.doctor.runner import CHECKS, run

from ..disks import small_disk
from ..servers import kept_ports
from ..workers import Workers

RANK = """
import json, os, sys
os.environ.update(environment)
from gristmill.ops.doctor import group
if lost:
    from gristmill.ops.launch_place import environment as place_of
    group._meet(place_of(os.environ), 120.0)
    os._exit(0)
group.GRACE = grace
from gristmill.ops.cli import main
main(arguments, prog_name="gristmill")
"""


@pytest.mark.parametrize("name", ["dali", "communication"])
def test_checks_in_processes_of_their_own(name: str):
    (check,) = (check for check in CHECKS if check.name == name)
    found = run(check, Asked(seconds=200))
    assert found[0].state in ("ok", "warn"), found
    if name == "communication":
        assert found[0].figures["world"] == 2
        assert found[0].figures["pair_bytes_per_s"]["0-1"] > 0


def test_loops_that_cannot_be_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    text = "from gristmill.pipeline.augment.jit import compiled\n\n\n"
    text += "@compiled('int64(int64)')\ndef twice(number):\n    return 2 * number\n"
    (tmp_path / "kept_loops.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    found = check_loops(Asked(), ["kept_loops"])
    assert (found.state, found.figures["loops"], found.figures["kept"]) == ("ok", 1, 1)
    assert check_loops(Asked(), ["no_such_loops"]).state == "bad"
    with small_disk(tmp_path / "locked", "1m") as folder:
        (folder / "lost_loops.py").write_text(text)
        subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
        monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
        monkeypatch.syspath_prepend(folder)
        found = check_loops(Asked(), ["lost_loops"])
        del sys.modules["lost_loops"]
    assert found.state == "warn"
    assert "NUMBA_CACHE_DIR" in found.remedy


TIMEOUT = 120  # seconds in which all ranks have started and meet, however busy the machine is


def start(workers: Workers, folder: Path, world: int, lost: int = -1, grace: float = 30.0, outs: tuple[str, ...] = ()):
    ranks = []
    with kept_ports(1) as [port]:
        for rank in range(world):
            environment = {
                "RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1",
            }  # fmt: skip
            arguments = ["doctor", "--json", "--timeout", str(TIMEOUT)]
            for name in ("memory", "port", "open files"):
                arguments += ["--only", name]
            if outs:
                arguments += ["--out", str(folder / outs[rank])]
            values = {"environment": environment, "lost": rank == lost, "grace": grace, "arguments": arguments}
            ranks.append(workers.start(RANK, **values))
        codes = [rank.poll(wait=True) for rank in ranks]
    return codes, [rank.output() for rank in ranks]


def findings_of(output: str) -> dict[str, Finding]:
    (line,) = (line for line in output.splitlines() if line.startswith('{"state"'))
    return {tree["name"]: Finding.from_dict(tree) for tree in json.loads(line)["findings"]}


def test_two_ranks_make_one_table(workers: Workers, tmp_path: Path):
    (tmp_path / "one").mkdir()
    codes, outputs = start(workers, tmp_path, 2, outs=("one", "one"))
    found = findings_of(outputs[0])
    assert "{" not in outputs[1]
    assert found["communication"].figures["backend"] == "gloo"
    assert found["communication"].figures["slowest_pair"] == [0, 1]
    assert found["communication"].figures["pair_bytes_per_s"]["0-1"] > 0
    assert found["clocks"].state == "ok"
    assert found["shared out"].state == "ok"
    assert found["ranks"].found.startswith("all 2 answer, on 1 host")
    assert found["open files"].ranks == (0, 1)
    assert not list((tmp_path / "one").iterdir())
    assert codes == [int(worst(found.values()) == "bad")] * 2


def test_a_folder_that_is_not_shared(workers: Workers, tmp_path: Path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    codes, outputs = start(workers, tmp_path, 2, outs=("one", "two"))
    found = findings_of(outputs[0])["shared out"]
    assert (found.state, found.ranks, codes) == ("bad", (1,), [1, 1])
    assert "share" in found.remedy


def test_a_rank_that_is_lost_is_named(workers: Workers, tmp_path: Path):
    codes, outputs = start(workers, tmp_path, 2, lost=1, grace=3.0 - TIMEOUT)  # lost after 3 s, and no check is hurried
    found = findings_of(outputs[0])
    assert codes[0] == 1
    assert found["ranks"].figures == {"lost": [1]}
    assert found["communication"].state == "bad"


def test_the_slowest_pair_and_rank_are_named():
    rates = {(a, b): 10e9 for a in range(4) for b in range(a)} | {(3, 0): 1e9, (3, 1): 1e9, (3, 2): 0.9e9}
    told = {
        rank: {
            "host": f"node{rank}", "backend": "gloo", "sum": 4e9, "clock": [7.0 * (rank == 2), 0.001],
            "pairs": {str(other): rates[max(rank, other), min(rank, other)] for other in range(4) if other != rank},
        }
        for rank in range(4)
    }  # fmt: skip
    found = {finding.name: finding for finding in judge_talk(told, 4, [], out=False)}
    talk = found["communication"]
    assert (talk.figures["slowest_pair"], talk.figures["slowest_rank"]) == ([2, 3], 3)
    assert talk.state == "warn"
    assert "node3" in talk.remedy
    assert found["clocks"].state == "warn"
    assert "rank 2 (node2) is 7.00 s ahead" in found["clocks"].found
    told[1]["error"] = "a sum over all ranks (gloo): no answer within 60 s"
    (bad,) = judge_talk(told, 4, [2], out=False)
    assert bad.state == "bad"
    assert "rank 1: a sum over all ranks (gloo)" in bad.found


def test_alike_findings_are_said_once():
    fine = Finding("memory", "ok", "8 GB", "why")
    short = Finding("memory", "bad", "1 GB", "why", "give more")
    older = Finding("packages", "ok", "all", "why", "", {"installed": {"torch": "2.13.0"}})
    newer = Finding("packages", "ok", "all", "why", "", {"installed": {"torch": "2.14.1"}})
    told = [
        Told(rank, f"node{rank}", [short if rank == 5 else fine, older if rank == 3 else newer]) for rank in range(7)
    ]
    found = judge_together(told, 8, [7])
    assert [(f.name, f.state, f.ranks) for f in found[:2]] == [
        ("memory", "bad", (5,)),
        ("memory", "ok", (0, 1, 2, 3, 4, 6)),
    ]
    same = next(f for f in found if f.name == "same packages")
    assert "rank 0 (node0) has torch 2.14.1, rank 3 (node3) has torch 2.13.0" in same.found
    assert found[-1].state == "bad"
    assert "rank 7 of 8" in found[-1].found
