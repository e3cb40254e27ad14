"""A backbone as a folder that `transformers.AutoModel.from_pretrained` takes: a ViTModel or a ResNetModel.

Names are those of the files on the Hugging Face hub (transformers' modeling_vit.py and modeling_resnet.py, and the names
that its 5.x still writes): query, key and value apart, each read as a third of our joined `qkv`. A ViTModel has a pooler, a
layer that these networks do not have: it is written as the identity without activation, so that `pooler_output` is the
class token and nothing is drawn at random. Pictures are prepared as our probes do it: the whole middle square.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..models.measures import ResNetMeasures, measure
from ..pipeline.augment.colour import MEAN, STD
from .exported import ExportError, published_folder, write_tensors, write_text
from .origin import Origin

FILES = ("config.json", "model.safetensors", "preprocessor_config.json", "README.md")
BILINEAR = 2  # PIL's number; as our probes do it
EPS = 1e-5  # transformers' ResNet takes no other epsilon of its batch norms
POOLER = ("pooler.dense.weight", "pooler.dense.bias")
QKV = re.compile(r"blocks\.(\d+)\.attn\.qkv\.(weight|bias)")
_VIT = (
    (r"cls_token", "embeddings.cls_token"),
    (r"norm\.(.+)", r"layernorm.\1"),
    (r"pos_embed", "embeddings.position_embeddings"),
    (r"patch_embed\.proj\.(.+)", r"embeddings.patch_embeddings.projection.\1"),
    (r"blocks\.(\d+)\.norm1\.(.+)", r"encoder.layer.\1.layernorm_before.\2"),
    (r"blocks\.(\d+)\.norm2\.(.+)", r"encoder.layer.\1.layernorm_after.\2"),
    (r"blocks\.(\d+)\.attn\.proj\.(.+)", r"encoder.layer.\1.attention.output.dense.\2"),
    (r"blocks\.(\d+)\.mlp\.fc1\.(.+)", r"encoder.layer.\1.intermediate.dense.\2"),
    (r"blocks\.(\d+)\.mlp\.fc2\.(.+)", r"encoder.layer.\1.output.dense.\2"),
)


def names_of(name: str) -> list[str]:
    """timm's name of a backbone's weight to transformers': three of a `qkv` (query, key, value), one of any other."""
    if match := QKV.fullmatch(name):
        layer = f"encoder.layer.{match[1]}.attention.attention."
        return [f"{layer}{each}.{match[2]}" for each in ("query", "key", "value")]
    for pattern, theirs in _VIT:
        if match := re.fullmatch(pattern, name):
            return [match.expand(theirs)]
    return [_resnet_name(name)]


def _resnet_name(name: str) -> str:
    if match := re.fullmatch(r"(conv|bn)1\.(.+)", name):
        return f"embedder.embedder.{_kind(match[1])}.{match[2]}"
    if match := re.fullmatch(r"layer(\d)\.(\d+)\.downsample\.([01])\.(.+)", name):
        part = _kind("bn" if match[3] == "1" else "conv")
        return f"encoder.stages.{int(match[1]) - 1}.layers.{match[2]}.shortcut.{part}.{match[4]}"
    if match := re.fullmatch(r"layer(\d)\.(\d+)\.(conv|bn)(\d)\.(.+)", name):
        layer = f"encoder.stages.{int(match[1]) - 1}.layers.{match[2]}.layer.{int(match[4]) - 1}"
        return f"{layer}.{_kind(match[3])}.{match[5]}"
    raise ExportError(f"transformers has no place for {name}; export it with --format timm")


def _kind(part: str) -> str:
    return "normalization" if part == "bn" else "convolution"


def configuration(weights: Mapping[str, Tensor], backbone: Any, size: tuple[int, int], name: str) -> dict[str, Any]:
    """config.json. weights: under timm's names, meta will do; name: of the backbone, for the ExportError if none fits."""
    measures = measure(weights)
    if measures is None or measures.shapes() != {key: tuple(value.shape) for key, value in weights.items()}:
        raise ExportError(
            f"transformers' ViTModel is the plain ViT and its ResNetModel torchvision's, and {name} is neither; "
            "export it with --format timm"
        )
    if isinstance(measures, ResNetMeasures):
        return _resnet_configuration(measures, backbone, name)
    return {
        "architectures": ["ViTModel"],
        "model_type": "vit",
        "hidden_size": measures.width,
        "num_hidden_layers": measures.depth,
        "num_attention_heads": backbone.heads,
        "intermediate_size": measures.hidden,
        "hidden_act": "gelu",  # the exact one, as timm's
        "layer_norm_eps": backbone.norm.eps,  # transformers' default is another one
        "image_size": size[0] if size[0] == size[1] else list(size),
        "patch_size": measures.patch,
        "num_channels": 3,
        "qkv_bias": True,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "pooler_act": "linear",
        "pooler_output_size": measures.width,
    }


def _resnet_configuration(measures: ResNetMeasures, backbone: nn.Module, name: str) -> dict[str, Any]:
    narrowed = 4 if measures.bottleneck else 1  # transformers' bottlenecks are a quarter as wide inside, all of them
    epsilons = {part.eps for part in backbone.modules() if hasattr(part, "running_mean")}
    if any(inner * narrowed != outer for inner, outer in zip(measures.inner, measures.outer, strict=True)):
        raise ExportError(
            f"transformers' ResNetModel has no blocks as wide as those of {name}; export it with --format timm"
        )
    if epsilons != {EPS}:
        raise ExportError(f"transformers' ResNetModel has batch norms of epsilon {EPS}, and {name} has {epsilons}")
    return {
        "architectures": ["ResNetModel"],
        "model_type": "resnet",
        "num_channels": 3,
        "embedding_size": measures.stem,
        "hidden_sizes": list(measures.outer),
        "depths": list(measures.blocks),
        "layer_type": "bottleneck" if measures.bottleneck else "basic",
        "hidden_act": "relu",
        "downsample_in_first_stage": False,
        "downsample_in_bottleneck": False,  # the stride is in the 3x3 convolution
    }


def preprocessing(size: tuple[int, int]) -> dict[str, Any]:
    """preprocessor_config.json: the whole middle square, or of an oblong size the whole image, and ImageNet's pixels."""
    height, width = size
    square = height == width
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": height} if square else {"height": height, "width": width},
        "resample": BILINEAR,
        "do_center_crop": square,
        "crop_size": {"height": height, "width": width},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(MEAN),
        "image_std": list(STD),
    }


def write_huggingface(origin: Origin, out: str | Path, about: Mapping[str, str], card: str) -> Path:
    """The folder, complete or absent, its weights written one tensor at a time. card: what README.md says.

    Raises ExportError for a folder that exists and for a network that transformers has no class for.
    """
    weights = origin.shapes()
    config = configuration(weights, origin.backbone, origin.image_size, origin.config.backbone)
    sources: dict[str, tuple[str, int, int]] = {}
    for name in weights:
        theirs = names_of(name)
        sources |= {each: (f"backbone.{name}", part, len(theirs)) for part, each in enumerate(theirs)}
    announced: dict[str, Tensor] = {}
    for theirs, (ours, _, of) in sources.items():
        whole = origin.announced(ours)
        announced[theirs] = whole.new_empty((whole.shape[0] // of, *whole.shape[1:])) if of > 1 else whole
    if config["model_type"] == "vit":
        width, like = config["hidden_size"], announced["layernorm.weight"]
        announced |= {POOLER[0]: like.new_empty(width, width), POOLER[1]: like.new_empty(width)}
    config["dtype"] = str(next(iter(announced.values())).dtype).removeprefix("torch.")

    def read(name: str) -> Tensor:
        if name in POOLER:
            shape, kind = announced[name].shape, announced[name].dtype
            return torch.eye(shape[0], dtype=kind) if name == POOLER[0] else torch.zeros(shape, dtype=kind)
        ours, part, of = sources[name]
        return origin.read(ours, part, of)

    with published_folder(out, FILES) as folder:
        write_tensors(folder / "model.safetensors", announced, about, read)
        write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")
        write_text(folder / "preprocessor_config.json", json.dumps(preprocessing(origin.image_size), indent=2) + "\n")
        write_text(folder / "README.md", card)
    return Path(out)
