"""Names of backbones in detectron2 and in OpenMMLab's code, there and back.

detectron2 calls torchvision's stages res2 to res5, keeps the first convolution in a stem and each norm inside the convolution
that it follows (its tools/convert-torchvision-to-d2.py, checked against that); its ViT has timm's names, as ViTDet
reads MAE's files. mmdetection's ResNet has torchvision's names; OpenMMLab's ViT is mmpretrain's, which mmdetection
takes as `mmpretrain.VisionTransformer` (its tools/model_converters/vit_to_mmpretrain.py).
"""

import re

_MMPRETRAIN = (
    (r"patch_embed\.projection\.(.+)", r"patch_embed.proj.\1"),
    (r"layers\.(\d+)\.ln([12])\.(.+)", r"blocks.\1.norm\2.\3"),
    (r"layers\.(\d+)\.(attn\..+)", r"blocks.\1.\2"),
    (r"layers\.(\d+)\.ffn\.layers\.0\.0\.(.+)", r"blocks.\1.mlp.fc1.\2"),
    (r"layers\.(\d+)\.ffn\.layers\.1\.(.+)", r"blocks.\1.mlp.fc2.\2"),
    (r"ln1\.(.+)", r"norm.\1"),
)
_TO_MMPRETRAIN = (
    (r"patch_embed\.proj\.(.+)", r"patch_embed.projection.\1"),
    (r"blocks\.(\d+)\.norm([12])\.(.+)", r"layers.\1.ln\2.\3"),
    (r"blocks\.(\d+)\.(attn\..+)", r"layers.\1.\2"),
    (r"blocks\.(\d+)\.mlp\.fc1\.(.+)", r"layers.\1.ffn.layers.0.0.\2"),
    (r"blocks\.(\d+)\.mlp\.fc2\.(.+)", r"layers.\1.ffn.layers.1.\2"),
    (r"norm\.(.+)", r"ln1.\1"),
)
_DETECTRON2 = (
    (r"(?:stem\.)?conv1\.norm\.(.+)", r"bn1.\1"),
    (r"stem\.conv1\.weight", r"conv1.weight"),
    (r"layer(\d)\.(\d+)\.conv(\d)\.norm\.(.+)", r"layer\1.\2.bn\3.\4"),
    (r"layer(\d)\.(\d+)\.shortcut\.norm\.(.+)", r"layer\1.\2.downsample.1.\3"),
    (r"layer(\d)\.(\d+)\.shortcut\.weight", r"layer\1.\2.downsample.0.weight"),
)
_TO_DETECTRON2 = (
    (r"bn1\.(.+)", r"stem.conv1.norm.\1"),
    (r"conv1\.weight", r"stem.conv1.weight"),
    (r"layer(\d)\.(\d+)\.bn(\d)\.(.+)", r"layer\1.\2.conv\3.norm.\4"),
    (r"layer(\d)\.(\d+)\.downsample\.1\.(.+)", r"layer\1.\2.shortcut.norm.\3"),
    (r"layer(\d)\.(\d+)\.downsample\.0\.weight", r"layer\1.\2.shortcut.weight"),
)


def detectron2_name(name: str) -> str:
    """timm's name of a backbone's weight to detectron2's. A ViT's are the same."""
    return re.sub(r"^layer(\d)\.", lambda match: f"res{int(match[1]) + 1}.", _renamed(name, _TO_DETECTRON2))


def openmmlab_name(name: str) -> str:
    """timm's name of a backbone's weight to mmdetection's (ResNet: the same) or mmpretrain's (ViT)."""
    return _renamed(name, _TO_MMPRETRAIN)


def from_detectors(name: str) -> str:
    """A name of either's to timm's; one that is neither's stays."""
    staged = re.sub(r"^res([2-5])\.", lambda match: f"layer{int(match[1]) - 1}.", name)
    return _renamed(staged, _DETECTRON2 + _MMPRETRAIN)


def _renamed(name: str, rules: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in rules:
        if match := re.fullmatch(pattern, name):
            return match.expand(replacement)
    return name
