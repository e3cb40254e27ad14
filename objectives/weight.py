"""The weight of an objective in a mixture: a number, or a ramp between two over a part of the run.

A function of the position alone, so that a resumed run needs no state for it. Papers that bring a term in late (DenseCL's
warm-up of lambda, HCSC's jump from one cross-entropy to three) do it by steps; a ramp of no length is a step.
"""

from __future__ import annotations

from typing import Annotated, Any, TypeAlias

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

Share = Annotated[float, Field(ge=0, le=1)]


class Ramp(BaseModel):
    """From `start` to `end`, linear over a part of the run, and constant before and after it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    start: float = Field(ge=0, allow_inf_nan=False)
    end: float = Field(ge=0, allow_inf_nan=False)
    over: tuple[Share, Share] = (0.0, 1.0)  # shares of the run

    @model_validator(mode="after")
    def _possible(self) -> Ramp:
        if self.over[0] > self.over[1]:
            raise ValueError(f"over: {list(self.over)} is no part of the run, its beginning first")
        if not max(self.start, self.end):
            raise ValueError("start and end are both 0: leave the objective out instead")
        return self

    def at(self, progress: float) -> float:
        """At this share of the run."""
        first, last = self.over
        if progress >= last:
            return self.end
        return (
            self.start
            if progress <= first
            else self.start + (self.end - self.start) * (progress - first) / (last - first)
        )


def _form(value: Any) -> str:
    return "<ramp>" if isinstance(value, dict | Ramp) else "<number>"


_Number: TypeAlias = Annotated[float, Field(gt=0, allow_inf_nan=False), Tag("<number>")]
_Ramp: TypeAlias = Annotated[Ramp, Tag("<ramp>")]
Weight: TypeAlias = Annotated[_Number | _Ramp, Discriminator(_form)]  # one error for what was meant, not two


def weight_at(weight: float | Ramp, progress: float) -> float:
    """At this share of the run."""
    return weight.at(progress) if isinstance(weight, Ramp) else weight
