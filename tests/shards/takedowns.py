"""What the tests of takedowns share: a small ingest to remove from, and looks at its files."""

import hashlib
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from gristmill.shards.ingest.config import IngestConfig
from gristmill.shards.ingest.run import ingest
from gristmill.shards.manifest import Manifest

from .conftest import draw


def blake(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def tree(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def holds(root: Path, needle: bytes) -> list[str]:
    """Files below a folder in which these bytes stand."""
    return [name for name, data in tree(root).items() if needle in data]


def make_set(root: Path) -> Path:
    """`source` (24 images in folders, one of them twice) and `out`, its ingest in shards of five, a part held out."""
    for number in range(24):
        place = root / "source" / "ab"[number % 2] / f"{number:02d}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        draw(40 + number, 30, number).save(place, "PNG")
    (root / "source" / "b" / "again.png").write_bytes((root / "source" / "a" / "04.png").read_bytes())
    ingest([str(root / "source")], root / "out", IngestConfig(shard_samples=5, holdout=0.25))
    return root


def source(made: Path, name: str) -> tuple[str, bytes]:
    return str(made / "source" / name), (made / "source" / name).read_bytes()


def stored(manifest: Manifest) -> dict[str, bytes]:
    found = {}
    for shard in range(len(manifest.urls)):
        rows, data = manifest.rows(shard), manifest.path(shard).read_bytes()
        found |= {key: data[o : o + n] for key, o, n in zip(rows.keys, rows.offset, rows.length, strict=True)}
    return found


def in_child(work: Callable[[], object], kill_at: int | None = None, kill_after: float | None = None) -> int:
    """Do something in a process of its own, killed at its n-th touch of the file system or after some seconds.

    The exit code: 0 if it came to its end, else minus the signal.
    """
    pid = os.fork()
    if pid == 0:
        count = 0

        def hook(event: str, arguments: tuple) -> None:
            nonlocal count
            if event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree", "os.truncate") or (
                event == "open" and isinstance(arguments[1], str) and arguments[1] != "r"
            ):
                if count == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                count += 1

        try:
            if kill_at is not None:
                sys.addaudithook(hook)
            work()
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
        os._exit(0)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
