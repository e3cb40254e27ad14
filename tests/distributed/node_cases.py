"""Run by torchrun on two nodes, or by zygote.py: one rank of a whole run that notes what it was fed.

`FOLDER FAULTS COMMAND...`. FAULTS: the images before which node 1 loses its rank in its first attempt, and its network in the
second one; none: nothing happens.
"""

import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from fault_cases import at_image, run, signalled
from gristmill.ops.run import Run


def noted(folder: Path) -> None:
    """A line a step into FOLDER/fed-PID: the position, and a digest of every image's crops by its key."""
    forward = Run.forward

    def wrapped(self: Run, batch: Any, part: int) -> Any:
        crops = {
            key: hashlib.sha256(b"".join(v[i].contiguous().numpy().tobytes() for v in batch.views.values())).hexdigest()
            for i, key in enumerate(batch.keys)
        }
        with (folder / f"fed-{os.getpid()}").open("a") as file:
            file.write(json.dumps({"position": self.position, "world": self.world, "crops": crops}) + "\n")
        return forward(self, batch, part)

    Run.forward = wrapped


def cut_off(folder: Path) -> None:
    (folder / "cut").touch()
    subprocess.run(["ip", "link", "set", os.environ["GLOO_SOCKET_IFNAME"], "down"], check=True)


def main() -> None:
    folder, faults, *command = sys.argv[1:]
    noted(Path(folder))
    if json.loads(faults) and os.environ["WORLD_SIZE"] == "1" and not (Path(folder) / "cut").exists():
        time.sleep(600)  # on a busy machine the other node may be late; torchrun ends this once it is there
    if json.loads(faults) and os.environ["RANK"] == "1":
        killed, cut = json.loads(faults)
        if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            signalled("kill", killed)
        else:
            at_image(cut, lambda: cut_off(Path(folder)))
    run([], [command])
