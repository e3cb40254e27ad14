"""Do short runs end well? `python -m gristmill.ops.bench.endings --runs 20`: launches under torchrun, one after another.

Two gloo ranks, ZeRO 0 to 3 in turn, a few steps of a very small recipe, through the same command as a user's. A run ends
well if torchrun, and so every rank, ends with 0; what is counted besides are aborts while the interpreter ends (gloo's
threads may outlive it), segments left in /dev/shm, and groups of processes that outlive their launcher.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

import click

from ...shards.demo import make_demo_images
from ...shards.ingest import ingest_folder

IMAGES = 384  # the fewest that the drawn data set can hold
# The smallest recipe that still has every part: three objectives, two kinds of view, memories, a frozen last layer.
TINY = (
    "batch=8", "threads=1", "metrics.port=off", "probes.at=[]", "probes.size=16", "student.image_size=16",
    "student.patch_size=8", "student.embed_dim=32", "student.depth=1", "student.heads=2", "student.head_hidden=32",
    "student.head_out=16", "student.predictor_hidden=32", "student.prototypes=32", "views.global.size=16",
    "views.local.size=8", "objectives.instance.queue=64", "objectives.local_group.queue=64",
    "objectives.local_group.memory=64", "objectives.local_group.neighbours=2",
)  # fmt: skip
SHARED = Path("/dev/shm")


def tiny_data(folder: Path, seed: int = 0) -> Path:
    """A small data set under `folder`; returns what a recipe calls `data`."""
    make_demo_images(folder / "images", images=IMAGES, size=32, seed=seed)
    ingest_folder(folder / "images", folder / "data", shard_samples=32)
    return folder / "data" / "train"


def launch(
    world: int, command: Iterable[object], *, flags: Iterable[str] = (), seconds: float = 300.0
) -> subprocess.CompletedProcess[str]:
    """torchrun with `world` processes of `command` (`-m MODULE ...` or a script) on this machine, until it ends."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world), *flags]
    return subprocess.run(
        [*torchrun, *map(str, command)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )


def left_in_shared_memory(before: Iterable[str]) -> list[str]:
    """Names in /dev/shm that were not there before and that no living process has open: what somebody left."""
    new: dict[int, str] = {}
    for path in set(SHARED.iterdir()) - {SHARED / name for name in before}:
        with suppress(FileNotFoundError):  # taken away just now
            new[path.stat().st_ino] = path.name
    if not new:
        return []
    # By inode: a semaphore is mapped under the name that it had before it got its own.
    held: set[int] = set()
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # ended just now, or somebody else's
            maps = (process / "maps").read_text().splitlines()
            held |= {int(line.split(maxsplit=5)[4]) for line in maps if f" {SHARED}/" in line}
            for link in os.scandir(process / "fd"):
                with suppress(OSError):  # closed just now
                    if os.readlink(link).startswith(f"{SHARED}/"):
                        held.add(os.stat(link).st_ino)
    return sorted(name for inode, name in new.items() if inode not in held and (SHARED / name).exists())


def short_run(data: Path, stage: int, steps: int) -> tuple[str, ...]:
    """What `gristmill train demo` gets after `--out FOLDER`."""
    return (*TINY, f"data={data}", f"images={8 * steps}", f"checkpoint.every={8 * steps}", f"engine.zero={stage}")


def endings(
    stages: Sequence[int], folder: Path, data: Path, steps: int = 3, progress: bool = False
) -> list[dict[str, object]]:
    """A launch for each ZeRO stage; of each how it ended: stage, code, aborted, left, seconds, error."""
    found: list[dict[str, object]] = []
    for number, stage in enumerate(stages):
        before, begin = os.listdir(SHARED), time.perf_counter()
        recipe = short_run(data, stage, steps)
        done = launch(2, ["-m", "gristmill.ops.cli", "train", "demo", "--out", folder / f"run-{number}", *recipe])
        aborted = "terminate called" in done.stderr or "Signal 6" in done.stderr or "exitcode: -6" in done.stderr
        found.append({
            "stage": stage, "code": done.returncode, "aborted": aborted, "left": left_in_shared_memory(before),
            "seconds": time.perf_counter() - begin, "error": done.stderr[-3000:] if done.returncode else "",
        })  # fmt: skip
        if progress:
            click.echo(f"{number + 1}/{len(stages)}: ZeRO {stage} ended with {done.returncode}", err=True)
    return found


@click.command()
@click.option("--runs", type=click.IntRange(1), default=20, show_default=True, help="Launches, ZeRO 0 to 3 in turn.")
@click.option("--steps", type=click.IntRange(1), default=3, show_default=True, help="Steps of each run.")
@click.option("--json", "as_json", is_flag=True, help="Print what each run ended with as JSON.")
def main(runs: int, steps: int, as_json: bool) -> None:
    """Short runs in a row; exit 0 if all of them ended well."""
    with tempfile.TemporaryDirectory(prefix="gristmill-bench-") as folder:
        found = endings(
            [n % 4 for n in range(runs)], Path(folder), tiny_data(Path(folder)), steps, progress=not as_json
        )
    well = sum(each["code"] == 0 and not each["aborted"] for each in found)
    left = sorted({name for each in found for name in each["left"]})  # pyright: ignore[reportGeneralTypeIssues]
    if as_json:
        click.echo(json.dumps(found))
    else:
        for each in found:
            if each["code"]:
                click.echo(f"ZeRO {each['stage']} ended with {each['code']}:\n{each['error']}", err=True)
        seconds = sorted(float(str(each["seconds"])) for each in found)[len(found) // 2]
        click.echo(
            f"{well} of {runs} runs on 2 ranks ended with 0; {sum(bool(each['aborted']) for each in found)} aborted; left in "
            f"{SHARED}: {', '.join(left) or 'nothing'}; {seconds:.1f} s each (median)"
        )
    sys.exit(0 if well == runs and not left else 1)


if __name__ == "__main__":
    main()
