"""What a recipe's views, student and objectives must agree on, so that no step finds out. Called as the recipe is read.

A batch-wide term that looks beyond one rank's images, a memory that a step overflows, an objective without the crops that
it compares: each is refused here with the fields to change.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..objectives import pair_weights

if TYPE_CHECKING:
    from .recipe import Recipe


def check_objectives(recipe: Recipe) -> None:
    """ValueError naming the first fields that do not fit together."""
    wanted = recipe.objectives
    teacher = sum(view.count for view in recipe.views if view.role != "student")
    student = sum(view.count for view in recipe.views if view.role != "teacher")
    try:
        pair_weights(teacher, student, 0)
    except ValueError as error:
        raise ValueError(f"views: {error}") from error
    rows = recipe.batch * teacher
    for name in ("instance", "local_group"):
        config = getattr(wanted, name)
        if config and config.queue < rows:
            raise ValueError(
                f"objectives.{name}.queue: {config.queue} is less than the {rows} rows of one step; enlarge it, or make "
                f"batch smaller"
            )
    local = wanted.local_group
    if local and local.memory < recipe.batch:
        raise ValueError(
            f"objectives.local_group.memory: {local.memory} is less than a batch of {recipe.batch}; enlarge it, or make "
            f"batch smaller"
        )
    if local and recipe.student.neighbours != local.neighbours:
        raise ValueError(
            f"student.neighbours {recipe.student.neighbours} differs from objectives.local_group.neighbours "
            f"{local.neighbours}; leave the former out"
        )
    if wanted.patch:
        seen = [view for view in recipe.views if view.role != "teacher"]
        largest = max(view.size for view in seen)
        if any((view.role == "both") != (view.size == largest) for view in recipe.views):
            raise ValueError(
                "objectives.patch: the teacher must see the very crops of which the student sees parts; give the views of "
                "the largest size, and no others, the role both"
            )
    group = wanted.group
    if group and group.virtual_batch and recipe.batch % group.virtual_batch:
        raise ValueError(f"objectives.group.virtual_batch: {group.virtual_batch} does not divide batch {recipe.batch}")
