"""The machine check: every check that can be provoked is, for real; nothing hangs, nothing raises, remedies are there."""

import json
import os
import resource
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner
from gristmill.ops import launch_place
from gristmill.ops.cli import main
from gristmill.ops.doctor import Asked, Finding, worst
from gristmill.ops.doctor.clocks import check_clock
from gristmill.ops.doctor.data import check_data
from gristmill.ops.doctor.devices import Card, judge
from gristmill.ops.doctor.disk import PREFIX, check_cache, check_out, file_system, look
from gristmill.ops.doctor.limits import check_cpus, check_files, check_memory, check_shared
from gristmill.ops.doctor.network import check_name, check_peers, check_port, split
from gristmill.ops.doctor.runner import CHECKS, Check, run
from gristmill.ops.doctor.tested import TESTED
from gristmill.ops.doctor.versions import check_compiler, check_packages, check_python
from gristmill.ops.monitor import ports
from gristmill.shards.demo import make_demo_images
from gristmill.shards.ingest import ingest_folder

from ..disks import small_disk
from ..faulty_http import FaultyServer

ASKED = Asked(seconds=60)
ROOT = Path(__file__).parent.parent.parent


def check_of(name: str) -> Check:
    (check,) = (check for check in CHECKS if check.name == name)
    return check


def cli(*arguments: object) -> tuple[int, str]:
    answer = CliRunner().invoke(main, ["doctor", *map(str, arguments)])
    assert answer.exception is None or isinstance(answer.exception, SystemExit), answer.exception
    return answer.exit_code, answer.output


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("doctor")
    make_demo_images(folder / "images", images=96, size=32, instances=3)
    ingest_folder(folder / "images", folder / "data", shard_samples=12)
    return folder / "data" / "train"


# Releases


def test_the_releases_are_those_of_the_constraints():
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    assert {name: pinned[name] for name in TESTED} == TESTED


def test_packages():
    assert check_packages(ASKED).state == "ok"
    found = check_packages(ASKED, {**TESTED, "torch": "2.9.0", "timm": ""})
    assert found.state == "bad"
    assert "timm" in found.found
    assert found.remedy == 'pip install "timm==1.0.31" "torch==2.14.1"'
    older = check_packages(ASKED, {**TESTED, "numpy": "2.0.1"})
    assert (older.state, older.remedy) == ("warn", 'pip install "numpy==2.4.6"')
    assert check_packages(ASKED, {**TESTED, "numpy": "2.9.0"}).state == "ok"
    assert [check_python(ASKED, version).state for version in ((3, 10), (3, 11), (3, 12))] == ["bad", "ok", "warn"]
    assert check_compiler(ASKED).state == "ok"


# GPUs: what the makers' library would say of them


def states(cards: list[Card], **more: object) -> list[tuple[str, str]]:
    how = {"driver": "580.65.06", "serves": 13000, "built": 13, "dali": 13, "usable": True, "seen": len(cards)} | more
    return [(finding.name, finding.state) for finding in judge(cards, **how)]  # pyright: ignore[reportArgumentType]


def test_gpus():
    card = Card("H100", 80 << 30, 79 << 30, (9, 0), 0)
    assert states([card] * 8) == [("gpu", "ok"), ("driver", "ok")]
    assert states([]) == [("gpu", "ok"), ("driver", "ok")]
    assert states([], usable=False) == [("gpu", "ok")]
    assert states([], usable=False, bus=4) == [("gpu", "bad")]
    assert states([card], serves=12020, usable=False) == [("gpu", "ok"), ("driver", "bad")]
    assert states([card], usable=False, hidden="") == [("gpu", "bad")]
    assert states([card], dali=12)[1] == ("driver", "bad")
    assert states([card, Card("H100", 80 << 30, 79 << 30, (9, 0), 3)])[0] == ("gpu", "bad")
    assert states([Card("V100", 32 << 30, 31 << 30, (7, 0))])[0] == ("gpu", "bad")
    assert states([Card("T4", 16 << 30, 15 << 30, (7, 5))])[0] == ("gpu", "warn")
    assert states([card, Card("H100", 80 << 30, 10 << 30, (9, 0), 0)])[0] == ("gpu", "warn")
    assert states([card], processes=2)[0] == ("gpu", "bad")
    assert states([card] * 2, processes=3)[0] == ("gpu", "bad")
    # A scheduler shows each of eight processes its own.
    assert states([card] * 8, processes=8, seen=1, hidden="3")[0] == ("gpu", "ok")


# Limits


def groups_of(folder: Path, lines: str, files: dict[str, str]) -> tuple[Path, Path]:
    """A /proc and a /sys/fs/cgroup as the kernel would show them."""
    proc, groups = folder / "proc", folder / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal:       67108864 kB\nMemFree: 1 kB\nMemAvailable:   33554432 kB\n")
    (proc / "self" / "cgroup").write_text(lines)
    for name, text in files.items():
        (groups / name).parent.mkdir(parents=True, exist_ok=True)
        (groups / name).write_text(text)
    return proc, groups


SECOND = ("0::/job/step\n", {
    "job/memory.max": "3000000000\n", "job/memory.current": "500000000\n", "job/step/memory.max": "max\n",
    "job/cpu.max": "150000 100000\n", "job/step/cpu.max": "max 100000\n",
})  # fmt: skip
FIRST = ("4:memory:/job\n3:cpu,cpuacct:/job\n", {
    "memory/job/memory.limit_in_bytes": "3000000000\n", "memory/job/memory.usage_in_bytes": "500000000\n",
    "memory/memory.limit_in_bytes": "9223372036854771712\n", "cpu,cpuacct/job/cpu.cfs_quota_us": "150000\n",
    "cpu,cpuacct/job/cpu.cfs_period_us": "100000\n", "cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
})  # fmt: skip


@pytest.mark.parametrize("version", [FIRST, SECOND])
def test_limits_of_containers(tmp_path: Path, version: tuple[str, dict[str, str]], monkeypatch: pytest.MonkeyPatch):
    where = groups_of(tmp_path, *version)
    one, two, four = (check_memory(Asked(local_world=count), *where) for count in (1, 2, 4))
    assert [one.state, two.state, four.state] == ["ok", "warn", "bad"]
    assert one.figures["limit_bytes"] == 3_000_000_000
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    found = check_cpus(Asked(local_world=4), *where)
    assert (found.state, found.figures["quota"]) == ("warn", 1.5)
    monkeypatch.setenv("OMP_NUM_THREADS", "64")
    found = check_cpus(ASKED, *where)
    assert found.state == "warn"
    assert "threads=1" in found.remedy


def test_this_machine_has_no_surprises():
    assert check_memory(ASKED).figures["total_bytes"] > 1 << 30
    assert check_cpus(ASKED).figures["cores"] == len(os.sched_getaffinity(0))
    assert check_clock(ASKED).state in ("ok", "warn")
    assert check_clock(ASKED, now=1e9).state == "bad"


@pytest.mark.parametrize(("given", "state"), [("1", "ok"), ("0", "warn")])
def test_text(given: str, state: str):
    code = "from gristmill.ops.doctor.limits import Asked, check_text; print(check_text(Asked()).state)"
    environ = os.environ | {"PYTHONUTF8": given, "PYTHONCOERCECLOCALE": "0", "LC_ALL": "POSIX"}
    told = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True)
    assert told.stdout.strip() == state


def test_few_open_files():
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        for limit, state in ((200, "bad"), (600, "warn")):
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, before[1]))
            found = check_files(ASKED)
            assert (found.state, found.figures["soft"]) == (state, limit)
            assert "ulimit -n" in found.remedy
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_little_shared_memory(tmp_path: Path):
    with small_disk(tmp_path / "shm", "64m") as folder:
        assert [check_shared(ASKED, folder, gpus).state for gpus in (0, 1, 2)] == ["ok", "ok", "warn"]
    assert check_shared(ASKED, tmp_path / "none", 2).state == "bad"


# Disks


def test_a_sound_disk(tmp_path: Path):
    found = look("out", tmp_path / "not" / "yet")
    assert found.figures["folder"] == str(tmp_path)
    assert found.figures["write_bytes_per_s"] > 0 < found.figures["read_bytes_per_s"]
    assert found.state != "bad" or found.figures["free_bytes"] < 2e9
    assert not list(tmp_path.iterdir())
    assert check_out(ASKED).state == check_cache(ASKED).state == "skipped"


def test_what_a_killed_check_left_is_removed(tmp_path: Path):
    for name, age in (("old", 7200), ("new", 0)):
        left = tmp_path / f"{PREFIX}{name}"
        left.mkdir()
        (left / "draft").touch()
        then = left.stat().st_mtime - age
        os.utime(left, (then, then))
    look("out", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [f"{PREFIX}new"]


def test_a_small_and_a_full_disk(tmp_path: Path):
    with small_disk(tmp_path / "small disk", "1m") as folder:
        found = look("out", folder)
        assert (found.state, found.figures["type"]) == ("bad", "tmpfs")
        assert "little room" in found.found
        assert "memory" in found.found
        (folder / "all").write_bytes(bytes(folder.stat().st_blksize * 250))
        full = look("out", folder)
        assert full.state == "bad"
        assert "No space left" in full.found
        assert "make room" in full.remedy
        assert [path.name for path in folder.iterdir()] == ["all"]


def test_a_disk_that_cannot_be_written(tmp_path: Path):
    with small_disk(tmp_path / "locked", "1m") as folder:
        subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
        assert file_system(folder) == ("tmpfs", True)
        found = look("cache", folder / "shards")
        assert found.state == "bad"
        assert "read-only" in found.found
        assert "--cache" in found.remedy


def test_a_file_is_no_folder(tmp_path: Path):
    (tmp_path / "file").touch()
    assert look("out", tmp_path / "file").state == "bad"


# Data


def test_data(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    found = check_data(Asked(data=str(data)))
    assert found.state in ("ok", "warn")
    assert found.figures["shards"] == len(list(data.glob("*.tar"))) > 1
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with FaultyServer(
        {f"/set/{p.relative_to(data)}": p.read_bytes() for p in data.rglob("*") if p.is_file()}
    ) as server:
        there = check_data(Asked(data=server.url("/set")))
        assert there.state in ("ok", "warn"), there
        assert there.figures["bytes_per_s"] > 0
        assert check_data(Asked(data=server.url("/other"))).state == "bad"
        dead = server.url("/set")
    gone = check_data(Asked(data=dead, seconds=3))
    assert gone.state == "bad"
    assert "the address, the network" in gone.remedy
    nothing = check_data(Asked(data=str(tmp_path / "nothing")))
    assert nothing.state == "bad"


def test_a_read_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Nobody ever writes into this pipe: as a file on a file server that is gone. What reads starts at once, for imports
    that take as long would be given up, too."""
    os.mkfifo(tmp_path / "dataset.json")
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\ncd {tmp_path}\necho $$ > reads\nread line < dataset.json\n")
    program.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(program))
    (found,) = run(check_of("data"), Asked(data=str(tmp_path), seconds=6))
    assert found.state == "bad"
    assert "no answer within 6 s" in found.found
    with pytest.raises(ProcessLookupError):  # it is not left behind
        os.kill(int((tmp_path / "reads").read_text()), 0)


# Network


def test_a_taken_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        found = check_port(Asked(port=port))
    assert found.state == "warn"
    assert f"{port} is taken by process {os.getpid()}" in found.found
    assert check_port(Asked(port=port)).state == "ok"
    assert check_port(Asked(port=65535, local_world=2)).state == "warn"


def test_ports_are_those_of_the_parts_that_open_them():
    assert Asked().port == ports.PORT
    assert split("node2")[1] == int(os.environ.get("MASTER_PORT", "") or launch_place.PORT)


def test_names_and_peers():
    assert check_name(ASKED, "no.such.name.invalid").state == "warn"
    assert check_name(ASKED, "localhost").state == "ok"
    assert check_name(Asked(grouped=True), "localhost").state == (
        "ok" if os.environ.get("GLOO_SOCKET_IFNAME") else "warn"
    )
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        found = check_peers(Asked(peers=(f"127.0.0.1:{port}",)))
        assert (found.state, "connected" in found.found) == ("ok", True)
    assert "nobody listens" in check_peers(Asked(peers=(f"127.0.0.1:{port}",))).found
    lost = check_peers(Asked(peers=("127.0.0.1:99999", "no.such.name.invalid")))
    assert lost.state == "bad"
    assert "no.such.name.invalid: the name does not resolve" in lost.found
    assert split("[::1]:7") == ("::1", 7)
    assert split("fe80::1")[0] == "fe80::1"


# What runs the checks


def test_a_crash_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\necho the driver is upset >&2\nkill -SEGV $$\n")
    program.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(program))
    (found,) = run(check_of("dali"), ASKED)
    assert found.state == "bad"
    assert "SIGSEGV: the driver is upset" in found.found
    program.unlink()
    (found,) = run(check_of("dali"), ASKED)
    assert (found.state, "No such file" in found.found) == ("bad", True)


def test_an_exception_is_a_finding():
    (found,) = run(Check("broken", "network:nothing_of_this_name"), ASKED)
    assert found.state == "bad"
    assert "AttributeError" in found.found


def test_findings_have_remedies():
    with pytest.raises(ValueError, match="what to do"):
        Finding("x", "bad", "found", "why")
    assert worst([]) == "skipped"
    found = Finding("x", "warn", "found", "why", "do", {"a": 1}, (3,))
    assert Finding.from_dict(json.loads(json.dumps(found.as_dict()))) == found


@contextmanager
def listening() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_STEP_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    with listening() as port:
        code, out = cli("--only", "port", "--only", "open files", "--only", "peers", "--port", port)
        assert code == 0
        assert max(map(len, out.splitlines())) <= 80
        assert "do: end it if it is a run of old" in " ".join(out.split())
        assert "1 of 3 could be better" in out
    code, out = cli("--only", "out", "--out", tmp_path / "run", "--json")
    (found,) = json.loads(out)["findings"]
    assert found["name"] == "out"
    assert found["figures"]["write_bytes_per_s"] > 0
    assert code == (found["state"] == "bad")
    code, out = cli("--only", "data", "--data", tmp_path / "none")
    assert code == 1
    assert "1 of 1 must be mended before a training" in out
    code, out = cli("--only", "prot")
    assert code == 2
    assert "open files" in out
    code, out = cli("--help")
    assert "torchrun --nproc-per-node 8" in out
    assert "Exit code 0" in out
