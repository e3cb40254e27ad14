"""Whole runs for test_gpu_run.py, each command in a process of its own: what has begun CUDA cannot be forked.

All that the tests look at is started at once, as many processes as there are cores, for a start costs more than a run. A
run also notes what it is fed (seen.jsonl: keys, a digest of all crops, where they lie), and can stand still at a step.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gristmill.ops.checkpoint import Saved, newest
from gristmill.ops.runlog import read_log
from gristmill.ops.stores import open_store

from .command import COMMAND, IMPORTS, MINUTES, Command

# One GPU for each process and no group, whatever earlier tests have left in the environment.
LEFT = ("DS_ACCELERATOR", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in LEFT}
WITHOUT = {"CUDA_VISIBLE_DEVICES": ""}  # no GPU
BARE = {"PATH": "/nonexistent"}  # no compiler, no ninja

BATCH, STEPS, EVERY = 16, 12, 64
STOP, KILL = 96, 144  # where SIGTERM comes; between checkpoints, with one written on the way
RECIPE = "mugs-vits16-100"
SMALL = (
    f"batch={BATCH}", f"images={BATCH * STEPS}", f"checkpoint.every={EVERY}", "probes.at=[]", "metrics.port=off", "threads=1",
)  # fmt: skip
MAIN = (
    "batch=32", "images=384", "checkpoint.every=128", "probes.at=[0.0, 1.0]", "metrics.port=0", "precision=autocast", "threads=1",
)  # fmt: skip
WATCH = (80, 128)  # steps in which waits are counted; a checkpoint ends the last of them
HELD = 256  # where the run above stands still to be looked at
# ViT-S as it is, with all of its crops and memories, for the memory of a step.
WHOLE = ("batch=8", "images=32", "probes.at=[]", "metrics.port=off", "checkpoint.every=4096", "threads=4")
PRECISIONS, STAGES = ("fp32", "autocast", "bf16"), (0, 1, 2, 3)

# What a process runs, with `arguments`, `hold` and `seen` given: the command line, and notes of what it is fed.
NOTES = """
import hashlib, json, torch
fed = Run.forward

def noting(self, batch, part):
    if part == 0:
        bits = hashlib.blake2b(digest_size=16)
        for name in sorted(batch.views) if not waits else ():  # which would wait, too
            bits.update(batch.views[name].contiguous().cpu().numpy().tobytes())
        note = {"position": self.position, "keys": batch.keys, "digest": bits.hexdigest()}
        note["where"] = sorted({crops.device.type for crops in batch.views.values()})
        note["peak"] = torch.cuda.max_memory_allocated() if self.device.type == "cuda" else 0
        with open(seen, "a") as file:
            file.write(json.dumps(note) + "\\n")
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
    return fed(self, batch, part)

Run.forward = noting
"""
# Where the host waits for the device, in the steps from WATCH on: by torch's own warnings, and where DeepSpeed does.
WAITS = """
if waits:
    import collections, threading, traceback, warnings
    from pathlib import Path
    import gristmill.ops
    from deepspeed.accelerator import get_accelerator

    root, sites, (begin, end) = Path(gristmill.ops.__file__).parents[1], collections.Counter(), waits

    def waited(what):
        frames = [frame for frame in traceback.extract_stack() if Path(frame.filename).is_relative_to(root)]
        place = f"{Path(frames[-1].filename).relative_to(root)}:{frames[-1].lineno}" if frames else "?"
        sites[f"{threading.current_thread().name} {what} {place}"] += 1

    def warned(message, *_, **__):
        if "synchronizing" in str(message):
            waited("copies")

    device, watched = get_accelerator(), Run.forward
    plain = device.synchronize

    def synchronize(*given):
        if begin <= reached[0] < end:
            waited("synchronizes")
        return plain(*given)

    def watching(self, batch, part):
        reached[0] = self.position
        if self.device.type == "cuda" and self.position in (begin, end):
            warnings.simplefilter("always")
            warnings.showwarning = warned
            torch.cuda.set_sync_debug_mode("warn" if self.position == begin else "default")
        if self.position == end:
            with open(seen, "a") as file:
                file.write(json.dumps({"position": -1, "waits": dict(sites)}) + "\\n")
        return watched(self, batch, part)

    reached, device.synchronize, Run.forward = [-1], synchronize, watching
"""


class Driven(Command):
    """A command line in a new process; `hold` as a fork's."""

    def __init__(self, folder: Path, arguments: Sequence[object], changed: dict[str, str], hold: int | None = None,
        waits: tuple[int, int] | None = None,
    ) -> None:  # fmt: skip
        self._files = [folder / name for name in ("out", "err")]
        self._there, self._go, self.notes = folder / "there", folder / "go", folder / "seen.jsonl"
        held = None if hold is None else [hold, str(self._there), str(self._go), MINUTES]
        given = {"arguments": list(map(str, arguments)), "hold": held, "seen": str(self.notes), "waits": waits}
        program = "\n".join([IMPORTS, *(f"{name} = {value!r}" for name, value in given.items()), NOTES, WAITS, COMMAND])
        with self._files[0].open("w") as out, self._files[1].open("w") as err:
            self._process = subprocess.Popen(
                [sys.executable, "-c", program], stdout=out, stderr=err, env=ENVIRONMENT | changed
            )


@dataclass
class Told:
    """A command that has ended, and the run folder that it wrote to or read."""

    code: int
    out: str
    err: str
    run: Path
    seen: list[dict[str, Any]]

    def fine(self) -> Told:
        assert self.code == 0, (self.code, self.out[-2000:], self.err[-4000:])
        return self

    @property
    def losses(self) -> dict[int, float]:
        """By the position of the step's first image."""
        return {
            line["position"]: line["loss"] for line in read_log(self.run / "metrics.jsonl") if line["kind"] == "step"
        }

    @property
    def fed(self) -> dict[int, tuple[list[str], str]]:
        """Keys and digest by position; a step that was taken twice was fed the same both times."""
        found: dict[int, tuple[list[str], str]] = {}
        for note in self.seen:
            told = note["keys"], note["digest"]
            assert found.setdefault(note["position"], told) == told, f"at {note['position']} it was fed something else"
        return found

    @property
    def keys(self) -> dict[int, list[str]]:
        return {position: keys for position, (keys, _) in self.fed.items()}

    @property
    def saved(self) -> Saved:
        """Its newest checkpoint, all of whose digests hold."""
        found, passed = newest(open_store(self.run / "checkpoints"))
        assert found
        assert passed == []
        return found

    @property
    def starts(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.run / "starts.jsonl").read_text().splitlines()]


class Runs:
    """Everything that is looked at, by name: begun at once, waited for where it is asked for.

    Work that waits for other work is begun after it, so that with one core, too, each comes to its turn.
    """

    def __init__(self, folder: Path, data: Path) -> None:
        self.folder, self.data = folder, data
        self._pool = ThreadPoolExecutor(min(16, len(os.sched_getaffinity(0))))
        self._jobs: dict[str, Future[Any]] = {}
        self._driven: list[Driven] = []
        self._numbers = itertools.count()

    def begin(self, name: str, work: Callable[..., Any], *given: Any, **named: Any) -> None:
        self._jobs[name] = self._pool.submit(work, name, *given, **named)

    def __getitem__(self, name: str) -> Any:
        return self._jobs[name].result()

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        for driven in self._driven:
            driven.end()
        self._pool.shutdown()

    def drive(
        self, arguments: Sequence[object], changed: dict[str, str] | None = None, hold: int | None = None,
        waits: tuple[int, int] | None = None,
    ) -> Driven:  # fmt: skip
        folder = self.folder / f"said-{next(self._numbers)}-{arguments[0]}"
        folder.mkdir()
        self._driven.append(Driven(folder, arguments, changed or {}, hold, waits))
        return self._driven[-1]

    def told(self, run: Path, *driven: Driven) -> Told:
        """How the last one of several on the same folder ended, and what all were fed."""
        ended = driven[-1].finish()
        notes = [one.notes.read_text().splitlines() for one in driven if one.notes.exists()]
        return Told(*ended, run, [json.loads(line) for lines in notes for line in lines])

    def command(self, run: Path, settings: Sequence[str]) -> list[object]:
        return ["train", RECIPE, "--tiny", "--out", run, f"data={self.data}", *settings]

    def whole(self, name: str, settings: Sequence[str] = (), changed: dict[str, str] | None = None) -> Told:
        """From the first step to the last one."""
        run = self.folder / name
        return self.told(run, self.drive(self.command(run, (*SMALL, *settings)), changed))

    def elsewhere(
        self, name: str, of: str, settings: Sequence[str] = (), changed: dict[str, str] | None = None
    ) -> Told:
        """On from a copy of what `stopped` has left."""
        copy = self.folder / name
        shutil.copytree(self[of][0], copy)
        return self.told(copy, self.drive(self.command(copy, (*SMALL, *settings)), changed))

    def stopped(
        self, name: str, changed: dict[str, str] | None = None, settings: Sequence[str] = ()
    ) -> tuple[Path, Told, Told]:
        """SIGTERM in the middle: a copy of what was left then, how that ended, and how it went on."""
        run, copy = self.folder / name, self.folder / f"{name}-left"
        first = self.drive(self.command(run, (*SMALL, *settings)), changed, hold=STOP - BATCH)
        first.until_held()
        first.signal(signal.SIGTERM)
        first.go()
        left = self.told(run, first)
        shutil.copytree(run, copy)
        second = self.drive(self.command(run, (*SMALL, *settings)), changed)
        return copy, left, self.told(run, first, second)

    def killed(self, name: str) -> Told:
        """SIGKILL between two checkpoints, then the same command."""
        run = self.folder / name
        first = self.drive(self.command(run, SMALL), hold=KILL)
        first.kill()
        return self.told(run, first, self.drive(self.command(run, SMALL)))

    def on_gpu(self, name: str) -> tuple[Told, str]:
        """The run with probes and metrics: how it ended, and its page of metrics in the middle."""
        run = self.folder / name
        settings = ["train", RECIPE, "--tiny", "--out", run, f"data={self.data}", *MAIN]
        driven = self.drive(settings, hold=HELD)
        driven.until_held()
        page = urllib.request.urlopen((run / "metrics.url").read_text().strip(), timeout=60).read().decode()
        driven.go()
        return self.told(run, driven), page

    def full(self, name: str) -> tuple[Told, dict[str, Any]]:
        """A few steps of the recipe at its own size, and what `gristmill plan` says of it."""
        run = self.folder / name
        training = self.told(run, self.drive(["train", RECIPE, "--out", run, f"data={self.data}", *WHOLE]))
        planned = self.drive(["plan", RECIPE, *WHOLE[:1], "--gpus", "1", "--json"], WITHOUT)
        return training, json.loads(self.told(run, planned).fine().out)

    def watched(self, name: str) -> dict[str, int]:
        """How often the host waited for the device in WATCH, by thread, way and line."""
        run = self.folder / name
        told = self.told(run, self.drive(self.command(run, SMALL), waits=WATCH)).fine()
        (found,) = (note["waits"] for note in told.seen if note["position"] < 0)
        return found

    def simple(
        self, name: str, *arguments: object, of: str | None = None, changed: dict[str, str] | None = None
    ) -> Told:
        """A command that trains nothing; of: the run that stands behind its first word."""
        first, *rest = arguments
        given = [] if of is None else [self[of][0].fine().run]
        return self.told(self.folder, self.drive([first, *given, *rest], changed))
