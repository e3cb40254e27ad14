"""Networks: student, teacher, their heads, and the moving average between them.

student = Student(StudentConfig(), seed=0)          # models/student.py
teacher = make_teacher(student)                     # models/teacher.py
out = student([global_crops, local_crops], {"local_group.bank": rows, "drop_path.draws": draws})
ema_update(pairs(student, teacher), momentum=0.996) # models/ema.py
merge_statistics(student, statistics_of(out))       # models/batch_norm.py, once the step was applied
"""

from .batch_norm import BatchNorm, collect_statistics, merge_statistics, statistics_of
from .ema import ema_update, pairs
from .heads import ProjectionHead, PrototypeHead
from .neighbours import NeighbourBlock, search
from .student import Student, StudentConfig
from .teacher import make_teacher
from .vit import Backbone, build_backbone, compile_blocks, tokens

__all__ = [
    "Backbone",
    "BatchNorm",
    "NeighbourBlock",
    "ProjectionHead",
    "PrototypeHead",
    "Student",
    "StudentConfig",
    "build_backbone",
    "collect_statistics",
    "compile_blocks",
    "ema_update",
    "make_teacher",
    "merge_statistics",
    "pairs",
    "search",
    "statistics_of",
    "tokens",
]
