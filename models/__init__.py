"""Networks: student, teacher, their heads, and the moving average between them.

student = Student(StudentConfig(), seed=0)          # models/student.py
teacher = make_teacher(student)                     # models/teacher.py
out = student([global_crops, local_crops], {"local_group.bank": rows, "drop_path.draws": draws})
ema_update(pairs(student, teacher), momentum=0.996) # models/ema.py
merge_statistics(student, statistics_of(out))       # models/batch_norm.py, once the step was applied
state, report = import_backbone("dino.pth", "teacher", student.backbone)  # models/weights.py
"""

from .batch_norm import BatchNorm, collect_statistics, merge_statistics, statistics_of
from .ema import ema_update, pairs
from .heads import ProjectionHead, PrototypeHead
from .neighbours import NeighbourBlock, search
from .student import Student, StudentConfig
from .teacher import make_teacher
from .unpickle import WeightsError, read_weights
from .vit import Backbone, build_backbone, compile_blocks, tokens
from .weights import Report, import_backbone, import_student

__all__ = [
    "Backbone",
    "BatchNorm",
    "NeighbourBlock",
    "ProjectionHead",
    "PrototypeHead",
    "Report",
    "Student",
    "StudentConfig",
    "WeightsError",
    "build_backbone",
    "collect_statistics",
    "compile_blocks",
    "ema_update",
    "import_backbone",
    "import_student",
    "make_teacher",
    "merge_statistics",
    "pairs",
    "read_weights",
    "search",
    "statistics_of",
    "tokens",
]
