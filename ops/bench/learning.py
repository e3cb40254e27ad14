"""Do several granularities serve more tasks than one? `gristmill bench learning`: arms, data sets and seeds, in pieces that resume.

Each arm is the demo's student, views, samples and optimizer with other objectives: the crops of an image are the same in
all arms, since draws hang on (seed, position, view) alone. Each is asked one probe for each granularity (learning_exam.py).
A piece is (data set, arm, seed); its file in the results folder is complete or absent, so that a killed experiment goes on
with the next piece, and several processes may share the work. Settings were tuned on seeds 0 to 2 of the drawn cloths only;
what is published are seeds 3 to 5 and the other data sets.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from ...shards.errors import GristmillError
from ...shards.storage import published
from ..evaluate.online import load_teacher
from ..networks import build_student
from ..recipe import Recipe, load_recipe
from .granularities import cell, network_eyes, pixel_eyes
from .learning_exam import set_exam
from .learning_sets import make_set

SEEDS = (3, 4, 5)
IMAGES = 12000  # of a run
_MLP = "{layers: 2, hidden: 256, out: 64}"
_DENSE = "objectives.dense={queue: 1024, correspondence: geometry}"
_LEVELS = "levels: [192, 64, 16], instance_levels: mean, masked: remove, negatives: all, local_crops: mean"
_HIERARCHY = f"objectives.hierarchy={{assign: stream, memory: 2048, every: 2048, queue: 1024, {_LEVELS}}}"


class LearningError(GristmillError):
    """A piece of the experiment could not be made."""


def _only(*kept: str) -> tuple[str, ...]:
    return tuple(f"objectives.{name}=null" for name in ("instance", "local_group", "group") if name not in kept)


# What an arm changes of the demo's recipe. "chance", "pixels" and "random" train nothing.
ARMS: dict[str, tuple[str, ...]] = {
    "instance": _only("instance"),
    "local group": _only("local_group"),
    "group (DINO)": (*_only(), "objectives.group={form: dino}"),
    "dense (DenseCL)": (
        *_only("instance"), f"student.projections.dense={_MLP}", _DENSE,
        "objectives.weights={instance: 0.5, dense: 0.5}", "objectives.add=sum",
    ),
    "hierarchy (HCSC)": (*_only(), f"student.projections.hierarchy={_MLP}", _HIERARCHY),
    "Mugs": (),
    "multigrain": (
        f"student.projections={{dense: {_MLP}, hierarchy: {_MLP}}}", _DENSE, _HIERARCHY,
        "objectives.weights={instance: 0.1, dense: 0.1, local_group: 0.1, hierarchy: 1.0, group: 1.0}",
    ),
}  # fmt: skip
BASELINES = ("chance", "pixels", "random")


def settings(place: Path, seed: int, images: int) -> list[str]:
    """Overrides of the demo's recipe that all arms share."""
    return [
        f"seed={seed}", f"data={place / 'train'}", f"images={images}", f"probes.reference={place / 'train'}",
        f"probes.query={place / 'probe'}", "probes.images=60000", "probes.at=[]", "metrics.port=off",
        f"checkpoint.every={images}",
    ]  # fmt: skip


def run_pieces(
    folder: Path,
    sets: Sequence[str],
    arms: Sequence[str],
    seeds: Sequence[int],
    *,
    images: int = IMAGES,
    pictures: int | None = None,
    more: Sequence[str] = (),
    progress: Callable[[str], None] = print,
) -> list[Path]:
    """Make what is missing of these pieces; returns the files of all. `pictures`: about so many in a data set (short runs).

    Pieces that another process is at are passed over and awaited at the end. Raises LearningError when one fails.
    """
    (folder / "results").mkdir(parents=True, exist_ok=True)
    wanted = [(name, arm, seed) for name in sets for seed in seeds for arm in ("baselines", *arms)]
    files = [folder / "results" / f"{name}-{_slug(arm)}-{seed}.json" for name, arm, seed in wanted]
    for wait in (False, True):
        for (name, arm, seed), file in zip(wanted, files, strict=True):
            asked = {"images": images, "pictures": pictures, "settings": [*ARMS.get(arm, ()), *more]}
            if file.exists():
                _same(file, asked)
                continue
            with _claimed(folder / f"{file.stem}.lock", wait) as mine:
                if not mine or file.exists():
                    continue
                with _claimed(folder / f"{name}.lock", True):
                    place = make_set(name, folder / "sets", seed, images=pictures)
                begin = time.perf_counter()
                # What the user adds comes last, so that it may change an arm; baselines train nothing.
                own = [one for one in more if arm != "baselines" or not one.startswith("objectives.")]
                overrides = [*settings(place, seed, images), *ARMS.get(arm, ()), *own]
                scores = _piece(name, arm, seed, place, folder / f"{file.stem}.run", overrides)
                seconds = round(time.perf_counter() - begin, 1)
                found = {"set": name, "arm": arm, "seed": seed, **asked}
                with published(file) as stream:
                    stream.write(json.dumps({**found, "seconds": seconds, "scores": scores}, indent=1).encode())
                progress(f"{file.stem}: {seconds:.0f} s")
    return files


def _same(file: Path, asked: dict) -> None:
    made = json.loads(file.read_text(encoding="utf-8"))
    if other := [key for key, value in asked.items() if made[key] != value]:
        raise LearningError(
            f"{file} was made with other {' and '.join(other)}: name another folder (--out), or remove the file to make it anew"
        )


def _piece(name: str, arm: str, seed: int, place: Path, run: Path, overrides: list[str]) -> dict[str, dict[str, float]]:
    recipe = load_recipe("demo", overrides)
    if arm != "baselines":
        _train(overrides, run)
    exam = set_exam(name, recipe, place, seed)
    if arm == "baselines":
        return _baselines(exam, recipe)
    network, _ = load_teacher(run, recipe)
    scores = {arm: exam.scores(network_eyes(network))}
    shutil.rmtree(run)
    return scores


def _baselines(exam, recipe: Recipe) -> dict[str, dict[str, float]]:
    patch = cell(recipe)
    pixels = [exam.scores(pixel_eyes(patch, around)) for around in (0, patch // 2)]
    best = {name: max(row[name] for row in pixels) for name in pixels[0]}
    return {"chance": exam.chance(), "pixels": best, "random": exam.scores(network_eyes(build_student(recipe).eval()))}


def _train(overrides: list[str], run: Path) -> None:
    command = [sys.executable, "-m", "gristmill.ops.cli", "train", "demo", "--out", str(run), *overrides]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise LearningError(
            f"training into {run} failed; start the same command again:\n{done.stdout[-500:]}{done.stderr[-3000:]}"
        )


@contextmanager
def _claimed(path: Path, wait: bool) -> Iterator[bool]:
    """Whether this process holds the lock meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True


def _slug(arm: str) -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in arm).strip("_").replace("__", "_")


def read_results(folder: Path) -> list[dict]:
    """All pieces that are there."""
    return [json.loads(file.read_text(encoding="utf-8")) for file in sorted((folder / "results").glob("*.json"))]


def bench_learning(
    folder: Path,
    sets: Sequence[str],
    arms: Sequence[str],
    seeds: Sequence[int],
    images: int,
    pictures: int | None,
    overrides: Sequence[str],
    *,
    as_json: bool,
    plot: Path | None,
) -> int:
    """The command: make the pieces, print tables, draw the plot; the exit code."""
    import click

    from .learning_table import summary, tables

    torch.set_num_threads(1)
    run_pieces(
        folder, sets, arms, seeds, images=images, pictures=pictures, more=overrides,
        progress=lambda line: click.echo(line, err=True),
    )  # fmt: skip
    wanted = [one for one in read_results(folder) if one["set"] in sets and one["seed"] in seeds]
    found = summary([one for one in wanted if one["arm"] in (*arms, "baselines") and one["images"] == images])
    if as_json:
        click.echo(json.dumps(found, indent=1))
    else:
        from rich.console import Console

        for table in tables(found):
            Console().print(table)
    if plot is not None:
        from .learning_plot import draw

        draw(found, plot)
    return 0
