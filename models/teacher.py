"""The teacher: a copy of the student that no gradient reaches; its weights follow by `ema`.

Same class and same forward signature, so both read views alike. It has no predictor (the asymmetry that BYOL introduced,
arXiv 2006.07733, and Mugs keeps) and drops no paths (reference/mugs.md 1.1, 3).
"""

import copy

from .heads import ProjectionHead
from .student import Student


def make_teacher(student: Student) -> Student:
    """A deep copy of `student` without predictors, frozen, in evaluation mode, with drop_path 0.

    Make it before an engine wraps the student: engines may replace parameters by shards.
    """
    teacher = copy.deepcopy(student)
    teacher.config = student.config.model_copy(update={"drop_path": 0.0})
    for head in teacher.heads.values():
        if isinstance(head, ProjectionHead):
            head.predictor = None
    return teacher.requires_grad_(False).eval()
