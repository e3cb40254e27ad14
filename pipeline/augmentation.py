"""Chances and ranges of one augmentation, spelled out or taken from a preset by name.

Augment is the weak family (crop, flip, colour jitter, grey, blur, solarise); Strong adds RandAugment and random erasing
as Mugs' student sees them. The numbers of the presets are those of the papers and of their official code: "weak" is
DINO's (Caron et al. 2021, main_dino.py), which Mugs, MoCo v3 and BYOL (Grill et al. 2020, appendix B) share, "moco-v1"
and "moco" MoCo's (main_moco.py with and without --aug-plus), "simclr" Chen et al.'s (2020, appendix A, strength 1), which
SwAV takes over (facebookresearch/swav, src/multicropdataset.py), and "npid" Wu et al.'s (2018).
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from ..shards.errors import nearest

Probability = Annotated[float, Field(ge=0, le=1)]

# What a preset changes in the defaults of Augment. A list of probabilities has one entry for each copy of the view.
PRESETS: dict[str, dict[str, Any]] = {
    "weak": {"blur": [1.0, 0.1], "solarize": [0.0, 0.2]},
    "weak-local": {"blur": [0.5], "solarize": [0.0]},
    "moco": {"saturation": 0.4, "blur": [0.5], "solarize": [0.0]},
    "moco-v1": {"jitter_p": 1.0, "saturation": 0.4, "hue": 0.4},
    "simclr": {"brightness": 0.8, "contrast": 0.8, "saturation": 0.8, "hue": 0.2, "blur": [0.5]},
    "none": {"crop": "centre", "flip": 0.0, "jitter_p": 0.0, "grey": 0.0, "blur": [0.0], "solarize": [0.0]},
}
# What a preset changes in the defaults of Strong.
STRONG_PRESETS: dict[str, dict[str, Any]] = {
    "mugs": {},  # sail-sg/mugs, src/multicropdataset.py: rand-m9-mstd0.5-inc1, re_prob 0.25
    "mugs-normalised": {"erase_noise": "normalised"},  # the same without its prefetcher
    # HobbitLong/PyContrast (the InfoMin paper's code, arXiv 2005.10243), pycontrast/datasets/util.py, --aug D: SimCLR's
    # jitter and blur, RandAugment rand-n2-m10-mstd0.5, grey. There RandAugment acts on the crop, after the blur and before
    # grey, and pulls in the mean colour from the crop's own edge; here on the image, before the crop, and colours and blur
    # come after it, in the order of all our augmentations. Its blur is cut at 11 pixels, ours is not.
    "infomin": {
        **{
            "jitter_p": 0.8,
            "brightness": 0.8,
            "contrast": 0.8,
            "saturation": 0.8,
            "hue": 0.2,
            "grey": 0.2,
            "blur": [0.5],
        },
        **{"replacement": True, "magnitude": 10.0, "increasing": False, "erase": 0.0},
    },
}

BLUR_REFERENCE = 96  # pixels; see Augment.sigma


class Augment(BaseModel):
    """Chances and ranges of one augmentation. Applied in the order of the fields, normalisation last.

    Brightness, contrast and saturation are factors drawn from [1 - v, 1 + v] (not below 0), hue is a shift drawn from
    [-v, v] in turns of the colour circle: torchvision.transforms.ColorJitter's meaning of the same numbers.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    presets: ClassVar[dict[str, dict[str, Any]]] = PRESETS

    crop: Literal["random", "centre"] = "random"  # centre: the largest square in the middle, no draw
    flip: Probability = 0.5
    jitter_p: Probability = 0.8  # of the four that follow, together
    brightness: float = Field(default=0.4, ge=0)
    contrast: float = Field(default=0.4, ge=0)
    saturation: float = Field(default=0.2, ge=0)
    hue: float = Field(default=0.1, ge=0, le=0.5)
    grey: Probability = 0.2
    blur: list[Probability] = Field(default=[0.0], min_length=1)  # for each copy of the view; the last one repeats
    blur_sigma: tuple[float, float] = (0.1, 2.0)  # pixels of the crop; see sigma()
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
        if name not in cls.presets:
            hint = nearest(name, cls.presets)
            raise ValueError(f"no augmentation {name!r}: {hint}there are {', '.join(cls.presets)}")
        return cls.presets[name] | own

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

    def sigma(self, size: int) -> tuple[float, float]:
        """Range of the blur's standard deviation in pixels of a crop of `size` pixels.

        The papers blur crops of 224 and of 96 pixels with one and the same range of pixels, and so do we from 96
        pixels up. Smaller crops get it in proportion to their size: a sigma of 2 would leave nothing of 24 pixels.
        """
        share = min(1.0, size / BLUR_REFERENCE)
        return self.blur_sigma[0] * share, self.blur_sigma[1] * share


class Strong(Augment):
    """RandAugment on the whole image before the crop, random erasing on the crop after it; no jitter unless asked for.

    The defaults are Mugs': two of the 15 operations (strong.OPERATIONS) without replacement, each with probability 0.5,
    all at a magnitude of N(9, 0.5) cut to 0 ... 10, as timm's rand-m9-mstd0.5-inc1. timm itself draws with replacement.
    """

    presets: ClassVar[dict[str, dict[str, Any]]] = STRONG_PRESETS

    jitter_p: Probability = 0.0
    grey: Probability = 0.0
    operations: int = Field(default=2, ge=0, le=2)  # that are chosen
    operation_p: Probability = 0.5  # of each chosen one
    replacement: bool = False  # whether one operation can be chosen twice
    magnitude: float = Field(default=9.0, ge=0, le=10)  # mean
    magnitude_std: float = Field(default=0.5, ge=0)
    # Whether operations get stronger with the magnitude (timm's "inc1", Mugs), or as in the first RandAugment: enhancing
    # factors from 0.1 to 1.9, fewer bits and values inverted the lower it is.
    increasing: bool = True
    erase: Probability = 0.25  # of one box of noise
    erase_area: tuple[float, float] = (0.02, 1 / 3)  # share of the crop
    erase_ratio: tuple[float, float] = (0.3, 1 / 0.3)  # height to width, log-uniform
    # Noise of N(0, 1) takes the place of values in 0 ... 1, which are then normalised (raw: Mugs with its prefetcher,
    # its default), or of normalised values (normalised: what timm's RandomErasing is meant for).
    erase_noise: Literal["raw", "normalised"] = "raw"

    @model_validator(mode="after")
    def _possible_strong(self) -> Strong:
        if self.crop != "random":
            raise ValueError("crop: a strong augmentation cuts at random; leave crop out")
        if not 0 < self.erase_area[0] <= self.erase_area[1] <= 1:
            raise ValueError(f"erase_area: {self.erase_area} is no range of shares between 0 and 1, smaller one first")
        if not 0 < self.erase_ratio[0] <= self.erase_ratio[1]:
            raise ValueError(f"erase_ratio: {self.erase_ratio} is no range of positive numbers, smaller one first")
        return self
