"""Two nodes as network namespaces, each with a torchrun of its own: one loses its rank, then its network.

First both come back in place. Then the cable is pulled, so that nothing is reset and nobody says goodbye: the watchdog has
to see it, torchrun to meet again without the lost node, and the run to go on from its checkpoint on half the processes.
What it is fed must be what an uninterrupted run is fed, image by image and crop by crop.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from .case import END, Case
from .ferry import Ferry
from .zygote import Zygote

KILLED, CUT = 24, 40  # the images before which node 1 loses its rank, and its network
PORT = 29521  # the namespaces are new: all ports are free
# torchrun's own patience, in seconds; by itself it waits half a minute for more nodes, and 15 s for a heartbeat.
MEETING = "last_call_timeout=5,keep_alive_interval=1,keep_alive_max_attempt=8,is_host={host}"


class Node:
    """A network namespace with one end of a cable, and what runs in it."""

    def __init__(self, number: int):
        # Named by the process, so that two sessions of tests on one machine do not meet.
        self.number, self.name, self.link = number, f"grist{os.getpid()}n{number}", f"gr{os.getpid() % 100000}v{number}"
        self.address = f"198.51.100.{number + 1}"  # reserved for examples

    def torchrun(self, log: Path, *command: object) -> subprocess.Popen[bytes]:
        meet = ["--nnodes=1:2", "--rdzv-backend=c10d", "--rdzv-id=tests", f"--rdzv-endpoint=198.51.100.1:{PORT}"]
        meet += [f"--rdzv-conf={MEETING.format(host=int(self.number == 0))}", f"--local-addr={self.address}"]
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=1", "--max-restarts=3", *meet]
        torchrun += ["--no-python"]
        environ = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": self.link, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        with log.open("wb") as out:
            return subprocess.Popen(
                ["ip", "netns", "exec", self.name, *torchrun, *map(str, command)],
                env=os.environ | environ, stdout=out, stderr=out,
            )  # fmt: skip

    def pids(self) -> list[int]:
        found = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True, check=True)
        return [int(pid) for pid in found.stdout.split()]


@contextmanager
def nodes() -> Iterator[tuple[Node, Node]]:
    """Two hosts and a cable between them. What still runs there in the end is killed. As root only."""
    first, second = two = Node(0), Node(1)
    with ExitStack() as stack:
        for node in two:
            ip("netns", "add", node.name)
            stack.callback(ip, "netns", "del", node.name)
        ip("link", "add", first.link, "netns", first.name, "type", "veth", "peer", second.link, "netns", second.name)
        for node in two:
            ip("-n", node.name, "addr", "add", f"{node.address}/24", "dev", node.link)
            ip("-n", node.name, "link", "set", "lo", "up")
            ip("-n", node.name, "link", "set", node.link, "up")
            stack.callback(end, node)
        yield two


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


def end(node: Node) -> None:
    for pid in node.pids():
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def fed(folder: Path) -> dict[int, list[dict[str, Any]]]:
    """What every step was fed, by its position: an entry for each time that a rank took it."""
    found: dict[int, list[dict[str, Any]]] = {}
    for path in folder.glob("fed-*"):
        for line in path.read_text().splitlines():
            row = json.loads(line)
            found.setdefault(row["position"], []).append(row)
    return found


@pytest.mark.program("ip")
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_a_rank_is_lost_and_comes_back_a_node_is_cut_off_and_the_other_goes_on_alone(
    zygote: Zygote, straight: Case, tiny: Path, tmp_path: Path
):
    case = Case(zygote, tmp_path / "nodes" / "run", tiny)
    case.folder.parent.mkdir()
    ferry = Ferry(zygote, tmp_path / "ferry", "node_cases", (case.folder.parent, json.dumps([KILLED, CUT])))
    program = ferry.program(tmp_path / "rank.py")
    with nodes() as (first, second), ferry:
        logs = [tmp_path / f"node-{node.number}" for node in (first, second)]
        command = [program, *case.command("watchdog=6")]
        here, there = (node.torchrun(log, *command) for node, log in zip((first, second), logs, strict=True))
        until = time.monotonic() + 360
        while here.poll() is None and time.monotonic() < until:
            ferry.cross()
            time.sleep(0.05)
        said, lost = (ferry.said(GLOO_SOCKET_IFNAME=node.link) for node in (first, second))
        assert here.poll() == 0, (said[-3000:], lost[-3000:], [log.read_text()[-3000:] for log in logs])
        end(second)
        assert there.wait() != 0

    assert f"training: {END}/{END} images" in said
    assert f"training: {END}/{END} images" not in lost
    first_time, alone_from = (int(text.split()[0]) for text in said.split("going on from image ")[1:])
    assert first_time in (0, 16)  # the one at 16 was being written beside training
    assert alone_from in (16, 32)
    bit_for_bit, _, other_sums = said.partition(f"going on from image {first_time}")
    assert "not bit for bit" not in bit_for_bit
    assert "not bit for bit as before: world 2 -> 1" in other_sums

    assert [line["position"] for line in case.trace()] == list(range(0, END, 8))
    ours, theirs = case.trace(), straight.trace()
    assert ours[: alone_from // 8] == theirs[: alone_from // 8]
    for mine, other in zip(ours, theirs, strict=True):  # afterwards sums are taken in another order
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-3)

    wanted = {
        position: dict(i for row in rows for i in row["crops"].items())
        for position, rows in fed(straight.folder.parent).items()
    }
    assert sorted(wanted) == list(range(0, END, 8))
    got = fed(case.folder.parent)
    assert sorted(got) == sorted(wanted)
    for position, rows in got.items():
        for row in rows:  # half a batch on two nodes, a whole one alone; taken again, the same
            assert row["crops"].items() <= wanted[position].items()
            assert len(row["crops"]) == 8 // row["world"]
        assert {key for row in rows for key in row["crops"]} == set(wanted[position])
        assert sum(row["world"] == 1 for row in rows) == (position >= alone_from)
        together = sum(row["world"] == 2 for row in rows)
        if position == KILLED:
            assert together in (2, 3)  # the other rank may have begun this step, too
        elif position < CUT:
            assert together == 2 + 2 * (first_time <= position < KILLED)
    mine, other = case.newest(), straight.newest()
    assert mine.position == END
    assert mine.state["cursor"] == other.state["cursor"]
