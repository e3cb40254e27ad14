"""Small runs side by side under one pair of watchers: of one rank or two, in forks, each with a fault to come.

The recipe is the smallest that has every part (bench/endings.py). Two ranks meet at a store that the test keeps, as
torchrun has it. Nothing here ends a process that it did not start, and all are gone with the block.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gristmill.ops.bench.endings import TINY
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from ..workers import Worker, Workers

HERE = Path(__file__).parent
PACE = 0.75  # seconds that each step sleeps: of its own it takes 0.045 of a core, and fifteen ranks live side by side


TRAIN = f"import sys; sys.path.insert(0, {str(HERE)!r}); import misfortunes; misfortunes.train(**values)"


class Running:
    """One run. A fault from within (misfortunes.py) is the one of the run's name; others are the test's."""

    def __init__(self, workers: Workers, folder: Path, name: str, data: object, *, world: int = 1,
                 more: Sequence[str]) -> None:  # fmt: skip
        self.name, self.world, self.folder, self.sign = name, world, folder / name, folder / f"{name}.strike"
        self.said = [folder / f"{name}.{rank}.said" for rank in range(world)]
        common = {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        if world > 1:
            self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            common |= {
                "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "GROUP_WORLD_SIZE": "1",
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self._store.port), "TORCHELASTIC_USE_AGENT_STORE": "True",
                "TORCHELASTIC_RESTART_COUNT": "0",
            }  # fmt: skip
        arguments = ["train", "demo", "--out", str(self.folder), *TINY, f"data={data}", f"name={name}"]
        arguments += ["checkpoint.every=160", "metrics.port=0", "stream.damage_bound=0.2", *more]
        self.ranks: list[Worker] = []
        for rank, said in enumerate(self.said):
            values: dict[str, Any] = {
                "name": name, "arguments": arguments, "said": str(said), "pace": PACE, "sign": str(self.sign),
                "environment": common | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if world > 1 else {}),
            }  # fmt: skip
            self.ranks.append(workers.start(TRAIN, values=values))

    def strike(self) -> None:
        """Let its fault from within begin."""
        self.sign.touch()

    def signal(self, rank: int, number: int) -> None:
        os.kill(self.ranks[rank].pid, number)

    def codes(self) -> list[int | None]:
        return [rank.poll() for rank in self.ranks]

    def errors(self) -> str:
        """What its ranks said, for the message of a failure."""
        return "\n".join(f"{path.name}: {path.read_text()[-2000:]}" for path in self.said if path.exists())

    def kill(self) -> None:
        for rank in self.ranks:
            if rank.poll() is None:
                os.kill(rank.pid, signal.SIGCONT)
            rank.kill()
