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
    both = any(view.role == "both" for view in recipe.views)
    for name, config in wanted.chosen().items():
        # Whether teacher crop i and student crop i are compared: where they are one crop, nobody does.
        same = both or name in ("local_group", "group") or getattr(config, "pairs", "") == "mugs"
        if getattr(config, "needs_teacher", True) and name != "patch":
            try:
                pair_weights(teacher, student, 0, same=same)
            except ValueError as error:
                raise ValueError(f"views: {name}: {error}") from error
    alone = {  # of objectives without a teacher: whether the student's crops will do, and what would
        "batch_contrast": (student == 2, "two crops"),
        "bootstrap": (student > 1, "two crops or more"),
        "bank": (student == 1, "one crop"),
    }
    for name, (fits, crops) in alone.items():
        config = getattr(wanted, name)
        if config and not getattr(config, "needs_teacher", True) and not fits:
            raise ValueError(f"views: {name}: it wants {crops} of each image for the student, not {student}")
    rows = recipe.batch * teacher
    for name in ("instance", "dense", "local_group", "hierarchy"):
        config = getattr(wanted, name)
        if config and config.queue < rows:
            raise ValueError(
                f"objectives.{name}.queue: {config.queue} is less than the {rows} rows of one step; enlarge it, or make "
                f"batch smaller"
            )
    hierarchy = wanted.hierarchy
    if hierarchy and hierarchy.assign == "stream" and hierarchy.memory < recipe.batch:
        raise ValueError(
            f"objectives.hierarchy.memory: {hierarchy.memory} is less than a batch of {recipe.batch}; enlarge it, or make batch "
            f"smaller"
        )
    swapped = wanted.swapped
    if swapped and 0 < swapped.queue < recipe.batch:
        raise ValueError(
            f"objectives.swapped.queue: {swapped.queue} is less than a batch of {recipe.batch}; enlarge it, or leave it out (0)"
        )
    tables = wanted.needs_table
    if tables and recipe.stream.take_up != "never":
        raise ValueError(
            f"objectives.{tables[0]}: it keeps something for every image, so the data set must not grow; set stream.take_up: never"
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
    for name, config in wanted.chosen().items():
        if (images := getattr(config, "virtual_batch", None)) and recipe.batch % images:
            raise ValueError(f"objectives.{name}.virtual_batch: {images} does not divide batch {recipe.batch}")
    patch = recipe.patch_size
    for view in recipe.views:
        if view.size % patch:
            raise ValueError(f"views.{view.name}.size: {view.size} is no multiple of student.patch_size {patch}")
    if recipe.probes.size % patch:
        raise ValueError(f"probes.size: {recipe.probes.size} is no multiple of student.patch_size {patch}")


def together(recipe: Recipe) -> dict[str, int]:
    """Numbers of images that must share a forward, by the field that says so."""
    found = {"student.virtual_batch": recipe.student.virtual_batch, "student.shuffle": recipe.student.shuffle}
    for name, config in recipe.objectives.chosen().items():
        for field in ("virtual_batch", "exclusion_batch"):
            found[f"objectives.{name}.{field}"] = getattr(config, field, None)
    return {field: images for field, images in found.items() if images}
