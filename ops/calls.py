"""How an export is loaded: the arguments with which timm builds the network that takes it, and a line for each format.

The arguments go into the metadata of every export, beside the mean and deviation of the pixels that the network was
trained on: timm's own defaults for these names are other ones (0.5).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from torch import nn

from ..models.measures import ResNetMeasures, measure
from ..models.student import StudentConfig
from .detectors import DETECTORS
from .recipe import Recipe

Format = Literal["timm", "huggingface", "onnx", "torch-export", "detectron2", "mmdetection", "official", "card"]
FORMATS: tuple[Format, ...] = get_args(Format)
PROGRAM = "['class_token', 'patch_tokens'], {'images': images}"  # what it gives and takes


def describe(recipe: Recipe, backbone: nn.Module, size: tuple[int, int] | None = None) -> dict[str, str]:
    """Metadata of an export: recipe, and how timm builds the network that takes it."""
    from ..pipeline.augment.colour import MEAN, STD

    return {
        "gristmill.recipe": recipe.name,
        "gristmill.model": recipe.student.backbone,
        "gristmill.arguments": json.dumps(timm_arguments(recipe.student, size, backbone)),
        "gristmill.mean": json.dumps(MEAN),
        "gristmill.std": json.dumps(STD),
    }


def timm_arguments(
    config: StudentConfig, size: tuple[int, int] | None = None, backbone: nn.Module | None = None
) -> dict[str, Any]:
    """What `timm.create_model(config.backbone, ...)` wants besides its name to build the same backbone.

    backbone: the network, of which a ResNet's measures are read where they are not as named.
    """
    if config.resnet:
        measures = None if backbone is None else measure(backbone.state_dict())
        if not isinstance(measures, ResNetMeasures) or (config.depth is None and config.embed_dim is None):
            return {"num_classes": 0}
        return {"num_classes": 0, "layers": list(measures.blocks), "channels": list(measures.inner)}
    given = {
        "patch_size": config.patch_size,
        "embed_dim": config.embed_dim,
        "depth": config.depth,
        "num_heads": config.heads,
    }
    arguments: dict[str, Any] = {
        "num_classes": 0,
        "img_size": list(size) if size else config.image_size,
        "dynamic_img_size": True,
    }
    return arguments | {key: value for key, value in given.items() if value is not None}


def call(metadata: Mapping[str, str], path: Path | str) -> str:
    """The line of Python that loads an export with timm."""
    arguments = ", ".join(f"{key}={value!r}" for key, value in json.loads(metadata["gristmill.arguments"]).items())
    return f"timm.create_model({metadata['gristmill.model']!r}, checkpoint_path={str(path)!r}, {arguments})"


def usage(format: Format, metadata: Mapping[str, str], path: Path) -> list[str]:
    """Lines that say how what was written is loaded."""
    if format in DETECTORS:
        return json.loads(metadata["gristmill.settings"])
    lines: dict[str, list[str]] = {
        "timm": [call(metadata, path)],
        "huggingface": [f"transformers.AutoModel.from_pretrained({str(path)!r})"],
        "onnx": [f"onnxruntime.InferenceSession({str(path)!r}).run({PROGRAM})"],
        "torch-export": [f"torch.export.load({str(path)!r}).module()(images)['class_token']"],
        "official": ["its names are the official Mugs code's"],
    }
    return lines.get(format, [])
