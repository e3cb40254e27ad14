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
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from ..servers import end, kept_ports
from ..waiting import wait_for

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
MessageTimeout=100
BatchStartTimeout=200
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
    """The cluster, up and idle. As root only. AssertionError with what its daemons say if it does not come up."""
    with ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix="grist-slurm-"))
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        folder.chmod(0o755)
        for name in ("munge", "state", "spool-n0", "spool-n1"):
            (folder / name).mkdir()
        ports = stack.enter_context(kept_ports(3))
        text = CONFIGURATION.format(folder=folder, host=socket.gethostname().split(".")[0], ports=ports)
        (folder / "slurm.conf").write_text(text)
        cluster = Slurm(folder)
        stack.callback(_kill_what_is_left, cluster)  # steps outlive their daemons
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
            stack.callback(end, process)

        files = [f"--{name}-file={folder / 'munge' / name}" for name in ("pid", "log", "seed")]
        secret = [f"--key-file={folder / 'key'}", f"--socket={folder / 'munge' / 'socket'}"]
        daemon("munged", "munged", "--foreground", *files, *secret, user="munge")
        wait_for((folder / "munge" / "socket").exists, SECONDS, cluster.logs)
        daemon("slurmctld", "slurmctld", "-D", "-c")
        for node in ("n0", "n1"):
            daemon(f"slurmd-{node}", "slurmd", "-D", "-N", node)
        wait_for(lambda: _idle(cluster), SECONDS, cluster.logs)
        yield cluster


def _kill_what_is_left(cluster: Slurm) -> None:
    """Every process that was told of this cluster: jobs of a test that failed, and what holds them."""
    mark = f"SLURM_CONF={cluster.environ['SLURM_CONF']}".encode()
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):  # it has ended
            if mark in path.read_bytes().split(b"\0"):
                os.kill(int(path.parent.name), signal.SIGKILL)


def _idle(cluster: Slurm) -> bool:
    asked = ["sinfo", "--noheader", "--Node", "--format=%T"]
    done = subprocess.run(asked, env=cluster.environ, capture_output=True, text=True, check=False, timeout=60)
    return done.stdout.split() == ["idle", "idle"]
