"""How many weights there are, by part, of the student and of its teacher; and what ZeRO 3 gathers of them, and when.

Parts are named by granularity, as users think of them: backbone, projectors, predictors, local-group transformer,
prototypes. Networks are on the meta device, so that a ViT of billions of weights costs nothing to count.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ...models.student import Student

PARTS: tuple[str, ...] = ("backbone", "heads", "predictors", "local-group transformer", "prototypes")


@dataclass(frozen=True)
class Weights:
    """Numbers of weights: `student` and `teacher` by part, frozen ones included."""

    student: dict[str, int]
    teacher: dict[str, int]
    trained: int  # of the student: what has gradients, masters and moments
    averaged: int  # of these, what the teacher has, too
    frozen: int  # of the student, without gradient
    modules: tuple[
        tuple[tuple[int, int], ...], ...
    ]  # of a forward in order, by module: (number, weights) of each tensor


def part_of(name: str) -> str:
    """The part that a parameter of the student belongs to."""
    if name.startswith("backbone."):
        return "backbone"
    if name.startswith("relation."):
        return "local-group transformer"
    if ".predictor." in name:
        return "predictors"
    return "prototypes" if "last_layer" in name or "prototypes" in name else "heads"


def weights(student: Student, teacher: Student, passes: int = 1) -> Weights:
    """Count the weights of both. passes: how often a step's forward goes through the backbone, once a size of crops."""
    named = dict(student.named_parameters())
    known = {name for name, _ in teacher.named_parameters()}
    trained = {name: p.numel() for name, p in named.items() if p.requires_grad}
    number = {id(p): index for index, p in enumerate(named.values())}
    return Weights(
        student=by_part(student),
        teacher=by_part(teacher),
        trained=sum(trained.values()),
        averaged=sum(count for name, count in trained.items() if name in known),
        frozen=sum(p.numel() for p in named.values() if not p.requires_grad),
        modules=tuple(
            tuple((number[id(p)], p.numel()) for p in module.parameters(recurse=False))
            for module in _order(student, passes)
        ),
    )


def by_part(network: nn.Module) -> dict[str, int]:
    """Weights of each part that there is."""
    found: dict[str, int] = dict.fromkeys(PARTS, 0)
    for name, parameter in network.named_parameters():
        found[part_of(name)] += parameter.numel()
    return {part: count for part, count in found.items() if count}


def _order(student: Student, passes: int) -> list[nn.Module]:
    """Modules with weights of their own, as a forward meets them."""
    trunk = [module for module in student.backbone.modules() if list(module.parameters(recurse=False))]
    inside = {id(module) for module in trunk}
    rest = [m for m in student.modules() if id(m) not in inside and list(m.parameters(recurse=False))]
    return trunk * passes + rest


def gathered(
    modules: tuple[tuple[tuple[int, int], ...], ...],
    *,
    backward: bool,
    persistent: int,
    reuse: int,
) -> tuple[int, int]:
    """Under ZeRO 3: the most weights that are whole at once, and how many are gathered in a step, in numbers of weights.

    DeepSpeed gives a module's weights back after it has run, but for tensors of at most `persistent` weights, and those
    that come up again before `reuse` weights of other modules did (DeepSpeedZeRO3's max_reuse_distance).
    """
    steps = [[(number, count) for number, count in module if count > persistent] for module in modules]
    if backward:
        steps = steps + steps[::-1]
    traversed = [0]
    for step in steps:
        traversed.append(traversed[-1] + sum(count for _, count in step))
    following: list[dict[int, int]] = [{} for _ in steps]  # by step and tensor: weights until it comes up again
    last: dict[int, int] = {}
    for place in range(len(steps) - 1, -1, -1):
        for number, _ in steps[place]:
            if number in last:
                following[place][number] = traversed[last[number]] - traversed[place + 1]
            last[number] = place
    live: dict[int, int] = {}
    most = fetched = 0
    for place, step in enumerate(steps):
        for number, count in step:
            if number not in live:
                live[number] = count
                fetched += count
        most = max(most, sum(live.values()))
        for number, _ in step:
            if following[place].get(number, reuse) >= reuse:
                live.pop(number, None)
    return most, fetched
