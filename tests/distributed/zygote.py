"""Groups of ranks without launch costs: asks fault_cases.py, which has imported everything, to fork them.

Forks are told apart from what asks for them, so that the tests themselves may have threads and groups of their own.
"""

import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

SCRIPT = Path(__file__).parent / "fault_cases.py"
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}


@dataclass
class Group:
    """Ranks that ran: exit codes by rank (None: still there), what they wrote to stderr and stdout, process ids."""

    codes: list[int | None]
    errors: list[str]
    outputs: list[str]
    pids: list[int]


class Zygote:
    """Use as a context. `run` starts a group as torchrun would, and waits for its ranks."""

    def __enter__(self) -> "Zygote":
        begin = time.perf_counter()
        self.process = subprocess.Popen(
            [sys.executable, SCRIPT],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | ENVIRONMENT,
        )
        self._lines: queue.Queue[dict[str, Any]] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        assert self._lines.get(timeout=240)["ready"]
        self.codes: dict[int, int] = {}
        print(f"imports: {time.perf_counter() - begin:.1f} s")
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin
        self.process.stdin.close()  # it ends what is left of its children
        self.process.wait(60)

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self._lines.put(json.loads(line))

    def run(
        self,
        log: Path,
        *commands: Iterable[object],
        world: int = 2,
        faults: Iterable[dict[str, Any]] = (),
        only: Collection[int] | None = None,
        env: dict[str, str] | None = None,
        seconds: float = 240,
    ) -> Group:
        """`world` ranks of these commands one after the other, until all (or `only` these) have ended."""
        begin, store = time.perf_counter(), None
        environment = dict(ENVIRONMENT) | (env or {})
        if world > 1:
            # As torchrun has it: the launcher keeps the store, and tells its ranks where.
            store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            environment |= {
                "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "GROUP_WORLD_SIZE": "1",
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True",
                "TORCHELASTIC_RESTART_COUNT": "0",
            }  # fmt: skip
        lines = [list(map(str, command)) for command in commands]
        request = {"world": world, "env": environment, "faults": list(faults), "log": str(log), "commands": lines}
        assert self.process.stdin
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        pids = self._await("started", seconds)
        for rank in range(world) if only is None else only:
            self.wait(pids[rank], seconds)
        print(f"{log.name} on {world} ranks: {time.perf_counter() - begin:.1f} s")
        errors, outputs = ([Path(f"{log}.{rank}.{end}").read_text() for rank in range(world)] for end in ("err", "out"))
        return Group([self.codes.get(pid) for pid in pids], errors, outputs, pids)

    def wait(self, pid: int, seconds: float = 60) -> int:
        """The exit code of a rank, once it has ended."""
        while pid not in self.codes:
            self._await("ended", seconds)
        return self.codes[pid]

    def _await(self, what: str, seconds: float) -> Any:
        while True:
            line = self._lines.get(timeout=seconds)
            if "ended" in line:
                self.codes[line["ended"]] = line["code"]
            if what in line:
                return line[what]
