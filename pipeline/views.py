"""The pieces of a recipe that the pipeline reads: which crops are cut of every image, and how the stream is run.

A view is a named group of equal crops ("two of 224 pixels, a quarter of the image or more"); nothing here assumes
two globals and ten locals. An augmentation is a set of probabilities and ranges, spelled out or taken from a preset
by name. The numbers of the presets are those of the papers: "weak" is DINO's (Caron et al. 2021) and Mugs' (Zhou et
al. 2022), "moco" is MoCo v2's (Chen et al. 2020). Carrying out the recipe is for draws.py and augment/.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Probability = Annotated[float, Field(ge=0, le=1)]

# What a preset changes in the defaults of Augment. A list of probabilities has one entry for each copy of the view.
PRESETS: dict[str, dict[str, Any]] = {
    "weak": {"blur": [1.0, 0.1], "solarize": [0.0, 0.2]},
    "weak-local": {"blur": [0.5], "solarize": [0.0]},
    "moco": {"saturation": 0.4, "blur": [0.5], "solarize": [0.0]},
    "none": {"crop": "centre", "flip": 0.0, "jitter_p": 0.0, "grey": 0.0, "blur": [0.0], "solarize": [0.0]},
}

BLUR_REFERENCE = 96  # pixels; see View.sigma


class Augment(BaseModel):
    """Chances and ranges of one augmentation. Applied in the order of the fields, normalisation last.

    Brightness, contrast and saturation are factors drawn from [1 - v, 1 + v] (not below 0), hue is a shift drawn from
    [-v, v] in turns of the colour circle: torchvision.transforms.ColorJitter's meaning of the same numbers.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    crop: Literal["random", "centre"] = "random"  # centre: the largest square in the middle, no draw
    flip: Probability = 0.5
    jitter_p: Probability = 0.8  # of the four that follow, together
    brightness: float = Field(default=0.4, ge=0)
    contrast: float = Field(default=0.4, ge=0)
    saturation: float = Field(default=0.2, ge=0)
    hue: float = Field(default=0.1, ge=0, le=0.5)
    grey: Probability = 0.2
    blur: list[Probability] = Field(default=[0.0], min_length=1)  # for each copy of the view; the last one repeats
    blur_sigma: tuple[float, float] = (0.1, 2.0)  # pixels of the crop; see View.sigma
    solarize: list[Probability] = Field(default=[0.0], min_length=1)  # for each copy of the view; the last one repeats
    solarize_threshold: float = Field(default=128, ge=0, le=255)  # values from here up are inverted

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, value: Any) -> Any:
        if isinstance(value, str):
            value = {"preset": value}
        if not isinstance(value, dict) or "preset" not in value:
            return value
        name, own = value["preset"], {key: entry for key, entry in value.items() if key != "preset"}
        if name not in PRESETS:
            near = difflib.get_close_matches(str(name), PRESETS, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(f"no augmentation {name!r}: {hint}there are {', '.join(PRESETS)}")
        return PRESETS[name] | own

    @field_validator("blur", "solarize", mode="before")
    @classmethod
    def _one_for_all(cls, value: Any) -> Any:
        return [value] if isinstance(value, int | float) else value

    @model_validator(mode="after")
    def _possible(self) -> Augment:
        low, high = self.blur_sigma
        if not 0 < low <= high:
            raise ValueError(f"blur_sigma: ({low}, {high}) is no range of positive numbers, smaller one first")
        return self


class View(BaseModel):
    """`count` crops of `size` x `size` pixels, each cut and coloured on its own."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(min_length=1)
    count: int = Field(default=1, ge=1)
    size: int = Field(ge=1)  # pixels of a side
    scale: tuple[float, float] = (0.25, 1.0)  # share of the image's area
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width to height, log-uniform
    role: Literal["teacher", "student", "both"] = "both"
    augment: Augment = Field(default_factory=lambda: Augment.model_validate("weak"))

    @model_validator(mode="after")
    def _possible(self) -> View:
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale: {self.scale} is no range of shares between 0 and 1, smaller one first")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"ratio: {self.ratio} is no range of positive numbers, smaller one first")
        return self

    def blur(self, copy: int) -> float:
        """Probability that the copy of this index is blurred."""
        return self.augment.blur[min(copy, len(self.augment.blur) - 1)]

    def solarize(self, copy: int) -> float:
        """Probability that the copy of this index is solarised."""
        return self.augment.solarize[min(copy, len(self.augment.solarize) - 1)]

    @property
    def sigma(self) -> tuple[float, float]:
        """Range of the blur's standard deviation in pixels of the crop.

        The papers blur crops of 224 and of 96 pixels with one and the same range of pixels, and so do we from 96
        pixels up. Smaller crops get it in proportion to their size: a sigma of 2 would leave nothing of 24 pixels.
        """
        share = min(1.0, self.size / BLUR_REFERENCE)
        return self.augment.blur_sigma[0] * share, self.augment.blur_sigma[1] * share


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
    dali_threads: int = Field(default=1, ge=1)
    stall: float = Field(default=600.0, gt=0)  # seconds without a batch after which the run stops and says why
    deadline: float = Field(default=300.0, gt=0)  # seconds over all tries of one read from a server
    cache: CacheConfig | None = None
    take_up: Literal["epoch", "never"] | int = "epoch"  # new shards: at the next epoch, never, or at this position
    mixture_from: int | None = Field(default=None, ge=0)  # position from which weights hold that were changed
