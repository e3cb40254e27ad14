"""What is compared on two devices: every objective of the registry, fed with what a student would give out.

An objective that joins the registry joins these cases with the defaults of its configuration, until `FORMS` has
smaller ones. Logits are cosines, as the heads give them: so temperatures make of rounding what they do in a run.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from gristmill.objectives import (
    BankConfig,
    BatchContrastConfig,
    BootstrapConfig,
    ClustersConfig,
    DenseConfig,
    Dims,
    GroupConfig,
    HierarchyConfig,
    InstanceConfig,
    LocalGroupConfig,
    Mixture,
    StepInfo,
    SwappedConfig,
    build_objectives,
)
from gristmill.objectives.mixture import KINDS
from pydantic import BaseModel
from torch import Tensor
from torch.nn.functional import normalize

BATCH, CROPS, GLOBALS, OUT, FEATURES, PROTOTYPES, SIDE, IMAGES, STEPS = 8, 5, 2, 16, 24, 40, 4, 64, 5
# Of the largest number: sums are in another order, and a division by a number is a product with its inverse.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-2}


@dataclass(frozen=True)
class Form:
    """One way to set an objective up, and how its steps differ from the usual ones."""

    config: BaseModel
    step: dict[str, Any] = field(default_factory=dict)


LEVELS: dict[str, Any] = {"queue": 300, "levels": (8, 4, 2), "warmup": 0.0, "iterations": 4, "attempts": 2}
ONE_CROP = {"student_crops": 1, "student_globals": 1}
TWO_CROPS = {"student_crops": 2, "same_views": False}
FORMS: dict[str, dict[str, Form]] = {
    "instance": {
        "mugs": Form(InstanceConfig(queue=300)),
        "all": Form(InstanceConfig(queue=20, pairs="all"), {"same_views": False}),
    },
    "dense": {
        "features": Form(DenseConfig(queue=300)),
        "mutual": Form(DenseConfig(queue=300, correspondence="mutual", min_similarity=0.2)),
        "geometry": Form(DenseConfig(queue=300, correspondence="geometry"), {"same_views": False}),
    },
    "local_group": {
        "plain": Form(LocalGroupConfig(queue=300, memory=300, neighbours=4)),
        "compat": Form(LocalGroupConfig(queue=20, memory=40, neighbours=4, compat=True)),
    },
    "hierarchy": {
        "stream": Form(HierarchyConfig(assign="stream", memory=16, every=BATCH, ramp=0.1, **LEVELS)),
        "table": Form(HierarchyConfig(exclusion_batch=4, **LEVELS)),
        "removed": Form(HierarchyConfig(masked="remove", negatives="all", **LEVELS), TWO_CROPS),
    },
    "group": {
        "mugs": Form(GroupConfig()),
        "dino": Form(GroupConfig(form="dino")),
        "balanced": Form(GroupConfig(balance="sinkhorn", koleo=0.1, virtual_batch=4)),
    },
    "batch_contrast": {
        "moco-v3": Form(BatchContrastConfig(form="moco-v3", temperature=0.2), TWO_CROPS),
        "virtual": Form(BatchContrastConfig(form="moco-v3", temperature=0.2, virtual_batch=4)),
        "simclr": Form(BatchContrastConfig(form="simclr"), TWO_CROPS),
    },
    "bootstrap": {
        "byol": Form(BootstrapConfig(), TWO_CROPS),
        "simsiam": Form(BootstrapConfig(form="simsiam"), TWO_CROPS),
    },
    "bank": {
        "noise": Form(BankConfig(negatives=32), ONE_CROP),
        "whole": Form(BankConfig(negatives=None), ONE_CROP),
        "bfloat16": Form(BankConfig(negatives=32, storage="bfloat16"), ONE_CROP),
    },
    "swapped": {
        "queue": Form(SwappedConfig(queue=16, start=0.0)),
        "virtual": Form(SwappedConfig(queue=0, virtual_batch=4)),
    },
    "clusters": {"two heads": Form(ClustersConfig(prototypes=(8, 6), iterations=3, every=2 * BATCH))},
}
CASES = {
    (name, how): form
    for name, kind in KINDS.items()
    for how, form in FORMS.get(name, {"defaults": Form(kind[0]())}).items()
}


def built(name: str, config: BaseModel, seed: int, dtype: torch.dtype, device: torch.device | str) -> Mixture:
    """A mixture of one objective; all heads are as wide."""
    sizes = {"features": FEATURES, "prototypes": PROTOTYPES, "patch_prototypes": PROTOTYPES}
    dims = {part.name: OUT for part in fields(Dims)} | sizes | {"images": IMAGES, "globals": GLOBALS}
    return build_objectives({name: config}, dims=Dims(**dims), seed=seed, dtype=dtype, device=device)


def step_of(number: int, given: Mapping[str, Any]) -> StepInfo:
    """Shape and place of a step, its tensors on the host as `Inputs` makes them."""
    draws = torch.Generator().manual_seed(100 + number)
    index = torch.randperm(IMAGES, generator=draws)[:BATCH]
    index[1] = index[0]  # one image twice
    info = StepInfo(
        batch=BATCH,
        student_crops=CROPS,
        student_globals=GLOBALS,
        teacher_crops=GLOBALS,
        position=number * BATCH,
        progress=number / STEPS,
        weak=torch.rand(BATCH, generator=draws) < 0.5,
        same_views=True,
        masks=torch.rand(GLOBALS * BATCH, SIDE, SIDE, generator=draws) < 0.3,
        index=index,
        images=IMAGES,
        student_geometry=_maps(draws),
        teacher_geometry=_maps(draws),
        global_size=32,
        teacher_size=32,
    )
    return replace(info, **given)


def _maps(draws: torch.Generator) -> Tensor:
    """Crops of 32 pixels out of a source of 100, [GLOBALS * BATCH, 2, 3]: most of them overlap."""
    size, corner = (torch.rand(GLOBALS * BATCH, n, generator=draws) for n in (2, 2))
    return torch.cat([torch.diag_embed(1 + size), (20 * corner).unsqueeze(2)], 2)


def outputs(number: int, info: StepInfo, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """All that student and teacher give out, under every name that an objective of the registry could ask for."""
    draws = torch.Generator().manual_seed(number)
    hidden = 0 if info.masks is None else int(info.masks.sum())
    ends = normalize(torch.randn(PROTOTYPES, OUT, generator=torch.Generator().manual_seed(9), dtype=dtype), dim=1)

    def unit(*shape: int) -> Tensor:
        return normalize(torch.randn(*shape, generator=draws, dtype=dtype), dim=-1)

    sides = []
    for crops, globals_ in ((info.student_crops, info.student_globals), (info.teacher_crops, info.teacher_crops)):
        side = {name: unit(crops * info.batch, OUT) for name in KINDS}
        side |= {f"{name}.projection": unit(crops * info.batch, OUT) for name in KINDS}
        side |= {"group": unit(crops * info.batch, OUT) @ ends.T, "swapped": side["swapped.projection"] @ ends.T}
        side |= {"class_token": unit(crops * info.batch, FEATURES), "memory_row": unit(globals_ * info.batch, FEATURES)}
        places = (globals_ * info.batch, SIDE * SIDE)
        side |= {"dense": unit(*places, OUT), "dense.features": unit(*places, FEATURES)}
        side |= {"dense.pooled": unit(globals_ * info.batch, OUT), "patch_mean": unit(1, OUT) @ ends.T}
        side["patch"] = unit(hidden, OUT) @ ends.T
        sides.append(side)
    return sides[0], sides[1]


def queue_scores(context: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """What a student adds to its outputs where its context has a queue to score."""
    if (queue := context.get(f"{name}.queue")) is None:
        return {}
    ends = torch.randn(PROTOTYPES, OUT, generator=torch.Generator().manual_seed(9), dtype=queue.dtype)
    return {f"{name}.queue_scores": queue.cpu() @ normalize(ends, dim=1).T}


def features(dtype: torch.dtype) -> Tensor:
    """A pass over the data, unit rows [IMAGES, OUT], of which one could not be read."""
    rows = normalize(torch.randn(IMAGES, OUT, generator=torch.Generator().manual_seed(7), dtype=dtype), dim=1)
    rows[3] = 0
    return rows


def near(found: Tensor | float, wanted: Tensor | float, what: object, least: float = 0.0, dtype: Any = None) -> None:
    """Of one kind, and within the tolerance of its type of the largest number wanted (`least`: or of this)."""
    assert isinstance(found, Tensor) == isinstance(wanted, Tensor), what
    if not isinstance(found, Tensor) or not isinstance(wanted, Tensor):
        found, wanted = torch.tensor(found, dtype=dtype), torch.tensor(wanted, dtype=dtype)
    assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype), what
    found, wanted = found.detach().cpu(), wanted.detach().cpu()
    assert torch.equal(found.isnan(), wanted.isnan()), what  # what is not known yet
    found, wanted = found.nan_to_num(), wanted.nan_to_num()
    if not wanted.is_floating_point():
        assert torch.equal(found, wanted), what
    elif wanted.numel():
        gap, size = float((found - wanted).abs().max()), max(least, float(wanted.abs().max()))
        # What is added up in float64 may be made of float32.
        bound = max(TOLERANCE[wanted.dtype], TOLERANCE.get(dtype, 0.0))
        assert gap <= bound * size, (what, gap, size)


@contextmanager
def whole_products() -> Iterator[None]:
    """Inside, float32 products are float32's, not TF32's."""
    switches = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [switch.allow_tf32 for switch in switches]
    try:
        for switch in switches:
            switch.allow_tf32 = False
        yield
    finally:
        for switch, was in zip(switches, before, strict=True):
            switch.allow_tf32 = was
