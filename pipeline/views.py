"""The pieces of a recipe that the pipeline reads: which crops are cut of every image, and how the stream is run.

A view is a named group of equal crops ("two of 224 pixels, a quarter of the image or more"); nothing here assumes
two globals and ten locals. How crops are coloured is for augmentation.py, sets of views by name are in groups.py.
Carrying out the recipe is for draws.py and augment/.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from .augmentation import PRESETS, Augment, Probability, Strong

__all__ = ["PRESETS", "Augment", "CacheConfig", "StreamConfig", "Strong", "View"]


class View(BaseModel):
    """`count` crops of `size` x `size` pixels, each cut and coloured on its own.

    With `strong`, each crop takes one of two forms: the weak one (`augment`) with probability `weak_p`, or the strong
    one. Who tosses the coin: every crop for itself, or the image for all crops of the view (`coin: image`), and then
    for all views that name the same `coin_group`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(min_length=1)
    count: int = Field(default=1, ge=1)
    size: int = Field(ge=1)  # pixels of a side
    scale: tuple[float, float] = (0.25, 1.0)  # share of the image's area
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width to height, log-uniform
    role: Literal["teacher", "student", "both"] = "both"
    # Of resizing. Both widen with the scale (antialiased): a triangle, or PIL's cubic with a = -0.5.
    filter: Literal["bilinear", "bicubic"] = "bilinear"
    augment: Augment = Field(default_factory=lambda: Augment.model_validate("weak"))
    strong: Strong | None = None
    weak_p: Probability = 0.5  # of the weak form; without `strong` there is no other
    coin: Literal["crop", "image"] = "crop"
    coin_group: str | None = None

    @model_validator(mode="after")
    def _possible(self) -> View:
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale: {self.scale} is no range of shares between 0 and 1, smaller one first")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"ratio: {self.ratio} is no range of positive numbers, smaller one first")
        if self.coin_group is not None and self.coin != "image":
            raise ValueError(
                f"coin_group: {self.coin_group!r} needs `coin: image`; with `coin: crop` nothing is shared"
            )
        if self.strong is not None and self.augment.crop != "random":
            raise ValueError("strong: goes with a random crop alone; leave augment.crop out")
        return self

    def blur(self, copy: int) -> float:
        """Probability that the copy of this index is blurred, in the weak form."""
        return self.augment.blur[min(copy, len(self.augment.blur) - 1)]

    def solarize(self, copy: int) -> float:
        """Probability that the copy of this index is solarised, in the weak form."""
        return self.augment.solarize[min(copy, len(self.augment.solarize) - 1)]

    @property
    def sigma(self) -> tuple[float, float]:
        """Range of the blur's standard deviation in pixels of the crop, in the weak form; see Augment.sigma."""
        return self.augment.sigma(self.size)


class CacheConfig(BaseModel):
    """A cache of whole shards on a local disk, shared by the ranks of a node. Only shards behind urls go there."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    folder: Path
    bytes: int = Field(gt=0)  # never exceeded; must hold the working set (`gristmill order --cache`)
    threads: int = Field(default=2, ge=1)  # that fetch ahead


class StreamConfig(BaseModel):
    """How the data is walked and fed. Only `lanes` and `window` (and the seed) decide what is seen, and when.

    Besides, what a living data set needs to be told: when new shards are taken up, from where on new weights hold.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    seed: int = Field(default=0, ge=0, lt=2**64)
    lanes: int = Field(default=64, ge=1)
    window: int = Field(default=65536, ge=1)  # samples that are shuffled among themselves inside a lane
    reader_threads: int = Field(default=2, ge=1)
    prefetch: int = Field(default=2, ge=1)  # batches that wait ready
    damage_bound: float = Field(default=0.001, ge=0, le=1)  # share of the data that may be damaged before the run stops
    augment_threads: int = Field(default=1, ge=1)
    augment: Literal["auto", "dali", "cpu"] = "auto"  # who carries draws out; auto: DALI on GPUs, else our own for CPUs
    stall: float = Field(default=600.0, gt=0)  # seconds without a batch after which the run stops and says why
    deadline: float = Field(default=300.0, gt=0)  # seconds over all tries of one read from a server
    cache: CacheConfig | None = None
    take_up: Literal["epoch", "never"] | int = "epoch"  # new shards: at the next epoch, never, or at this position
    mixture_from: int | None = Field(default=None, ge=0)  # position from which weights hold that were changed
