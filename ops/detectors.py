"""Exports for detectors: a backbone as detectron2 and mmdetection read it, and the settings that go with it.

Both load with torch.load, so what is written is a torch file of tensors and plain containers, which the restricted reader
takes as well; no object is pickled. detectron2 (detection_checkpoint.py): {"model", "__author__", "matching_heuristics"},
the heuristics find the backbone inside any detector by the ends of its names. OpenMMLab (mmengine's PretrainedInit):
{"state_dict", "meta"} under the backbone's own names, for `init_cfg`. Settings matter as much as names: a ResNet that
takes its stride elsewhere, or pixels of another scale, loads without a word and detects badly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, cast, get_args

from torch import Tensor

from ..models.detectors import detectron2_name, openmmlab_name
from ..models.measures import Measures, ResNetMeasures, measure
from ..models.vit import Backbone
from ..pipeline.augment.colour import MEAN, STD
from ..shards.errors import GristmillError

Detector = Literal["detectron2", "mmdetection"]
DETECTORS: tuple[Detector, ...] = get_args(Detector)
DEPTHS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")  # both know these


class DetectorError(GristmillError):
    """A backbone that a detector has no place for."""


def renamed(detector: Detector, name: str) -> str:
    """timm's name of a backbone's weight to the detector's."""
    return detectron2_name(name) if detector == "detectron2" else openmmlab_name(name)


def contents(
    detector: Detector, names: Mapping[str, str], read: Callable[[str], Tensor], about: Mapping[str, str]
) -> dict[str, Any]:
    """What the file holds. names: the detector's to ours; read: gives a tensor by our name; about: kept beside them."""
    weights = {theirs: read(ours).contiguous() for theirs, ours in names.items()}
    if detector == "detectron2":
        return {"model": weights, "__author__": "Gristmill", "matching_heuristics": True, "gristmill": dict(about)}
    return {"state_dict": weights, "meta": {"gristmill": dict(about)}}


def check(detector: Detector, weights: Mapping[str, Tensor], backbone: str) -> Measures | ResNetMeasures:
    """Measures of a backbone (weights under timm's names, meta will do). DetectorError if the detector has none such."""
    measures = measure(weights)
    if measures is None or measures.shapes() != {name: tuple(value.shape) for name, value in weights.items()}:
        raise DetectorError(
            f"{detector} has torchvision's ResNets and the plain ViT, and {backbone} is neither; export it with --format timm"
        )
    if isinstance(measures, ResNetMeasures) and measures.timm_name not in DEPTHS:
        raise DetectorError(
            f"{detector} builds {', '.join(DEPTHS)}, and this is {measures}; export it with --format timm"
        )
    return measures


def settings(detector: Detector, measures: Measures | ResNetMeasures, backbone: Any, path: str, side: int) -> list[str]:
    """Lines for the detector's configuration. backbone: the network; side: pixels for which its positions are stored."""
    mean, std = ([round(255 * value, 3) for value in values] for values in (MEAN, STD))
    if isinstance(measures, ResNetMeasures):
        depth = int((measures.timm_name or "").removeprefix("resnet"))
        if detector == "mmdetection":
            init = f"init_cfg=dict(type='Pretrained', checkpoint={path!r})"
            return [f"backbone=dict(type='ResNet', depth={depth}, style='pytorch', {init})", _pixels(mean, std)]
        lines = [f"MODEL.WEIGHTS {path} MODEL.RESNETS.DEPTH {depth} MODEL.RESNETS.STRIDE_IN_1X1 False"]
        if not measures.bottleneck:
            lines[0] += " MODEL.RESNETS.RES2_OUT_CHANNELS 64"
        return [*lines, f"INPUT.FORMAT RGB MODEL.PIXEL_MEAN {mean} MODEL.PIXEL_STD {std}".replace(", ", ",")]
    heads = cast(Backbone, backbone).heads
    if detector == "detectron2":
        sizes = f"patch_size={measures.patch} embed_dim={measures.width} depth={measures.depth} num_heads={heads}"
        net = " ".join(f"model.backbone.net.{each}" for each in [f"pretrain_img_size={side}", *sizes.split()])
        pixels = f"model.input_format=RGB model.pixel_mean={mean} model.pixel_std={std}".replace(", ", ",")
        return [f"train.init_checkpoint={path} {net}", pixels]
    arch = f"embed_dims={measures.width}, num_layers={measures.depth}, num_heads={heads}"
    return [
        f"backbone=dict(type='mmpretrain.VisionTransformer', arch=dict({arch}, feedforward_channels={measures.hidden}), "
        f"img_size={side}, patch_size={measures.patch}, out_type='featmap', "
        f"init_cfg=dict(type='Pretrained', checkpoint={path!r}))",
        _pixels(mean, std),
    ]


def _pixels(mean: list[float], std: list[float]) -> str:
    return f"data_preprocessor=dict(mean={mean}, std={std}, bgr_to_rgb=True)"
