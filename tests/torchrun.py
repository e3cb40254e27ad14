"""One torchrun for many cases: the launch costs seconds, a case tenths of one. Prints what the folder's budget holds."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent / "distributed"


def torchrun(script: str, world: int, *args: str, timeout: float = 240, env: dict[str, str] | None = None):
    """Run distributed/`script` on `world` gloo processes; returns the finished process with its output as text."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    start = time.perf_counter()
    done = subprocess.run(
        [*command, str(HERE / script), *args],
        env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"} | (env or {}),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    print(f"{script} on {world} ranks: {time.perf_counter() - start:.1f} s")
    return done


def cases(script: str, world: int, folder: Path) -> dict[str, dict[str, float]]:
    """What `script` wrote to folder/found.jsonl, by case; the process must have ended well."""
    done = torchrun(script, world, str(folder))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    lines = [json.loads(line) for line in (folder / "found.jsonl").read_text().splitlines()]
    return {line.pop("case"): line for line in lines}
