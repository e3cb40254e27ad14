"""The recipe's section of objectives: which are learned, with which settings, and what they weigh."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from ..objectives import (
    BankConfig,
    BatchContrastConfig,
    BootstrapConfig,
    ClustersConfig,
    DenseConfig,
    GroupConfig,
    HierarchyConfig,
    InstanceConfig,
    LocalGroupConfig,
    PatchConfig,
    SwappedConfig,
    Weight,
)

NAMES = (
    *("instance", "dense", "local_group", "hierarchy", "group", "patch"),
    *("batch_contrast", "bootstrap", "bank", "swapped", "clusters"),
)


class Piece(BaseModel):
    """A section of a recipe: unknown keys are errors, values are frozen once read."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ObjectivesConfig(Piece):
    """Which granularities are learned; leave one out, or set it to null, to do without it."""

    instance: InstanceConfig | None = None
    dense: DenseConfig | None = None
    local_group: LocalGroupConfig | None = None
    hierarchy: HierarchyConfig | None = None
    group: GroupConfig | None = None
    patch: PatchConfig | None = None
    batch_contrast: BatchContrastConfig | None = None
    bootstrap: BootstrapConfig | None = None
    bank: BankConfig | None = None
    swapped: SwappedConfig | None = None
    clusters: ClustersConfig | None = None
    weights: dict[str, Weight] = {}  # by name, 1 where not given, or a ramp; the mean is weighted by them
    add: Literal["mean", "sum"] = "mean"  # of the weighted losses; Mugs: mean, iBOT: sum

    def names(self) -> list[str]:
        return [name for name in NAMES if getattr(self, name) is not None]

    def chosen(self) -> dict[str, Any]:
        """The configurations of the objectives that are learned, by name."""
        return {name: getattr(self, name) for name in self.names()}

    @property
    def needs_teacher(self) -> bool:
        """Whether any of them compares the student with its teacher; without, the teacher's forward is left out."""
        return any(getattr(config, "needs_teacher", True) for config in self.chosen().values())

    @property
    def needs_table(self) -> list[str]:
        """Those that keep something for each image of the data set, which must not grow meanwhile."""
        return [name for name, config in self.chosen().items() if getattr(config, "needs_table", False)]
