"""Ranks that a real launcher starts, torchrun or srun, and that are forks of the zygote all the same.

The launcher starts a program of a few milliseconds, which leaves its arguments and environment in a folder, passes on the
signals that it gets, and ends as its rank ends. The rank is forked from what has imported everything, in the network
namespace of that program. Ten seconds of a core less for each start, and a test starts many.
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from ..workers import Worker
from .zygote import Zygote

PROGRAM = """#!{python} -IS
import json, os, signal, sys, time
mine = os.path.join({folder!r}, str(os.getpid()))
rank = []
def relay(number, frame):
    if not rank:
        os._exit(128 + number)
    os.kill(rank[0], number)
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
    signal.signal(number, relay)
with open(mine + ".new", "w") as file:
    json.dump({{"arguments": sys.argv[1:], "environment": dict(os.environ)}}, file)
os.rename(mine + ".new", mine + ".asked")
def answer(what):
    while not os.path.exists(mine + what):
        if os.path.exists(os.path.join({folder!r}, "closed")):
            os._exit(1)
        time.sleep(0.02)
    with open(mine + what) as file:
        return int(file.read())
rank.append(answer(".pid"))
code = answer(".code")
if code < 0:
    signal.signal(-code, signal.SIG_DFL) if code != -9 else None
    os.kill(os.getpid(), -code)
sys.exit(code)
"""
RANK = """
import ctypes, os
if os.readlink(f"/proc/{client}/ns/net") != os.readlink("/proc/self/ns/net"):
    namespace = os.open(f"/proc/{client}/ns/net", os.O_RDONLY)
    if ctypes.CDLL(None, use_errno=True).setns(namespace, 0x40000000):
        raise OSError(ctypes.get_errno(), "setns")
with open(f"/proc/{client}/status") as status:
    environment["LAUNCHER"] = next(line.split()[1] for line in status if line.startswith("PPid:"))
become(script, arguments, environment, errors, 3600.0)
"""


@dataclass
class Passenger:
    """A rank, the process id of the program that stands for it, and what its launcher said to it."""

    client: int
    rank: Worker
    environment: dict[str, str]
    errors: Path
    told: bool = False


@dataclass
class Ferry:
    """Ranks run `script` of this folder with `arguments` and then the launcher's. Call `cross` while a launcher runs.

    At the end of the block none of them is left, nor any program that stands for one.
    """

    zygote: Zygote
    folder: Path
    script: str
    arguments: tuple[object, ...] = ()
    ends: bool = False  # whether how their interpreters end is to be seen (workers.py)
    passengers: list[Passenger] = field(default_factory=list)

    def program(self, path: Path) -> Path:
        """Write what the launcher is to start."""
        self.folder.mkdir(exist_ok=True)
        path.parent.mkdir(exist_ok=True)
        path.write_text(PROGRAM.format(python=sys.executable, folder=str(self.folder)))
        path.chmod(0o755)
        return path

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        (self.folder / "closed").touch()
        for passenger in self.passengers:
            passenger.rank.kill()

    def cross(self) -> None:
        """Start the ranks that were asked for, pass on how others ended, and end those whose program was killed."""
        for asked in sorted(self.folder.glob("*.asked")):
            job = json.loads(asked.read_text())
            asked.unlink()
            errors = asked.with_suffix(".err")
            arguments = [*map(str, self.arguments), *job["arguments"]]
            rank = self.zygote.start(
                RANK, end=self.ends, client=int(asked.stem), script=self.script, arguments=arguments,
                environment=job["environment"], errors=str(errors),
            )  # fmt: skip
            self.passengers.append(Passenger(int(asked.stem), rank, job["environment"], errors))
            _write(asked.with_suffix(".pid"), rank.pid)
        for passenger in self.passengers:
            if passenger.told:
                continue
            if not Path(f"/proc/{passenger.client}").exists():
                passenger.rank.kill()
            code = passenger.rank.poll()
            if code is not None:
                passenger.told = True
                _write(self.folder / f"{passenger.client}.code", code)

    def said(self, **environment: str) -> str:
        """What ranks with these values in their environment wrote to stderr, in the order of their starts."""
        return "".join(
            passenger.errors.read_text()
            for passenger in self.passengers
            if environment.items() <= passenger.environment.items() and passenger.errors.exists()
        )


def _write(path: Path, number: int) -> None:
    draft = path.with_suffix(path.suffix + ".new")
    draft.write_text(str(number))
    draft.rename(path)
