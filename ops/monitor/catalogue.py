"""The catalogue of metrics: under which name a number arrives, and what Prometheus is told it is.

Names are flat and the same as in metrics.jsonl (`loss/instance`, `phase/data_wait`). A name written with {braces}
stands for one series per member of an enumeration in labels.py; nothing outside them is ever served, so no file name,
exception text or remote string can become a label. Metrics follow `gristmill_<subject>_<unit>[_total]` in base units.
Rows lie by subject in catalogue_*.py; docs/metrics.md is made from here (reference.py).
"""

from . import catalogue_data, catalogue_learning, catalogue_run, catalogue_step, labels
from .labels import HEALTH, HEALTH_OF, MEMORIES, OBJECTIVES, PHASES, PROBES, RESULTS, WHO
from .row import Group, Row

__all__ = [
    "CATALOGUE",
    "ENUMS",
    "GROUPS",
    "HEALTH",
    "HEALTH_OF",
    "MEMORIES",
    "OBJECTIVES",
    "PHASES",
    "PROBES",
    "RESULTS",
    "WHO",
    "Group",
    "Row",
]

ENUMS: dict[str, tuple[str, ...]] = {
    "objective": OBJECTIVES,
    "centred": labels.CENTRED,
    "name": HEALTH,
    "memory": MEMORIES,
    "probe": PROBES,
    "phase": PHASES,
    "who": WHO,
    "result": RESULTS,
    "state": labels.STATES,
    "spent": labels.SPENT,
    "cause": labels.CAUSES,
    "place": labels.PLACES,
    "cuda": labels.CUDA,
    "retry": labels.RETRIES,
    "operation": labels.OPERATIONS,
}
GROUPS: tuple[Group, ...] = (
    catalogue_run.RUN,
    catalogue_step.STEPS,
    catalogue_step.COMMUNICATION,
    catalogue_data.STORAGE,
    catalogue_data.READER,
    catalogue_data.BUFFERS,
    catalogue_learning.OBJECTIVES,
    catalogue_learning.TEACHER,
    catalogue_learning.MEMORIES,
    catalogue_learning.PROBES,
    catalogue_step.GUARD,
    catalogue_run.CHECKPOINTS,
    catalogue_run.GOODPUT,
)
CATALOGUE: tuple[Row, ...] = tuple(row for group in GROUPS for row in group.rows)
