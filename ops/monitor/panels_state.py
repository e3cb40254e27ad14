"""Panels of what training carries from step to step: teacher, queues and memories, gradient and schedules.

A teacher that does not move, a queue that is not renewed and rows that are no unit vectors spoil a run without any loss
that says so.
"""

from __future__ import annotations

from .panels import Panel, PanelRow, Query
from .panels_terms import Agg, Both, Rate, Take

OBJECTIVE = ("objective",)


def mean(metric: str, by: tuple[str, ...] = (), where: tuple[tuple[str, str], ...] = ()) -> Agg:
    """Of what all ranks know alike, or each has its own of."""
    return Agg("avg", Take(metric, where), by)


def _memory(metric: str, fold: str = "avg") -> Agg:
    return Agg("max" if fold == "max" else "avg", Take(metric), ("memory",))


TEACHER = PanelRow(
    "Teacher",
    (
        Panel(
            "Teacher's distance from the student",
            "Length of student minus teacher over the student's; 0 while the student learns is a teacher that copies it.",
            (Query(mean("gristmill_teacher_distance_ratio"), "distance"),),
            low=0,
        ),
        Panel(
            "Updates of the teacher a step",
            "One for every committed step; 0 is a frozen teacher.",
            (
                Query(
                    Both(
                        Agg("sum", Rate(Take("gristmill_teacher_updates_total"))),
                        "/",
                        Agg("sum", Rate(Take("gristmill_steps_total"))),
                    ),
                    "updates",
                ),
            ),
            low=0,
            levels=((0.5, "bad"),),
            below=True,
        ),
        Panel(
            "Momentum and temperature",
            "The teacher's momentum as applied, and the temperatures of its choices.",
            (
                Query(mean("gristmill_teacher_momentum"), "momentum"),
                Query(mean("gristmill_teacher_temperature", OBJECTIVE), "temperature {{objective}}"),
            ),
            low=0,
        ),
    ),
)

MEMORIES = PanelRow(
    "Queues and memories",
    (
        Panel(
            "How full",
            "Share of a memory's rows ever written; below 1 it holds what it began with.",
            (Query(_memory("gristmill_memory_fill_ratio"), "{{memory}}"),),
            "ratio",
            span=6,
            low=0,
            high=1,
        ),
        Panel(
            "Age over the expected",
            "Mean age of the rows over what the rate of replacement makes it: 1 when full, 2 means rows are not renewed.",
            (
                Query(
                    Both(_memory("gristmill_memory_age_steps"), "/", _memory("gristmill_memory_expected_age_steps")),
                    "{{memory}}",
                ),
            ),
            span=6,
            low=0,
            levels=((2, "bad"),),
        ),
        Panel(
            "Norm of the rows",
            "Mean length of the rows: 1 where unit vectors are kept.",
            (Query(_memory("gristmill_memory_norm_mean"), "{{memory}}"),),
            span=6,
            low=0,
        ),
        Panel(
            "Rows that are not finite",
            "Must be 0: one such row spoils every contrast with it.",
            (Query(_memory("gristmill_memory_nonfinite_rows", "max"), "{{memory}}"),),
            span=6,
            low=0,
            levels=((1, "bad"),),
        ),
    ),
)

STEPS = PanelRow(
    "Gradient and schedules",
    (
        Panel(
            "Norm of the gradient",
            "Before clipping; jumps come before losses that are not finite.",
            (Query(mean("gristmill_gradient_norm"), "norm"),),
            span=6,
            low=0,
        ),
        Panel(
            "Steps clipped and left out",
            "Share of the steps whose gradient was clipped, and of those left out because something was not finite.",
            (
                Query(Both(Agg("max", Rate(Take("gristmill_gradient_clipped_total"))), "/", Agg("max", Rate(Take("gristmill_steps_total")))), "clipped"),
                Query(Both(Agg("max", Rate(Take("gristmill_bad_steps_total"))), "/", Agg("max", Rate(Take("gristmill_steps_total")))), "left out"),
            ),
            "ratio",
            span=6,
            low=0,
            high=1,
        ),
        Panel(
            "Learning rate",
            "As applied in the last step.",
            (Query(mean("gristmill_learning_rate"), "learning rate"),),
            span=6,
            low=0,
        ),
        Panel(
            "Weight decay",
            "As applied in the last step.",
            (Query(mean("gristmill_weight_decay"), "weight decay"),),
            span=6,
            low=0,
        ),
    ),
)  # fmt: skip
