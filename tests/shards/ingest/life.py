"""What a process of these tests does: one start of an ingest, until it ends or is killed."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import threading
import traceback
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

from gristmill.ops.cli import main
from gristmill.shards.ingest import IngestConfig, ingest

from .sets import scenes

CONFIG = IngestConfig(unit=20, shard_samples=32, holdout=0.2, near=3)


def warm() -> None:
    """Start the server that forks workers, and share it with all lives: it imports for seconds, and a life takes less."""
    from gristmill.shards.ingest.pool import Processes

    with tempfile.TemporaryDirectory() as folder:
        scenes(Path(folder) / "in", 1)
        ingest([Path(folder) / "in"], Path(folder) / "out", IngestConfig(near=3), workers=1)
        pool = Processes(1, Path(folder) / "lock")
        server: Any = forkserver._forkserver  # pyright: ignore
        server._preload_modules.append("tests.shards.ingest.patient")
        os.environ["PYTHONPATH"] = str(Path(__file__).parents[3])
        assert pool.result(pool.submit(_is_patient))
        del os.environ["PYTHONPATH"]
        pool.close()
    server.ensure_running = lambda: None  # the lives are no parents of it, and cannot ask whether it lives


def _is_patient() -> bool:
    return "tests.shards.ingest.patient" in sys.modules


def live(source: str, out: str, *, workers: int = 2, dies_at: int = 0, after: float = 0.0, **how: Any) -> None:
    """`dies_at`: end by SIGKILL before the so-manieth renaming of a file in this process, or `after` seconds later."""
    renamed = _count(dies_at, after)
    print("begun", flush=True)
    ingest([source] if source else [], out, CONFIG, workers=workers, **how)
    print(f"through {renamed[0]}", flush=True)
    os._exit(0)


def command(arguments: list[str], folder: str = "") -> None:
    """`gristmill ...`, as typed in this folder."""
    if folder:
        os.chdir(folder)
    code: Any = 0
    try:
        main(arguments, prog_name="gristmill")
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(int(code or 0))  # taking torch down takes longer than all of this


def _count(dies_at: int, after: float) -> list[int]:
    replace, renamed = os.replace, [0]

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def counted(*names: Any, **more: Any) -> None:
        renamed[0] += 1
        if renamed[0] == dies_at:
            threading.Timer(after, die).start() if after else die()
        replace(*names, **more)

    os.replace = counted
    return renamed
