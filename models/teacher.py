"""The teacher: a copy of the student that no gradient reaches; its weights follow by `ema`.

Same class and same forward signature, so both read views alike. It has no predictor (the asymmetry that BYOL introduced,
arXiv 2006.07733, and Mugs keeps) and drops no paths (reference/mugs.md 1.1, 3). Batch norm, where there is some, is as in
MoCo's key encoder (arXiv 1911.05722): weights follow the student's, but in training it normalises by the statistics of
its own batch, and its running statistics come of these, by `merge_statistics`; the student's never reach it.
"""

import copy

from .heads import ProjectionHead
from .mlp import MlpHead
from .student import Student


def make_teacher(student: Student) -> Student:
    """A deep copy of `student` without predictors and mask token, frozen, in training mode, with drop_path 0.

    The mode only says whose statistics batch norm takes: `eval()` for probes, which want the running ones. Make it before
    an engine wraps the student, since engines may replace parameters by shards, and before its blocks are compiled.
    """
    teacher = copy.deepcopy(student)
    teacher.config = student.config.model_copy(update={"drop_path": 0.0})
    teacher.backbone.mask_token = None
    for head in teacher.heads.values():
        if isinstance(head, ProjectionHead | MlpHead):
            head.predictor = None
    return teacher.requires_grad_(False).train()
