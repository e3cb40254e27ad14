"""ops/deploy/slurm/train.sbatch, run by a real Slurm of two nodes on this machine: signal, requeue, resume bit for bit.

The first attempt is torchrun's, one task a node; the second one is srun's, whose place is worked out from Slurm's own
variables. Together they must give what an uninterrupted run gives.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ..waiting import wait_for
from .case import Case
from .ferry import Ferry
from .slurm_cluster import slurm
from .zygote import HERE, Zygote

SCRIPT = HERE.parents[1] / "ops" / "deploy" / "slurm" / "train.sbatch"
TOOLS = Path(sys.executable).parent
MINUTES = 240.0  # seconds in which a job gets anywhere, however busy the machine is
# What a site has in its own: programs to find, and here two nodes that are one host.
SITE = """
export PATH={bin}:{tools}:$PATH OMP_NUM_THREADS=1 GLOO_SOCKET_IFNAME=lo MASTER_ADDR=127.0.0.1 LOCAL_ADDR=127.0.0.1
if ((${{SLURM_RESTART_COUNT:-0}} == 0)); then
    LAUNCHER=torchrun
fi
"""


def wait(happened: Callable[[], bool], ferry: Ferry, says: Callable[[], str]) -> None:
    def crossed() -> bool:
        ferry.cross()
        return happened()

    wait_for(crossed, MINUTES, says, every=0.1)


@pytest.mark.program("slurmctld")
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_signal_requeue_resume_bit_for_bit(zygote: Zygote, straight: Case, tiny: Path, tmp_path: Path):
    case = Case(zygote, tmp_path / "run", tiny)
    ferry = Ferry(zygote, tmp_path / "ferry", "held", (tmp_path, 24))
    ferry.program(tmp_path / "bin" / "gristmill")
    (tmp_path / "site.sh").write_text(SITE.format(bin=tmp_path / "bin", tools=TOOLS))
    log = tmp_path / "log"
    with slurm() as cluster, ferry:
        options = ["--parsable", f"--chdir={tmp_path}", f"--output={log}", "--ntasks-per-node=1", "--cpus-per-task=1"]
        arguments = case.command()[1:]  # "train" is the script's
        site = {"SITE": str(tmp_path / "site.sh")}
        job = cluster("sbatch", *options, "--gres=none", SCRIPT, *arguments, **site).strip()

        def says() -> str:
            return f"{cluster.job(job)}\n{log.read_text() if log.exists() else ''}\n{cluster.logs()}\n{ferry.said()}"

        wait(lambda: all((tmp_path / f"there-{rank}").exists() for rank in (0, 1)), ferry, says)
        assert cluster.job(job)["JobState"] == "RUNNING"
        cluster("scancel", "--batch", "--signal=USR1", job)
        wait(lambda: cluster.job(job)["JobState"] == "PENDING", ferry, says)
        assert cluster.job(job)["Restarts"] == "1", says()
        assert case.newest().position == 32, says()
        assert [line["position"] for line in case.trace()] == [0, 8, 16, 24]
        cluster("scontrol", "update", f"JobId={job}", "StartTime=now")  # two minutes earlier than Slurm would
        wait(lambda: cluster.job(job)["JobState"] not in ("PENDING", "RUNNING", "COMPLETING"), ferry, says)
        assert cluster.job(job)["JobState"] == "COMPLETED", says()
    text = log.read_text()
    for sentence in ("attempt 1, torchrun on n[0-1]", "back into the queue", "attempt 2, srun on n[0-1]"):
        assert sentence in text
    assert [passenger.rank.poll() for passenger in ferry.passengers] == [75, 75, 0, 0]
    for passenger in ferry.passengers:
        torchrun = "TORCHELASTIC_RUN_ID" in passenger.environment
        assert torchrun == (passenger in ferry.passengers[:2])
    assert ferry.said().count("stopped at image 32; the same command goes on from there") == 2
    assert ferry.said(SLURM_RESTART_COUNT="1").count("going on from image 32") == 1
    assert "Traceback" not in ferry.said()
    assert case.trace() == straight.trace()
    mine, theirs = case.newest(), straight.newest()
    assert mine.digests == theirs.digests
    assert mine.state["cursor"] == theirs.state["cursor"]


def test_slurms_warning_to_one_rank_stops_all_with_a_checkpoint(zygote: Zygote, tiny: Path, tmp_path: Path):
    """SIGUSR1 straight to a rank, as `srun --signal` or a batch script without trap would pass it on."""
    case = Case(zygote, tmp_path / "run", tiny)
    group = case.run(faults=({"what": "signalled", "name": "usr1", "at": 24, "rank": 1},))
    assert group.codes == [75, 75], group.errors
    assert case.newest().position == 32
