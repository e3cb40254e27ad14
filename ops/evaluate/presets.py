"""The papers' settings of the probes that train, to be named instead of retyped.

Sources: the official code of Mugs (sail-sg/mugs at 10ab634, the scripts under eval/), whose fine-tuning is BEiT's and whose
sweep is iBOT's, and of DINO (facebookresearch/dino at 7c446df, eval_linear.py). All are for ImageNet unless their name
says otherwise; what our probes do otherwise, docs/evaluate.md says.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .finetune import FinetuneOptions
from .linear import LinearOptions

if TYPE_CHECKING:
    from .subject import Subject

_SWEEP = tuple(n * 10.0**k for k in range(-4, 0) for n in range(1, 10))  # iBOT's 36 rates

LINEAR: dict[str, LinearOptions] = {
    "dino_s": LinearOptions(batch=1024, rates=(0.001,), blocks=4, augment="crop"),
    "dino_b": LinearOptions(batch=1024, rates=(0.001,), blocks=1, average=True, augment="crop"),
    # Mugs trains its probes on strongly altered crops, by the epochs of pretraining: 100, 300, 800 for ViT-S.
    "mugs_s_100": LinearOptions(batch=1024, rates=(0.015,), min_rate=1e-5, blocks=4, augment="strong"),
    "mugs_s_300": LinearOptions(batch=1024, rates=(0.02,), blocks=4, augment="strong"),
    "mugs_s_800": LinearOptions(batch=1024, rates=(0.01,), blocks=4, augment="strong"),
    "mugs_b": LinearOptions(batch=512, rates=(0.002,), min_rate=1e-5, blocks=1, average=True, augment="strong"),
    "mugs_l": LinearOptions(
        batch=1024,
        rates=_SWEEP,
        weight_decays=(0.0, 1e-6, 1e-5, 1e-4, 1e-3),
        min_rate=1e-5,
        blocks=1,
        average=True,
        augment="strong",
    ),
}


def _semi() -> FinetuneOptions:
    # The code's lowest rate, 1e-5, lies above its highest at a batch of 512, 5e-6: its cosine climbs. Ours ends at 1e-6.
    return FinetuneOptions(
        epochs=1000, batch=512, rate=5e-6, rate_per=512, warmup_epochs=5, layer_decay=1.0, drop_path=0.1, head_scale=1.0
    )


def _transfer(
    rate: float, *, weight_decay: float = 0.05, epochs: int = 1000, drop_path: float = 0.1
) -> FinetuneOptions:
    return FinetuneOptions(
        epochs=epochs,
        batch=768,
        rate=rate,
        rate_per=512,
        warmup_epochs=5,
        weight_decay=weight_decay,
        layer_decay=1.0,
        drop_path=drop_path,
        erase=0.1,
        head_scale=1.0,
    )


FINETUNE: dict[str, FinetuneOptions] = {
    "vit_s": FinetuneOptions(epochs=200, drop_path=0.1),
    "vit_b": FinetuneOptions(epochs=100, drop_path=0.2),
    "vit_l": FinetuneOptions(epochs=50, batch=512, rate=8e-4, warmup_epochs=5, layer_decay=0.75, drop_path=0.3),
    "semi_s": _semi(),
    "cifar10_s": _transfer(3e-6),
    "cifar100_s": _transfer(7.5e-6, weight_decay=0.02),
    "inat18_s": _transfer(3e-5, epochs=360),
    "inat19_s": _transfer(7.5e-5, epochs=360),
    "flowers_s": _transfer(7.5e-5),
    "cars_s": _transfer(1.5e-4),
    "cifar10_b": _transfer(7.5e-6),
    "cifar100_b": _transfer(7.5e-6),
    "inat18_b": _transfer(1.5e-5, epochs=360),
    "inat19_b": _transfer(3e-5, epochs=360),
    "flowers_b": _transfer(7.5e-5),
    "cars_b": _transfer(1.5e-4, drop_path=0.3),
}


def finetune_preset(subject: Subject) -> FinetuneOptions:
    """Mugs' settings for the ViT whose width is nearest: S up to 384, B up to 768, L beyond."""
    return FINETUNE["vit_s" if subject.width <= 384 else "vit_b" if subject.width <= 768 else "vit_l"]


def presets_of(evaluator: str) -> dict[str, Any]:
    """The presets of an evaluator, by name; none for most."""
    if evaluator == "linear":
        return dict(LINEAR)
    if evaluator in ("finetune", "semi_finetune"):
        return dict(FINETUNE)
    if evaluator == "video":
        from . import video

        return {"dino": video.DINO, "mugs": video.MUGS}
    if evaluator == "detection":
        from . import detection

        return {"mugs": detection.MUGS, "densecl": detection.DENSECL}
    return {}
