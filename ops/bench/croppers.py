"""What others would write for the same crops: torchvision's transforms over PIL images, and over uint8 tensors.

Same sizes, scales, filters, probabilities and order as our views; random numbers are torchvision's own. The PIL form is
that of the official DINO and Mugs code (blur by PIL, RandAugment and erasing by timm, on the full-size image); the
tensor form is the fastest that torchvision v2 offers on a CPU: libjpeg-turbo, channels last, antialiased uint8 resize,
floats only at the end.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image, ImageFilter
from timm.data.auto_augment import rand_augment_transform
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torchvision import transforms as v1
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import v2

from ...pipeline.augment.colour import MEAN, STD
from ...pipeline.views import View

Crops = Callable[[Any], list[Tensor]]  # one image -> every view's crops, [n, 3, H, W] each
_FILL = (124, 116, 104)
_WINDOW = 9  # of a blur of any sigma, as in DINOv2's code: what does not reach as far as 3 sigma, but is faster


class PilBlur:
    """DINO's GaussianBlur: PIL's, which is three box blurs."""

    def __init__(self, sigma: tuple[float, float]) -> None:
        self.sigma = sigma

    def __call__(self, image: Any) -> Any:
        return image.filter(ImageFilter.GaussianBlur(random.uniform(*self.sigma)))


class PilRandAugment:
    """timm's. At magnitude 10 it asks Posterize to keep no bit, which Pillow refuses since 13; before, it gave black."""

    def __init__(self) -> None:
        self.transform = rand_augment_transform("rand-m9-mstd0.5-inc1", {"img_mean": _FILL})

    def __call__(self, image: Any) -> Any:
        try:
            return self.transform(image)
        except ValueError as error:
            if "bits" not in str(error):
                raise
            return Image.new("RGB", image.size)


def crops_of_pil(views: Sequence[View]) -> Crops:
    """For a PIL image."""
    forms = [(v, [_pil_weak(v, copy) for copy in range(v.count)], _pil_strong(v)) for v in views]
    return lambda image: _all(image, forms)


def crops_of_tensor(views: Sequence[View]) -> Crops:
    """For encoded bytes, uint8 [n]."""
    forms = [(v, [_tensor_weak(v, copy) for copy in range(v.count)], _tensor_strong(v)) for v in views]
    return lambda data: _all(decode_image(data, ImageReadMode.RGB), forms)


def _all(image: Any, forms: list[tuple[View, list[Any], Any]]) -> list[Tensor]:
    coin = random.random()  # of the image; a view's own where it has one a crop
    found = []
    for view, weak, strong in forms:
        crops = []
        for transform in weak:
            toss = coin if view.coin == "image" else random.random()
            crops.append((transform if strong is None or toss < view.weak_p else strong)(image))
        found.append(torch.stack(crops))
    return found


def _pil_weak(view: View, copy: int) -> Any:
    a = view.augment
    steps: list[Any] = [
        v1.RandomResizedCrop(view.size, view.scale, view.ratio, v1.InterpolationMode(view.filter)),
        v1.RandomHorizontalFlip(a.flip),
        v1.RandomApply([v1.ColorJitter(a.brightness, a.contrast, a.saturation, a.hue)], a.jitter_p),
        v1.RandomGrayscale(a.grey),
        v1.RandomApply([PilBlur(view.sigma)], view.blur(copy)),
        v1.RandomSolarize(a.solarize_threshold, view.solarize(copy)),
    ]
    return v1.Compose([*steps, v1.ToTensor(), v1.Normalize(MEAN, STD)])


def _pil_strong(view: View) -> Any:
    if view.strong is None:
        return None
    return v1.Compose(
        [
            v1.RandomHorizontalFlip(view.augment.flip),
            PilRandAugment(),
            v1.RandomResizedCrop(view.size, view.scale, view.ratio, v1.InterpolationMode(view.filter)),
            v1.ToTensor(),
            v1.Normalize(MEAN, STD),
            RandomErasing(view.strong.erase, mode="pixel", device="cpu"),
        ]
    )


def _tensor_weak(view: View, copy: int) -> Any:
    a = view.augment
    steps: list[Any] = [
        v2.RandomResizedCrop(view.size, view.scale, view.ratio, v2.InterpolationMode(view.filter), antialias=True),
        v2.RandomHorizontalFlip(a.flip),
        v2.RandomApply([v2.ColorJitter(a.brightness, a.contrast, a.saturation, a.hue)], a.jitter_p),
        v2.RandomGrayscale(a.grey),
        v2.RandomApply([v2.GaussianBlur(_WINDOW, list(view.sigma))], view.blur(copy)),
        v2.RandomSolarize(a.solarize_threshold, view.solarize(copy)),
    ]
    return v2.Compose([*steps, v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(MEAN), list(STD))])


def _tensor_strong(view: View) -> Any:
    if view.strong is None:
        return None
    return v2.Compose(
        [
            v2.RandomHorizontalFlip(view.augment.flip),
            v2.RandAugment(2, 9, fill=list(_FILL)),
            v2.RandomResizedCrop(view.size, view.scale, view.ratio, v2.InterpolationMode(view.filter), antialias=True),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(list(MEAN), list(STD)),
            v2.RandomErasing(view.strong.erase),
        ]
    )
