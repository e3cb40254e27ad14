"""Groups of ranks without launch costs: forks of the process that has imported everything (tests/command.py).

An interpreter that imports torch, timm and DeepSpeed takes ten seconds of a core, a fork none: so many groups stay
affordable. Each rank is a process of its own all the same, which can be killed, and comes to its interpreter's real end
where a test asks for it.
"""

import json
import os
import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from ..workers import Worker, Workers

HERE = Path(__file__).parent


@dataclass
class Group:
    """Ranks that ran, and what each wrote to stderr."""

    ranks: list[Worker]
    errors: list[str]

    @property
    def codes(self) -> list[int | None]:
        """Exit codes by rank; None: still there."""
        return [rank.poll() for rank in self.ranks]

    @property
    def pids(self) -> list[int]:
        return [rank.pid for rank in self.ranks]


class Zygote:
    """Starts groups as torchrun would, and waits for their ranks."""

    def __init__(self, workers: Workers) -> None:
        self._workers = workers

    def start(self, code: str, **values: Any) -> Worker:
        """One fork, in which this folder can be imported and `become` makes a rank (rank.py)."""
        return self._workers.start(
            f"import sys; sys.path.insert(0, {str(HERE)!r}); from rank import become\n{code}", **values
        )

    def group(
        self,
        log: Path,
        script: str,
        *arguments: object,
        world: int = 2,
        only: Collection[int] | None = None,
        env: dict[str, str] | None = None,
        seconds: float = 240,
        end: bool = False,
    ) -> Group:
        """`world` ranks of a script of this folder, until all (or `only` these) have ended.

        log: where their stderr goes, followed by the rank. A rank that is not done after so many seconds prints where it
        stands, and ends with code 1. end: whether how their interpreters end is to be seen (workers.py).
        """
        begin, store = time.perf_counter(), None
        environment = {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"} | (env or {})
        if world > 1:
            # As torchrun has it: the launcher keeps the store, and tells its ranks where.
            store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            environment |= {
                "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "GROUP_WORLD_SIZE": "1",
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True",
                "TORCHELASTIC_RESTART_COUNT": "0",
            }  # fmt: skip
        ranks = [
            self.start(
                "become(script, arguments, environment, errors, seconds)",
                end=end,
                script=script,
                arguments=list(map(str, arguments)),
                environment=environment | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if world > 1 else {}),
                errors=f"{log}.{rank}.err",
                seconds=seconds,
            )
            for rank in range(world)
        ]
        try:
            for rank in range(world) if only is None else only:
                ranks[rank].join()
        except BaseException:  # who waited was interrupted
            for rank in ranks:
                rank.kill()
            raise
        print(f"{script} on {world} ranks: {time.perf_counter() - begin:.1f} s")
        return Group(ranks, [Path(f"{log}.{rank}.err").read_text() for rank in range(world)])

    def commands(
        self, log: Path, *commands: Iterable[object], faults: Iterable[dict[str, Any]] = (), **how: Any
    ) -> Group:
        """Ranks that give these commands one after the other, each with its faults (fault_cases.py), to their real end."""
        lines = [list(map(str, command)) for command in commands]
        return self.group(log, "fault_cases", json.dumps(list(faults)), json.dumps(lines), **{"end": True, **how})

    def cases(self, script: str, world: int, folder: Path, *arguments: object) -> dict[str, dict[str, Any]]:
        """What a script wrote to folder/found.jsonl, by case; its ranks must have ended well."""
        group = self.group(folder / "rank", script, folder, *arguments, world=world)
        assert group.codes == [0] * world, group.errors
        lines = [json.loads(line) for line in (folder / "found.jsonl").read_text().splitlines()]
        return {line.pop("case"): line for line in lines}
