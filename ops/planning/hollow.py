"""A run's networks and objectives without memory: of the sizes that the recipe says, on no device.

They are built by the code that a run builds them with, on torch's meta device, and their tensors then replaced by fake
ones that a ledger's step can compute with. These are the CPU's, since torch cannot run a backward on a GPU that is not
there; models/host.py lets the step take a GPU's ways all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...models.student import Student
from ...models.teacher import make_teacher
from ...objectives import Mixture
from ...objectives.memory import RingMemory
from ..networks import build_mixture
from ..recipe import Recipe
from .ledger import Ledger

IMAGES = 1_281_167  # of a data set of which nothing is known: ImageNet-1k's


@dataclass
class Networks:
    """Student, teacher and objectives on the meta device; `kept`: bytes of what each objective keeps on the device."""

    student: Student
    teacher: Student
    mixture: Mixture
    kept: dict[str, int]


def networks(recipe: Recipe, images: int = IMAGES) -> Networks:
    """Everything that a run of this recipe builds, without memory. images: of the data set."""
    with torch.device("meta"):
        student = Student(recipe.student, seed=recipe.seed)
    teacher = make_teacher(student)
    mixture = build_mixture(recipe, student, "meta", images=images)
    for found in _objects(mixture):
        if isinstance(found, RingMemory) and not found.unit:
            found._norms = found.rows.new_empty(found.capacity)  # as the first search makes them
    kept = {}
    for name, objective in mixture.objectives.items():
        held = {id(t): t.nbytes for t in _objects(objective) if isinstance(t, Tensor) and t.device.type == "meta"}
        kept[name] = sum(held.values())
    return Networks(student, teacher, mixture, kept)


def fill(networks: Networks, ledger: Ledger, dtype: torch.dtype) -> None:
    """Replace tensors without device by the ledger's. dtype: of weights; buffers keep theirs.

    Objectives that begin plainly are put where they ask the most: clusters are there, hierarchies count in full.
    """
    for network in (networks.student, networks.teacher):
        for module in network.modules():
            for name, p in module.named_parameters(recurse=False):
                own = nn.Parameter(ledger.hollow(*p.shape, dtype=dtype), requires_grad=p.requires_grad)
                module._parameters[name] = own
            for name, b in module.named_buffers(recurse=False):
                module._buffers[name] = ledger.hollow(*b.shape, dtype=b.dtype)
    for objective in networks.mixture.objectives.values():
        for name, begun in (("last", 0), ("clustered", 0), ("log_z", 0.0)):
            if hasattr(objective, name):
                setattr(objective, name, begun)
    made: dict[int, Tensor] = {}

    def filled(value: Tensor) -> Tensor:
        if value.device.type != "meta":
            return value
        if id(value) not in made:
            made[id(value)] = ledger.hollow(*value.shape, dtype=value.dtype)
        return made[id(value)]

    _replace(networks.mixture, filled)


def _objects(value: Any, seen: set[int] | None = None) -> Iterator[Any]:
    """Everything that is reached from an objective, itself included, each once."""
    seen = set() if seen is None else seen
    if id(value) in seen:
        return
    seen.add(id(value))
    yield value
    for inner in _inside(value).values():
        yield from _objects(inner, seen)


def _inside(value: Any) -> dict[Any, Any]:
    if isinstance(value, dict):
        return value
    if isinstance(value, list | tuple):
        return dict(enumerate(value))
    return vars(value) if type(value).__module__.startswith(Mixture.__module__.rpartition(".")[0]) else {}


def _replace(value: Any, by: Callable[[Tensor], Tensor]) -> None:
    """Replace every tensor reached from an objective."""
    for found in list(_objects(value)):
        for key, inner in list(_inside(found).items()):
            if not isinstance(inner, Tensor):
                continue
            if isinstance(found, dict | list):
                found[key] = by(inner)
            elif not isinstance(found, tuple):
                object.__setattr__(found, key, by(inner))
