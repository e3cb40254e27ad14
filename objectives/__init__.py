"""gristmill.objectives: what is learned, one granularity a file, and the memories that they keep.

Usable alone: `build_objectives` from configurations, then `loss`, and `commit` once its step was applied. Nothing here
holds a trainable weight. Import direction: models <- objectives <- ops.
"""

from .bank import BankConfig, BankObjective
from .batch_contrast import BatchContrastConfig, BatchContrastObjective
from .bootstrap import BootstrapConfig, BootstrapObjective
from .clusters import ClustersConfig, ClustersObjective
from .contrast import info_nce, streamed_logsumexp
from .dense import DenseConfig, DenseObjective
from .group import GroupConfig, GroupObjective
from .health import feature_std, rank_me
from .hierarchy import HierarchyConfig, HierarchyObjective
from .instance import InstanceConfig, InstanceObjective
from .local_group import LocalGroupConfig, LocalGroupObjective
from .memory import RingMemory
from .mixture import Dims, Mixture, MixtureConfig, build_objectives
from .patch import PatchConfig, PatchObjective
from .protocol import Objective, Outcome, StepInfo, pair_weights
from .prototypes import group_cross_entropy, teacher_targets
from .swapped import SwappedConfig, SwappedObjective
from .weight import Ramp, Weight

__all__ = [
    "BankConfig",
    "BankObjective",
    "BatchContrastConfig",
    "BatchContrastObjective",
    "BootstrapConfig",
    "BootstrapObjective",
    "ClustersConfig",
    "ClustersObjective",
    "DenseConfig",
    "DenseObjective",
    "Dims",
    "GroupConfig",
    "GroupObjective",
    "HierarchyConfig",
    "HierarchyObjective",
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
    "Ramp",
    "RingMemory",
    "StepInfo",
    "SwappedConfig",
    "SwappedObjective",
    "Weight",
    "build_objectives",
    "feature_std",
    "group_cross_entropy",
    "info_nce",
    "pair_weights",
    "rank_me",
    "streamed_logsumexp",
    "teacher_targets",
]
