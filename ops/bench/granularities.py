"""Does each objective alone learn what it is for? `python -m gristmill.ops.bench.granularities`: a few minutes of one core.

Trains one objective at a time on the drawn images, the demo's student and stream, through the same command as a user's,
and asks its own probe (DESIGN 6): retrieval for instances, the purity of neighbourhoods for local groups, coarse k-NN
for groups, the segmentation of patches for patches. What is learned must lie above chance, raw pixels and the same
network before its first step, or the exit code is 1. All probes are measured for all, so that it is seen what else
an objective gives. The settings are those that a short run on small pictures needs, not the papers'.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from ...shards.demo import CLOTHS, MASKS, make_demo_images
from ...shards.demo import PATCHES as DYES
from ...shards.ingest import ingest_folder
from ..demo import HOLDOUT
from ..evaluate.dense import PixelClasses, expected_iou, pixel_patches, segment
from ..evaluate.features import evaluating, extract, pixel_features
from ..evaluate.knn import knn_accuracy
from ..evaluate.online import Probing, load_teacher
from ..evaluate.probes import chance_levels
from ..evaluate.purity import expected_purity, neighbour_purity
from ..evaluate.retrieval import retrieve
from ..networks import build_student
from ..recipe import Recipe, load_recipe

WHO: tuple[str, ...] = ("chance", "pixels", "random", "trained")
PROBES: tuple[str, ...] = ("instance_retrieval", "neighbour_purity", "coarse_knn", "patch_segmentation")
NEAR = 8  # neighbours of a local group
FINEST = 8  # pixels a side of a patch that is compared as it is
STRIDE = 32  # of a ResNet's last map
# Of a student's settings, those that leave the backbone before its first step, in evaluation, as it is.
HEADS = ("objectives", "projections", "prototypes", "patch_prototypes", "virtual_batch", "shuffle")
PATCHES = 1 << 14  # reference patches at most, and half as many asked


@dataclass(frozen=True)
class Case:
    """One objective: what it adds to the demo's recipe, its probe, and those that must not fall below an untrained network."""

    probe: str
    images: int
    settings: tuple[str, ...]
    kept: tuple[str, ...] = ()
    rivals: tuple[str, ...] = WHO[:-1]  # whom it must beat
    few: bool = False  # learn from a sixth of the images; all are asked about


def _only(*kept: str) -> tuple[str, ...]:
    return tuple(f"objectives.{name}=null" for name in ("instance", "local_group", "group") if name not in kept)


CASES = {
    "instance": Case("instance_retrieval", 12000, _only("instance")),
    "local_group": Case("neighbour_purity", 12000, _only("local_group")),
    "group": Case("coarse_knn", 12000, _only("group")),
    "group, DINO's form": Case("coarse_knn", 12000, (*_only(), "objectives.group={form: dino}")),
    # Sharp targets and every crop half hidden, since the run is short; patches do not look at local crops.
    "patch": Case(
        "patch_segmentation",
        16000,
        (
            *_only(),
            "objectives.patch={teacher_temperature: [0.04, 0.04], warmup: 0}",
            "student.patch_prototypes=512",
            "masks.shares=[[0.5, 0.2]]",
            "views.local.count=1",
            "views.local.size=8",
        ),
    ),
}
# How one sees images [B, 3, S, S]: each as a whole, its neighbourhood's feature, and its patches (patch-major), all [B, d].
Eyes = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]


def network_eyes(network: nn.Module) -> Eyes:
    """Class token; mean of the patches, in which a local group looks for its neighbours; patch tokens."""
    backbone: nn.Module = network.backbone  # pyright: ignore[reportAssignmentType, reportAttributeAccessIssue]

    def see(images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with evaluating(backbone):
            tokens: Tensor = backbone.norm(backbone(images))  # pyright: ignore[reportCallIssue]
        return tokens[:, 0], tokens[:, 1:].mean(1), tokens[:, 1:].flatten(1)

    return see


def pixel_eyes(patch: int, around: int = 0) -> Eyes:
    """Nothing but pixels. Patches of more than `FINEST` pixels a side are averaged down to that, with what is around."""
    factor = max(1, patch // FINEST)
    cut = pixel_patches(patch // factor, around // factor)

    def see(images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        whole = pixel_features(images)
        return whole, whole, cut(F.avg_pool2d(images, factor))

    return see


def cell(recipe: Recipe) -> int:
    """Pixels a side of what one patch token stands for: a ViT's patch, a location of a ResNet's last map."""
    return STRIDE if recipe.student.resnet else recipe.patch_size


def textiles(file: Path) -> PixelClasses:
    """Which of the eight dyes each pixel of the drawn images shows: the cloth's, or that of the patch sewn upon it."""
    with np.load(file, allow_pickle=False) as side:
        names = [Path(path).parts[:2] for path in side["path"].tolist()]
        cloth = np.array([CLOTHS.index(cloth) for cloth, _ in names], np.uint8)[:, None, None]
        patch = np.array([len(CLOTHS) + DYES.index(patch) for _, patch in names], np.uint8)[:, None, None]
        return PixelClasses(side["key"].tolist(), np.where(side["mask"] == 0, cloth, patch))


class Measuring:
    """The probed images of a recipe, their labels, and what lies under their patches."""

    def __init__(self, recipe: Recipe, data: Path) -> None:
        self.probing = Probing(recipe.probes, recipe.sources[0].path)
        assert self.probing.query is not None
        self.side = recipe.probes.size // cell(recipe)
        self.batches = [list(self.probing.batches(each)) for each in (self.probing.reference, self.probing.query)]
        keys = [[key for names, _ in part for key in names] for part in self.batches]
        self.codes = [torch.from_numpy(self.probing.codes(each)) for each in keys]  # [m, levels], [n, levels]
        self.rows = [_spread(len(each), PATCHES // self.side**2 // (1 + n)) for n, each in enumerate(keys)]
        chosen = [[each[row] for row in rows] for each, rows in zip(keys, self.rows, strict=True)]
        classes = textiles(data / "parts.npz")
        self.under = [classes.patches(each, self.side).flatten() for each in chosen]

    def level(self, name: str) -> tuple[Tensor, Tensor]:
        column = self.probing.names.index(name)
        return self.codes[0][:, column], self.codes[1][:, column]

    def scores(self, eyes: Eyes) -> dict[str, float]:
        """All probes, 0 to 1, of one who sees."""
        image, near, dense = zip(*(self._seen(eyes, part) for part in self.batches), strict=True)
        instance, fine, coarse = (self.level(name) for name in ("instance", "fine", "coarse"))
        cut = [rows[i].unflatten(1, (self.side**2, -1)).flatten(0, 1) for rows, i in zip(dense, self.rows, strict=True)]
        k, temperature = self.probing.config.neighbours, self.probing.config.temperature
        return {
            "instance_retrieval": retrieve(image[0], instance[0], image[1], instance[1]).mean_average_precision,
            "neighbour_purity": neighbour_purity(near[0], fine[0], near[1], fine[1], k=NEAR),
            "coarse_knn": knn_accuracy(image[0], coarse[0], image[1], coarse[1], k=k, temperature=temperature),
            "patch_segmentation": segment(cut[0], self.under[0], cut[1], self.under[1], k=k, temperature=temperature),
        }

    def chance(self) -> dict[str, float]:
        """What no knowledge scores, computed."""
        known = chance_levels(self.codes[0], self.codes[1], self.probing.names)
        purity = expected_purity(*self.level("fine"))
        found = known | {"neighbour_purity": purity, "patch_segmentation": expected_iou(self.under[1])}
        return {name: found[name] for name in PROBES}

    def _seen(self, eyes: Eyes, part: list[tuple[list[str], Tensor]]) -> tuple[Tensor, ...]:
        widths = [each.shape[1] for each in eyes(part[0][1][:1])]
        return extract(lambda images: torch.cat(eyes(images), 1), part).rows.split(widths, 1)


def _spread(rows: int, most: int) -> Tensor:
    """At most so many of the rows, from all over them."""
    return torch.from_numpy(np.unique(np.linspace(0, rows - 1, min(rows, max(1, most))).astype(np.int64)))


def draw_data(folder: Path, images: int = 4608, seed: int = 0) -> Path:
    """The demo's images, packed with a fifth held out; returns the folder of `train`, `probe` and `parts.npz`."""
    make_demo_images(folder / "images", images=images, seed=seed)
    ingest_folder(folder / "images", folder / "data", holdout=HOLDOUT)
    (folder / "images" / MASKS).rename(folder / "data" / "parts.npz")
    return folder / "data"


def draw_few(data: Path, seed: int = 0, images: int = 768) -> None:
    """Other pictures of the same instances, packed as `few` inside `data`."""
    with tempfile.TemporaryDirectory(prefix="gristmill-bench-") as folder:
        make_demo_images(Path(folder) / "images", images=images, seed=seed)
        ingest_folder(Path(folder) / "images", data / "few", holdout=HOLDOUT)


def settings(case: Case, data: Path, seed: int = 0, more: Sequence[str] = ()) -> list[str]:
    """What `gristmill train demo` gets: the case's settings, no probes on the way, one checkpoint at the end."""
    train = data / "few" / "train" if case.few else data / "train"
    own = [f"seed={seed}", f"data={train}", f"images={case.images}"]
    own += [f"probes.reference={data / 'train'}", f"probes.query={data / 'probe'}"]
    return [*own, "metrics.port=off", "probes.at=[]", f"checkpoint.every={case.images}", *case.settings, *more]


def learn(case: Case, data: Path, folder: Path, seed: int = 0, more: Sequence[str] = ()) -> dict[str, float]:
    """Train one objective into `folder`; all probes of its teacher. RuntimeError if training fails."""
    overrides = settings(case, data, seed, more)
    recipe = load_recipe("demo", overrides)
    command = [sys.executable, "-m", "gristmill.ops.cli", "train", "demo", "--out", str(folder), *overrides]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stdout[-2000:] + done.stderr[-4000:])
    network, _ = load_teacher(folder, recipe)
    return Measuring(recipe, data).scores(network_eyes(network))


def baselines(case: Case, data: Path, seed: int = 0, more: Sequence[str] = ()) -> dict[str, dict[str, float]]:
    """The same probes of chance, of pixels, and of the network before its first step, which is one for all objectives."""
    recipe = load_recipe("demo", settings(case, data, seed, more))
    measuring, patch = Measuring(recipe, data), cell(recipe)
    pixels = [measuring.scores(pixel_eyes(patch, around)) for around in (0, patch // 2)]  # a patch alone, or with more
    return {
        "chance": measuring.chance(),
        "pixels": {probe: max(row[probe] for row in pixels) for probe in PROBES},
        "random": measuring.scores(network_eyes(build_student(recipe).eval())),
    }


def lifted(case: Case, scores: dict[str, dict[str, float]]) -> bool:
    """Whether the objective's own probe is above that of all its rivals, and the others to keep are kept."""
    own = {who: row[case.probe] for who, row in scores.items()}
    kept = all(scores["trained"][probe] >= scores["random"][probe] for probe in case.kept)
    return kept and own["trained"] > max(own[who] for who in case.rivals)


def tables(found: dict[str, dict]) -> list[Table]:
    first, second = (
        Table(title=title, title_justify="left") for title in ("its own probe, %", "all probes, trained, %")
    )
    for table, columns in ((first, ("its probe", *WHO)), (second, PROBES)):
        table.add_column("alone")
        for column in columns:
            table.add_column(column.replace("_", " "), justify="left" if column == "its probe" else "right")
    for name, line in found.items():
        own, scores = line["probe"], line["scores"]
        first.add_row(name, own.replace("_", " "), *(f"{100 * scores[who][own]:.1f}" for who in WHO))
        second.add_row(name, *(f"{100 * scores['trained'][probe]:.1f}" for probe in PROBES))
    return [first, second]


def untrained(case: Case, data: Path, seed: int = 0) -> str:
    """What the baselines of a case depend on: equal for two cases whose networks start alike and are asked alike."""
    recipe = load_recipe("demo", settings(case, data, seed))
    return f"{recipe.student.model_dump(exclude=set(HEADS))} {recipe.probes.size}"


def bench(cases: Mapping[str, Case], only: Sequence[str], seed: int, file: Path | None) -> int:
    """Train and ask these cases (none: all), print the tables, write the scores to `file`; the exit code."""
    torch.set_num_threads(1)
    found: dict[str, dict] = {}
    known: dict[str, dict[str, dict[str, float]]] = {}
    with tempfile.TemporaryDirectory(prefix="gristmill-bench-") as folder:
        data = draw_data(Path(folder), seed=seed)
        if any(cases[name].few for name in only or cases):
            draw_few(data, seed)
        for number, name in enumerate(only or cases):
            case = cases[name]
            if (start := untrained(case, data, seed)) not in known:
                known[start] = baselines(case, data, seed)
            begin = time.perf_counter()
            scores = known[start] | {"trained": learn(case, data, Path(folder) / f"run-{number}", seed)}
            seconds = time.perf_counter() - begin
            found[name] = {"probe": case.probe, "lifted": lifted(case, scores), "seconds": seconds, "scores": scores}
            own = ", ".join(f"{who} {100 * row[case.probe]:.1f}" for who, row in scores.items())
            click.echo(f"{name}: {seconds:.0f} s; {case.probe}: {own}", err=True)
    for table in tables(found):
        Console().print(table)
    if file:
        file.write_text(json.dumps({"seed": seed, "objectives": found}, indent=1) + "\n")
    short = [name for name, line in found.items() if not line["lifted"]]
    if short:
        click.echo(f"not above pixels and an untrained network: {', '.join(short)}", err=True)
    return 1 if short else 0


@click.command()
@click.option("--only", type=click.Choice(list(CASES)), multiple=True, help="These objectives (default: all).")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of images, order and weights.")
@click.option("--json", "file", type=click.Path(path_type=Path, dir_okay=False), help="Write all scores to FILE.")
def main(only: tuple[str, ...], seed: int, file: Path | None) -> None:
    """Each objective alone against its own probe; exit 1 if one does not lift it above pixels and an untrained network."""
    sys.exit(bench(CASES, only, seed, file))


if __name__ == "__main__":
    main()
