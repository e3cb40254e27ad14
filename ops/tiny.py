"""`--tiny`: a recipe at a size that a laptop's CPU finishes in minutes."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from ..models.mlp import HEADS
from ..models.resnet import is_resnet

# What a recipe that leaves it to the default must get, too.
_OBJECTIVES: dict[str, dict[str, Any]] = {
    "instance": {"queue": 1024},
    "dense": {"queue": 1024},
    "local_group": {"queue": 1024, "memory": 1024, "neighbours": 4},
    "hierarchy": {"queue": 256, "memory": 256, "levels": [24, 12, 6], "every": 512},
    "bank": {"negatives": 64},
    "clusters": {"prototypes": [24, 24, 24], "every": 512},
}


def _small(projection: dict[str, Any]) -> None:
    """A head of at most 128 hidden and 64 given numbers."""
    for part in (projection, projection.get("predictor") or {}):
        part.update(hidden=min(part.get("hidden", 128), 128))
    projection["out"] = min(projection.get("out", 64), 64)


def shrink(tree: dict[str, Any]) -> dict[str, Any]:
    """The same recipe as nested dictionaries, in fp32; else nothing but sizes changes, those left to their defaults included."""

    def cap(node: dict[str, Any], **limits: int) -> None:
        for key, limit in limits.items():
            if isinstance(node.get(key), int):
                node[key] = min(node[key], limit)

    tree = deepcopy(tree)
    cap(tree, images=2048, batch=32)
    tree.pop("precision", None)  # most laptops multiply bf16 slower than fp32
    student = tree.setdefault("student", {})
    resnet = is_resnet(str(student.get("backbone", "")))
    student.update({"embed_dim": 64, "depth": 1} if resnet else {"embed_dim": 64, "depth": 2, "heads": 4})
    if resnet:  # bottlenecks would leave 16 channels to the widest stage
        student["backbone"] = "resnet18"
    cap(student, virtual_batch=8, shuffle=16)
    small = {"head_hidden": 128, "head_out": 64, "predictor_hidden": 128, "prototypes": 256}
    cap(student, **small, patch_prototypes=256)
    for key, size in small.items():  # where a recipe leaves a size to its default, that is the paper's
        student.setdefault(key, size)
    student.pop("neighbours", None)
    student.pop("init", None)  # weights of the full size do not fit
    patch = 16 if resnet else student.setdefault("patch_size", 16)
    cap(student, image_size=4 * patch)
    for projection in (student.get("projections") or {}).values():
        _small(projection)
    views = tree.get("views", [])
    largest = max((view.get("size", 0) for view in views), default=0)
    for index, view in enumerate(views):
        large = index == 0 or view.get("role") in ("teacher", "both") or view.get("size") == largest
        cap(view, size=(4 if large else 2) * patch)
    for name, config in (tree.get("objectives") or {}).items():
        if isinstance(config, dict):
            cap(config, queue=1024, memory=1024, neighbours=4, exclusion_batch=8, virtual_batch=8)
            for key, size in _OBJECTIVES.get(name, {}).items():
                given = config.setdefault(key, size)
                if isinstance(given, list):
                    config[key] = [min(pair) for pair in zip(given, size, strict=False)]
                elif isinstance(given, int):
                    config[key] = min(given, size)
            if name in HEADS and name not in (student.get("projections") or {}):
                own = HEADS[name].model_dump(mode="json")
                _small(own)
                student.setdefault("projections", {})[name] = own
    cap(tree.setdefault("probes", {"size": 4 * patch}), images=512, size=4 * patch)
    tree["probes"].setdefault("size", 4 * patch)
    cap(tree.setdefault("checkpoint", {"every": 1024}), every=1024)
    return tree
