"""Whole sets of views by name: what a recipe's `views: mugs` stands for.

Each is what the authors' released code cuts of an image, with its source beside it; copies of a view that are treated
differently (the second global crop of DINO is blurred less) are one view whose probabilities are lists. A set is plain
mappings, as a recipe would spell them out, so that overrides such as `views.local.count=8` reach into it.
The methods' teachers see what `role` says: in MoCo v1, v2, DenseCL and HCSC the second crop alone, and the student the
first.
"""

from __future__ import annotations

import copy
from typing import Any

from ..shards.errors import nearest

# facebookresearch/dino, main_dino.py: both networks see the global crops, the student sees all.
_GLOBAL = {"name": "global", "count": 2, "size": 224, "filter": "bicubic", "augment": "weak"}
_LOCAL = {"name": "local", "size": 96, "role": "student", "filter": "bicubic", "augment": "weak-local"}
_DINO = [{**_GLOBAL, "scale": [0.4, 1.0]}, {**_LOCAL, "count": 8, "scale": [0.05, 0.4]}]

# bytedance/ibot, README and run.sh for ViT-S/16: DINO's augmentation, ten local crops, other scales.
_IBOT = [{**_GLOBAL, "scale": [0.25, 1.0]}, {**_LOCAL, "count": 10, "scale": [0.05, 0.25]}]

# sail-sg/mugs, src/multicropdataset.py and scripts: 14 crops. The teacher's are weak and its own; one coin an image
# decides on both global crops of the student, one coin a crop on each local one; prob 0.5 is that of the weak form.
_MUGS = [
    {**_IBOT[0], "name": "teacher", "role": "teacher"},
    {**_IBOT[0], "role": "student", "strong": "mugs", "weak_p": 0.5, "coin": "image"},
    {**_IBOT[1], "strong": "mugs", "weak_p": 0.5, "coin": "crop"},
]


def _pair(scale: float, augment: str, **more: Any) -> list[dict[str, Any]]:
    """One crop for the student (query) and one for the teacher (key), cut and coloured alike."""
    alike = {"size": 224, "scale": [scale, 1.0], "augment": augment, **more}
    return [{"name": "query", "role": "student", **alike}, {"name": "key", "role": "teacher", **alike}]


def _twice(scale: float, augment: str, **more: Any) -> dict[str, Any]:
    """Two crops of 224 pixels that both networks see, if there are two."""
    return {"name": "global", "count": 2, "size": 224, "scale": [scale, 1.0], "augment": augment, **more}


def _small(count: int) -> dict[str, Any]:
    """SwAV's crops of 96 pixels, of a seventh of the image at most."""
    return {"name": "local", "count": count, "size": 96, "scale": [0.05, 0.14], "role": "student", "augment": "simclr"}


GROUPS: dict[str, list[dict[str, Any]]] = {
    "mugs": _MUGS,
    "dino": _DINO,
    "ibot": _IBOT,
    # facebookresearch/moco, main_moco.py without and with --aug-plus. DenseCL and HCSC take the latter as it is.
    "moco-v1": _pair(0.2, "moco-v1"),
    "moco-v2": _pair(0.2, "moco"),
    # facebookresearch/moco-v3, main_moco.py with --crop-min 0.08, as its ViTs are trained (ResNets: 0.2).
    "moco-v3": [_twice(0.08, "weak")],
    "moco-v3-resnet": [_twice(0.2, "weak")],  # CONFIG.md: --crop-min=.2 with ResNet-50
    # Chen et al. 2020, appendix A; google-research/simclr, data_util.py: crops of 0.08 or more.
    "simclr": [_twice(0.08, "simclr", filter="bicubic")],
    # Grill et al. 2020, appendix B, table 6: the two crops differ in blur and solarisation; bicubic.
    "byol": [_twice(0.08, "weak", filter="bicubic")],
    # zhirongw/lemniscate.pytorch, main.py: one crop, coloured as in MoCo v1; both official codes take the colours
    # first and jitter what is left, which of a grey image changes the light alone.
    "npid": [{**_twice(0.2, "moco-v1"), "count": 1}],
    # facebookresearch/simsiam, main_simsiam.py: MoCo v2's augmentation.
    "simsiam": [_twice(0.2, "moco")],
    # HobbitLong/PyContrast, --method InfoMin: MoCo's pair under --aug D; every crop takes the strong form.
    "infomin": _pair(0.2, "simclr", strong="infomin", weak_p=0.0),
    # facebookresearch/swav, scripts/swav_200ep_pretrain.sh and deepclusterv2_400ep_pretrain.sh; src/multicropdataset.py.
    # It divides red by 0.228 where everybody else has 0.229; so have we.
    "swav": [_twice(0.14, "simclr"), _small(6)],
    "deepcluster-v2": [{**_twice(0.08, "simclr"), "size": 160}, _small(4)],
    # gyfastas/HCSC, multi-crop: MoCo v2's pair, and a local crop of each size for the student.
    "hcsc-multicrop": [
        *_pair(0.2, "moco"),
        *(
            {"name": f"local{size}", "size": size, "scale": [low, high], "role": "student", "augment": "moco"}
            for size, low, high in [
                (192, 0.172, 0.86),
                (160, 0.143, 0.715),
                (128, 0.114, 0.571),
                (96, 0.086, 0.429),
            ]
        ),
    ],
}


def named_views(name: str) -> list[dict[str, Any]]:
    """The set of views of this name, as a recipe would spell it out; ValueError names the nearest one there is."""
    if name not in GROUPS:
        hint = nearest(name, GROUPS)
        raise ValueError(f"no set of views {name!r}: {hint}there are {', '.join(GROUPS)}, or give a list of views")
    return copy.deepcopy(GROUPS[name])
