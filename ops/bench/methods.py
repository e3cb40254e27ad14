"""Does each method learn what it is for? `python -m gristmill.ops.bench.methods`: some twenty minutes of one core.

The methods before and beside Mugs (issue 8), each trained alone as in granularities.py, on the same drawn images and by
the same command, and asked by its own probe: retrieval for what tells images apart, coarse k-NN or the purity of
neighbourhoods for what clusters, the segmentation of patches for dense contrast, all of them for all granularities at
once. Heads, losses and what the teacher does are each method's own, in the sizes of the demo's student; crops and light
are the demo's, since the papers' colours would wash out its dyes. Learning rates and temperatures were chosen on seed 0.
"""

from __future__ import annotations

import sys
from pathlib import Path

import click

from .granularities import PROBES, Case, bench

_LIGHT = (
    "{preset: weak, brightness: 0.6, contrast: 0.6, saturation: 0.1, hue: 0.0, grey: 0.0, blur: 0.0, solarize: 0.0}"
)
# RandAugment at InfoMin's strength over the demo's light.
_INFOMIN = "{preset: infomin, brightness: 0.6, contrast: 0.6, saturation: 0.1, hue: 0.0, grey: 0.0, blur: 0.0}"


def _none(*kept: str) -> tuple[str, ...]:
    return tuple(f"objectives.{name}=null" for name in ("instance", "local_group", "group") if name not in kept)


def _crop(name: str, role: str, count: int = 1, size: int = 32, more: str = "") -> str:
    return f"{{name: {name}, count: {count}, size: {size}, scale: [0.4, 1.0], role: {role}, augment: {_LIGHT}{more}}}"


def _pair(size: int = 32, more: str = "") -> str:
    """MoCo's: one crop for the student, one for the teacher."""
    return f"views=[{_crop('query', 'student', size=size, more=more)}, {_crop('key', 'teacher', size=size, more=more)}]"


_BOTH = f"views=[{_crop('global', 'both', 2)}]"
_TWICE = f"views=[{_crop('global', 'student', 2)}]"
_ONCE = f"views=[{_crop('global', 'student')}]"
_ALONE = "teacher.momentum=[0.0, 0.0]"
_TABLE = "stream.take_up=never"
_LINEAR = "{layers: 1, out: 64}"
_MLP = "{layers: 2, hidden: 256, out: 64}"
_NORMED = "{layers: 2, hidden: 256, out: 64, norm: batch}"
_LEVELS = "levels: [192, 64, 16], instance_levels: mean, masked: remove, negatives: all"

_HCSC = (*_none(), _pair(), f"student.projections.hierarchy={_MLP}")
_RESNET = "student={backbone: resnet18, embed_dim: 64, depth: 1, virtual_batch: 16, shuffle: 32, init_conv: fan_in}"

CASES: dict[str, Case] = {
    # Learning starts slowly, for rows are at first what was drawn. The temperature is high, since Z is that of rows drawn
    # at random: at 0.07 those of a young network, which are all alike, weigh a hundred thousand times more, and each image
    # is driven off from all rows at once, its own among them; at 0.5 seven times.
    "npid": Case(
        "instance_retrieval", 20000,
        (*_none(), _ONCE, _ALONE, _TABLE, f"student.projections.bank={_LINEAR}",
         "objectives.bank={negatives: 1024, temperature: 0.5}", "optimizer.lr=0.003", "optimizer.warmup=0.3"),
    ),
    # Its authors' form for small sets, at the temperature of their CIFAR-10: a bank of few rows, seen often.
    "npid, softmax": Case(
        "instance_retrieval", 20000,
        (*_none(), _ONCE, _ALONE, _TABLE, f"student.projections.bank={_LINEAR}",
         "objectives.bank={negatives: null, temperature: 0.1}", "optimizer.lr=0.006", "optimizer.warmup=0.3"),
        few=True,
    ),
    "moco-v1": Case(
        "instance_retrieval", 12000,
        (*_none(), _pair(), f"student.projections.instance={_LINEAR}",
         "objectives.instance={pairs: all, queue: 1024, temperature: 0.07}"),
    ),
    "moco-v2": Case(
        "instance_retrieval", 12000,
        (*_none(), _pair(), f"student.projections.instance={_MLP}",
         "objectives.instance={pairs: all, queue: 1024, temperature: 0.2}"),
    ),
    "infomin": Case(
        "instance_retrieval", 12000,
        (*_none(), _pair(more=f", strong: {_INFOMIN}, weak_p: 0.0"), f"student.projections.instance={_MLP}",
         "objectives.instance={pairs: all, queue: 1024, temperature: 0.15}"),
    ),
    "moco-v3": Case(
        "instance_retrieval", 12000,
        (*_none(), _BOTH, "student.freeze_patch_embed=true", "student.positions=fixed", "student.virtual_batch=32",
         "student.projections.batch_contrast={layers: 3, hidden: 256, out: 64, bias: false, norm: batch, last_norm: plain,"
         " predictor: {layers: 2, hidden: 256, bias: false, norm: batch, last_norm: plain}}",
         "objectives.batch_contrast={form: moco-v3, temperature: 0.2, virtual_batch: 32}"),
    ),
    "simclr": Case(
        "instance_retrieval", 12000,
        (*_none(), _TWICE, _ALONE, "student.virtual_batch=32",
         "student.projections.batch_contrast={layers: 2, hidden: 256, out: 64, bias: false, norm: batch, last_norm: batch}",
         "objectives.batch_contrast={form: simclr, temperature: 0.2, virtual_batch: 32}"),
    ),
    "byol": Case(
        "instance_retrieval", 12000,
        (*_none(), _BOTH, "student.virtual_batch=32",
         "student.projections.bootstrap={layers: 2, hidden: 256, out: 64, last_bias: false, norm: batch,"
         " predictor: {layers: 2, hidden: 256, last_bias: false, norm: batch}}",
         "objectives.bootstrap={form: byol}"),
    ),
    "simsiam": Case(
        "instance_retrieval", 12000,
        (*_none(), _TWICE, _ALONE, "student.virtual_batch=32",
         "student.projections.bootstrap={layers: 3, hidden: 256, out: 256, bias: false, norm: batch, last_norm: plain,"
         " predictor: {layers: 2, hidden: 64, bias: false, last_bias: true, norm: batch}}",
         "objectives.bootstrap={form: simsiam}"),
    ),
    "swav": Case(
        "coarse_knn", 12000,
        (*_none(), _TWICE, _ALONE, "student.virtual_batch=32", "student.prototypes=64",
         f"student.projections.swapped={_NORMED}", "objectives.swapped={queue: 512, start: 0.075}"),
    ),
    "deepcluster-v2": Case(
        "coarse_knn", 15000,
        (*_none(), _TWICE, _ALONE, _TABLE, "student.virtual_batch=32",
         f"student.projections.clusters={_NORMED}", "objectives.clusters={prototypes: [64, 64, 64]}"),
    ),
    "hcsc": Case(
        "coarse_knn", 15000,
        (*_HCSC, _TABLE, f"objectives.hierarchy={{queue: 1024, {_LEVELS}}}"),
    ),
    "hcsc, streaming": Case(
        "coarse_knn", 15000,
        (*_HCSC, f"objectives.hierarchy={{assign: stream, memory: 2048, every: 2048, queue: 1024, {_LEVELS}}}"),
    ),
    "densecl, ViT, by place": Case(
        "patch_segmentation", 12000,
        (*_none(), _pair(), f"student.projections.instance={_MLP}", f"student.projections.dense={_MLP}",
         "objectives.instance={pairs: all, queue: 1024}", "objectives.dense={queue: 1024, correspondence: geometry}",
         "objectives.weights={instance: 0.5, dense: 0.5}", "objectives.add=sum"),
    ),
    "densecl, ViT, by features": Case(
        "patch_segmentation", 12000,
        (*_none(), _pair(), f"student.projections.instance={_MLP}", f"student.projections.dense={_MLP}",
         "objectives.instance={pairs: all, queue: 1024}", "objectives.dense={queue: 1024, correspondence: features}",
         "objectives.weights={instance: 0.5, dense: 0.5}", "objectives.add=sum"),
    ),
    # The stem makes it slow, so there is time for crops whose map has two places a side (it is probed with four) and for
    # few steps, of which random keys in a longer queue would waste most. So few do not bring it above pixels.
    "densecl, ResNet": Case(
        "patch_segmentation", 7000,
        (*_none(), _pair(64), _RESNET, "probes.size=128", "probes.images=1500",
         f"student.projections.instance={_MLP[:-1]}, init: kaiming}}", f"student.projections.dense={_MLP}",
         "objectives.instance={pairs: all, queue: 256}", "objectives.dense={queue: 256, correspondence: features}",
         "objectives.weights={instance: 0.5, dense: 0.5}", "objectives.add=sum"),
        rivals=("chance", "random"),
    ),
    "multigrain": Case(
        "coarse_knn", 12000,
        (f"student.projections={{dense: {_MLP}, hierarchy: {_MLP}}}",
         "objectives.dense={queue: 1024, correspondence: geometry}",
         f"objectives.hierarchy={{assign: stream, memory: 2048, every: 2048, queue: 1024, local_crops: mean, {_LEVELS}}}",
         "objectives.weights={hierarchy: 0.5}"),
        kept=PROBES,
    ),
}  # fmt: skip


@click.command()
@click.option("--only", type=click.Choice(list(CASES)), multiple=True, help="These methods (default: all).")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of images, order and weights.")
@click.option("--json", "file", type=click.Path(path_type=Path, dir_okay=False), help="Write all scores to FILE.")
def main(only: tuple[str, ...], seed: int, file: Path | None) -> None:
    """Each method alone against its own probe; exit 1 if one does not lift it above pixels and an untrained network."""
    sys.exit(bench(CASES, only, seed, file))


if __name__ == "__main__":
    main()
