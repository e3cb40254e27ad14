"""A plan as tables for people: what it was made from, memory, time, what it asks of the rest, and what would fit."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.table import Table

from .hardware import GIB
from .report import Plan


def gib(size: float) -> str:
    """Bytes as people read them."""
    for unit, name in ((GIB, "GiB"), (2.0**20, "MiB"), (2.0**10, "KiB")):
        if abs(size) >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size:.0f} B" if size else "-"


def many(number: float) -> str:
    """A large number with a word for its size."""
    for unit, name in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= unit:
            return f"{number / unit:.3g} {name}"
    return f"{number:.3g}"


def length(days: float) -> str:
    """Days, or hours where they are few, as people read them."""
    return f"{days:.1f} days" if days >= 2 else f"{24 * days:.1f} hours"


def show(plan: Plan, console: Console) -> None:
    """Print everything."""
    console.print(_head(plan))
    console.print(_parameters(plan))
    console.print(_stages(plan))
    console.print(_peak(plan))
    console.print(_time(plan))
    console.print(_around(plan))
    console.print(verdict(plan), soft_wrap=True)
    for proposal in plan.proposals:
        console.print(
            f"  {proposal.change}: {gib(proposal.peak)} a rank ({proposal.costs})", soft_wrap=True, markup=False
        )


def verdict(plan: Plan) -> str:
    """Whether it fits, in a sentence or two."""
    found, judged = plan.judged.memory, plan.judged
    if plan.fits:
        told = f"It fits: {gib(found.peak)} of {gib(judged.room)} a rank, {gib(-judged.over)} to spare."
        return f"{told} {plan.speed.images:,.0f} images a second, {length(plan.days)}."
    size = found.parts[found.largest]
    told = (
        f"It does not fit: {gib(found.peak)} a rank, {gib(judged.over)} more than the {gib(judged.room)} there is; the largest "
        f"part is {found.largest}, {gib(size)}."
    )
    return told + (
        " What would fit:" if plan.proposals else " Nothing that was tried would fit; take more or larger GPUs."
    )


def _table(title: str, columns: Iterable[str], rows: Iterable[Iterable[str]]) -> Table:
    columns = list(columns)
    table = Table(title=title, title_justify="left", title_style="bold", show_header=any(columns))
    for place, column in enumerate(columns):
        table.add_column(column, justify="right" if place else "left")
    for row in rows:
        table.add_row(*row)
    return table


def _head(plan: Plan) -> Table:
    recipe, hardware, judged = plan.recipe, plan.setting.hardware, plan.judged
    network = f", {hardware.gpu.network / 1e9:g} GB/s a node" if hardware.nodes > 1 else ""
    parts, nodes = recipe.engine.accumulate, hardware.nodes
    cut = f" in {parts} micro-batches" if parts > 1 else ""
    rows = [
        ("GPUs", f"{hardware.gpus} x {hardware.gpu.name} in {nodes} node{'s' * (nodes > 1)}{network}"),
        ("batch", f"{recipe.batch} = {hardware.gpus} ranks x {parts * judged.micro} images{cut}"),
        ("largest micro-batch that fits", f"{plan.largest} images"),
        ("precision, recompute", f"{recipe.precision}, {'on' if recipe.engine.recompute else 'off'}"),
        ("ZeRO", f"stage {judged.stage} (engine.zero: {recipe.engine.zero})"),
    ]
    return _table(f"{recipe.name} on {hardware.gpus} x {hardware.gpu.name}", ("", ""), rows)


def _parameters(plan: Plan) -> Table:
    student, teacher = plan.weights.student, plan.weights.teacher
    rows = [(part, many(count), many(teacher.get(part, 0))) for part, count in student.items()]
    rows.append(("all", many(sum(student.values())), many(sum(teacher.values()))))
    return _table("weights", ("part", "student", "teacher"), rows)


def _stages(plan: Plan) -> Table:
    stages = plan.stages.values()
    names: dict[str, None] = {}
    for memory in stages:
        names |= dict.fromkeys(memory.training)
    rows = [(name, *(gib(memory.training.get(name, 0.0)) for memory in stages)) for name in sorted(names)]
    rows.append(("all, in training", *(gib(sum(memory.training.values())) for memory in stages)))
    rows.append(("the peak", *(gib(memory.peak) for memory in stages)))
    rows.append(("when (start: while it is built)", *(memory.moment for memory in stages)))
    rows.append(("fits", *("yes" if memory.peak <= plan.judged.room else "no" for memory in stages)))
    return _table(f"memory a rank, of {gib(plan.judged.room)}", ("", *(f"ZeRO {stage}" for stage in plan.stages)), rows)


def _peak(plan: Plan) -> Table:
    rows = [(name, gib(size)) for name, size in plan.judged.memory.activations.items()]
    rows += [(name, gib(size)) for name, size in plan.without.items()]
    return _table("activations of one micro-batch, kept for backward", ("", ""), rows)


def _time(plan: Plan) -> Table:
    told, assumed = plan.speed, plan.setting.assumed
    rows = [(name, f"{1e3 * value:.1f} ms") for name, value in told.seconds.items()]
    rows += [
        ("a step", f"{1e3 * told.step:.1f} ms"),
        ("FLOPs a rank and step", many(told.flops) + "FLOP"),
        ("model FLOPs of an image", many(told.model_flops) + "FLOP"),
        ("model FLOPs, share of the peak", f"{told.utilisation:.1%}"),
        *((f"sent: {name}", gib(size)) for name, size in told.sent.items()),
        ("images a second", f"{told.images:,.0f}"),
        ("the recipe", f"{length(plan.days)}, {plan.days * 24 * plan.setting.hardware.gpus:,.0f} GPU-hours"),
    ]
    title = (
        f"time, if products reach {assumed.efficiency:.0%} of the peak, other operators {assumed.bandwidth:.0%} of the "
        f"bandwidth, sending {assumed.wire:.0%} of the links"
    )
    return _table(title, ("", ""), rows)


def _around(plan: Plan) -> Table:
    found, assumed = plan.supply, plan.setting.assumed
    rows = [
        (f"from the storage, at {assumed.bytes / 1e3:g} kB an image", f"{found.read / 1e6:,.0f} MB/s"),
        ("of it a node", f"{found.read_node / 1e6:,.0f} MB/s"),
        ("GPUs decode and cut crops", f"{found.gpu_supply:.0%} of the time that DALI has for it"),
        (f"or cores a node, at {assumed.core:g} images a second each", str(found.cores_node)),
        ("reader threads a rank", str(found.readers)),
        ("host memory a node", gib(found.host_node)),
        ("a checkpoint", gib(found.checkpoint)),
    ]
    return _table("what it asks of the rest", ("", ""), rows)
