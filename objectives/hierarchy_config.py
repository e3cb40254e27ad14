"""Settings of the hierarchy objective. Where a comment names no other source, a default is the official HCSC code's.

The published setting is 16384 negatives, 3000, 2000 and 1000 prototypes, T 0.2, 20 of 200 epochs of warm-up (sections 2.2 to
2.7 of the notes on that code); the paper's ablation is `instance_selection`, `prototype_selection` and `levels: [6000]`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Probabilities = tuple[Annotated[float, Field(ge=0, le=1)], Annotated[float, Field(ge=0, le=1)]]


class HierarchyConfig(BaseModel):
    """HCSC: instance and prototype contrast with selected negatives over levels of prototypes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    queue: int = Field(default=16384, ge=1)  # teacher projections kept as negatives; HCSC: 16384
    temperature: float = Field(default=0.2, gt=0)  # of instances, and the mean of the concentrations; HCSC: 0.2
    # Prototypes of each level, the finest first; one level is flat. HCSC: 3000, 2000, 1000 (flat in its ablation: 6000).
    levels: tuple[Annotated[int, Field(ge=2)], ...] = Field(default=(3000, 2000, 1000), min_length=1)
    # In place of `temperature` as the mean concentration where negatives are selected; None: the same (HCSC).
    selection_temperature: float | None = Field(default=None, gt=0)
    instance_selection: bool = True  # drop queue entries; HCSC: yes, without it one plain InfoNCE
    prototype_selection: bool = True  # drop prototypes; HCSC: yes
    selection_on_local: bool = True  # local crops share the first crop's masks; HCSC's class: yes, its command line: no
    masked: Literal["zero", "remove"] = "zero"  # a dropped logit becomes 0 (official code), or is left out (paper)
    # official: no prototype of any image of the batch, nor the highest number in use; all: every one but the image's own.
    negatives: Literal["official", "all"] = "official"
    # Images in a row whose prototypes are no negatives of each other; divides a forward's images. None: all of a forward's,
    # as official, so that the loss depends on how many these are.
    exclusion_batch: int | None = Field(default=None, ge=1)
    instance_weight: float = Field(default=1.0, ge=0, allow_inf_nan=False)  # after the warm-up; HCSC: 1
    prototype_weight: float = Field(default=1.0, ge=0, allow_inf_nan=False)  # HCSC: 1
    instance_levels: Literal["sum", "mean"] = "sum"  # over levels; HCSC's code: sum (its paper averages)
    prototype_levels: Literal["sum", "mean"] = "mean"  # over levels; HCSC: mean
    local_crops: Literal["sum", "mean"] = "sum"  # over local crops, whose terms join the global one's; HCSC: sum
    instance_keep: Probabilities = (0.0, 0.999)  # bounds of the probability that a negative stays; HCSC: these
    prototype_keep: Probabilities = (1e-4, 0.999)  # HCSC: these
    warmup: float = Field(default=0.1, ge=0, le=1)  # share of the run by InfoNCE alone; HCSC: 20 of 200 epochs
    iterations: int = Field(default=20, ge=1)  # of k-means; HCSC: 20
    attempts: int = Field(default=5, ge=1)  # of k-means, the best is kept; HCSC: 5
    smoothing: float = Field(default=10.0, gt=0)  # inside the logarithm of the concentration; PCL, HCSC: 10
    assign: Literal["table", "stream"] = "table"  # HCSC: table
    # Images from one clustering to the next. None: table, as many as the last one saw (HCSC: an epoch); stream, four memories.
    every: int | None = Field(default=None, ge=1)
    # The streaming form alone; ours.
    memory: int = Field(default=65536, ge=1)  # keys that are clustered
    ramp: float = Field(default=0.05, ge=0, le=1)  # share of the run from InfoNCE alone to the full loss
    again: int = Field(default=8, ge=1)  # iterations of k-means from the prototypes that are there

    @model_validator(mode="after")
    def _possible(self) -> HierarchyConfig:
        if any(above > below for below, above in zip(self.levels, self.levels[1:], strict=False)):
            raise ValueError(f"levels: {list(self.levels)} must not grow: a level is made of the prototypes before it")
        if self.assign == "stream" and self.memory < self.levels[0]:
            raise ValueError(f"memory: {self.memory} keys cannot make {self.levels[0]} prototypes; enlarge the memory")
        if not self.instance_weight and not self.prototype_weight:
            raise ValueError(
                "instance_weight, prototype_weight: both are 0, so nothing would be learned; weigh one above 0"
            )
        for field in ("instance_keep", "prototype_keep"):
            low, high = getattr(self, field)
            if low > high:
                raise ValueError(f"{field}: {low} ... {high} is no range; give the smaller probability first")
        return self

    @property
    def over_ranks_batch(self) -> bool:
        """Whether an image's loss depends on how many images share its forward, hence on the number of ranks."""
        return self.negatives == "official" and self.exclusion_batch is None and self.prototype_weight > 0

    @property
    def needs_table(self) -> bool:
        """Whether something is kept for each image of the data set, which must not grow meanwhile."""
        return self.assign == "table"
