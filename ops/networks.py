"""The networks and objectives that a recipe asks for, built anew, or filled from a checkpoint in one process."""

from __future__ import annotations

import torch

from ..models.student import Student
from ..models.teacher import make_teacher
from ..objectives import Dims, Mixture, MixtureConfig, build_objectives
from .checkpoint import Saved
from .recipe import Recipe


def build_student(recipe: Recipe) -> Student:
    """The student as it is before its first step."""
    return Student(recipe.student, seed=recipe.seed)


def build_mixture(recipe: Recipe, student: Student, device: torch.device | str = "cpu", *, images: int = 0) -> Mixture:
    """The recipe's objectives, their memories as they are before the first step. images: of the data set."""
    wanted, heads = recipe.objectives, recipe.student
    widths = {name: heads.out_of(name) for name in wanted.names() if name not in ("group", "patch")}
    return build_objectives(
        wanted.chosen(),
        dims=Dims(
            features=student.backbone.embed_dim,
            prototypes=heads.prototypes,
            patch_prototypes=heads.prototypes_of_patches,
            images=images,
            globals=_globals(recipe),
            **widths,
        ),
        seed=recipe.seed,
        mixture=MixtureConfig(weights=wanted.weights, add=wanted.add),
        device=device,
    )


def _globals(recipe: Recipe) -> int:
    """Global crops of an image that the student sees."""
    seen = [view for view in recipe.views if view.role != "teacher"]
    largest = max(view.size for view in seen)
    return sum(view.count for view in seen if view.size == largest)


def saved_networks(saved: Saved, recipe: Recipe, *names: str) -> list[Student]:
    """ "student" or "teacher", each with the weights and buffers of a checkpoint, whatever ranks and stage wrote it.

    Raises ValueError, naming what differs, when the checkpoint's networks are not those of the recipe.
    """
    student = build_student(recipe)
    networks = {"student": student, "teacher": make_teacher(student)}
    buffers = saved.whole("buffers") if "buffers" in saved.wholes() else {}
    trained = {name for name, parameter in student.named_parameters() if parameter.requires_grad}
    for who in names:
        own = {name.removeprefix(f"{who}/"): b for name, b in buffers.items() if name.startswith(f"{who}/")}
        held, wanted = {**saved.assembled(who), **own}, networks[who].state_dict()
        # A rank's share of the averages may reach over parts that only the student has. What is frozen never changed.
        wrong = (wanted.keys() - held.keys()) & trained | (held.keys() - student.state_dict().keys())
        wrong |= {name for name in wanted.keys() & held.keys() if wanted[name].shape != held[name].shape}
        if wrong:
            raise ValueError(f"the {who} differs in {', '.join(sorted(wrong)[:3])}")
        networks[who].load_state_dict(held, strict=False)
    return [networks[who] for who in names]
