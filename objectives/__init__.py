"""gristmill.objectives: what is learned, one granularity a file, and the memories that they keep.

Usable alone: `build_objectives` from configurations, then `loss`, and `commit` once its step was applied. Nothing here
holds a trainable weight. Import direction: models <- objectives <- ops.
"""

from .contrast import info_nce, streamed_logsumexp
from .group import GroupConfig, GroupObjective
from .health import feature_std, rank_me
from .instance import InstanceConfig, InstanceObjective
from .local_group import LocalGroupConfig, LocalGroupObjective
from .memory import RingMemory
from .mixture import Dims, Mixture, MixtureConfig, build_objectives
from .patch import PatchConfig, PatchObjective
from .protocol import Objective, Outcome, StepInfo, pair_weights
from .prototypes import group_cross_entropy, teacher_targets

__all__ = [
    "Dims",
    "GroupConfig",
    "GroupObjective",
    "InstanceConfig",
    "InstanceObjective",
    "LocalGroupConfig",
    "LocalGroupObjective",
    "Mixture",
    "MixtureConfig",
    "Objective",
    "Outcome",
    "PatchConfig",
    "PatchObjective",
    "RingMemory",
    "StepInfo",
    "build_objectives",
    "feature_std",
    "group_cross_entropy",
    "info_nce",
    "pair_weights",
    "rank_me",
    "streamed_logsumexp",
    "teacher_targets",
]
