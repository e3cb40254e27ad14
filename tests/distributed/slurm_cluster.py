"""A Slurm of two nodes on one machine, for test_slurm.py: real daemons on free loopback ports, ended by their process ids.

Two slurmd share the host under different names, as Slurm's own tests have it. Everything they write lies in a folder of
their own whose path is short, since munge refuses long names of sockets and folders that others may not enter.
"""

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

CONFIGURATION = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
KillWait=10
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_interval=1
NodeName=n0 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1
PartitionName=all Nodes=ALL Default=YES State=UP
"""
SECONDS = 60.0  # in which daemons are up, however busy the machine is


class Slurm:
    """Commands to the cluster."""

    def __init__(self, folder: Path):
        self.folder = folder
        # What the session has set for its own processes is not a job's.
        self.environ = {k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "RANK", "WORLD_SIZE")}
        self.environ["SLURM_CONF"] = str(folder / "slurm.conf")

    def __call__(self, *command: object, **extra: str) -> str:
        """What a command of Slurm prints; it must end with 0."""
        done = subprocess.run(
            list(map(str, command)), env=self.environ | extra, capture_output=True, text=True, check=False, timeout=60
        )
        assert done.returncode == 0, (command, done.stderr, self.logs())
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        """What `scontrol show job` says of it."""
        words = self("scontrol", "--oneliner", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def logs(self) -> str:
        return "\n".join(f"{path.name}: {path.read_text()[-1500:]}" for path in self.folder.glob("*.out"))


@contextmanager
def slurm() -> Iterator[Slurm]:
    """The cluster, up and idle. As root only. Raises TimeoutError if it does not come up."""
    with ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix="grist-slurm-"))
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        folder.chmod(0o755)
        for name in ("munge", "state", "spool-n0", "spool-n1"):
            (folder / name).mkdir()
        text = CONFIGURATION.format(folder=folder, host=socket.gethostname().split(".")[0], ports=_free_ports(3))
        (folder / "slurm.conf").write_text(text)
        cluster = Slurm(folder)
        munge = pwd.getpwnam("munge")
        (folder / "key").write_bytes(os.urandom(128))
        for path, mode in ((folder / "key", 0o400), (folder / "munge", 0o755)):
            os.chown(path, munge.pw_uid, munge.pw_gid)
            path.chmod(mode)

        def daemon(name: str, *command: object, user: str | None = None) -> None:
            out = stack.enter_context((folder / f"{name}.out").open("wb"))
            process = subprocess.Popen(
                list(map(str, command)), env=cluster.environ, stdout=out, stderr=out, user=user, group=user
            )
            stack.callback(_end, process)

        files = [f"--{name}-file={folder / 'munge' / name}" for name in ("pid", "log", "seed")]
        secret = [f"--key-file={folder / 'key'}", f"--socket={folder / 'munge' / 'socket'}"]
        daemon("munged", "munged", "--foreground", *files, *secret, user="munge")
        _until((folder / "munge" / "socket").exists, cluster)
        daemon("slurmctld", "slurmctld", "-D", "-c")
        for node in ("n0", "n1"):
            daemon(f"slurmd-{node}", "slurmd", "-D", "-N", node)
        _until(lambda: _idle(cluster), cluster)
        yield cluster


def _idle(cluster: Slurm) -> bool:
    asked = ["sinfo", "--noheader", "--Node", "--format=%T"]
    done = subprocess.run(asked, env=cluster.environ, capture_output=True, text=True, check=False, timeout=60)
    return done.stdout.split() == ["idle", "idle"]


def _until(happened, cluster: Slurm) -> None:
    until = time.monotonic() + SECONDS
    while not happened():
        if time.monotonic() > until:
            raise TimeoutError(f"Slurm is not up: {cluster.logs()}")
        time.sleep(0.05)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [probe.getsockname()[1] for probe in probes]
