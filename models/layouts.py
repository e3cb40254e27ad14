"""Names of weights: what the official Mugs, DINO and iBOT code calls them, and what we and timm do.

A backbone is the same plain ViT everywhere, under timm's names, in wrappers that add prefixes: `module.` (DDP),
`backbone.` (their multi-crop wrapper), `encoder.`. The rest differs (reference/mugs.md, section 9). Each name belongs to
one group, so that a report can account for every tensor of a file.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import timm
from torch import Tensor

WRAPPERS = re.compile(r"(?:(?:_orig_mod|module|backbone|encoder)\.)+")
# (their name without wrappers, group, our name or None for what a student has no place for)
RULES: tuple[tuple[re.Pattern[str], str, str | None], ...] = tuple(
    (re.compile(pattern), group, name)
    for pattern, group, name in (
        (r"((?:cls_token|pos_embed)|(?:patch_embed|blocks|norm)\..+)", "backbone", r"backbone.\1"),
        (r"(?:relation_blocks\.0|relation)\.(.+)", "relation_blocks", r"relation.\1"),
        (r"(?:heads\.)?(instance|local_group|group|patch)(?:_head)?\.(projector\..+)", "projectors", r"heads.\1.\2"),
        (r"(?:heads\.)?(instance|local_group)(?:_head)?\.(predictor\..+)", "predictors", r"heads.\1.\2"),
        (r"(?:heads\.)?(group|patch)(?:_head)?\.(last_layer2?\.weight_[gv])", "last_layer", r"heads.\1.\2"),
        (r"head\.mlp\.(.+)", "projectors", r"heads.group.projector.\1"),
        # iBOT's last_layer2 is for patches; in its shared head it is last_layer once more.
        (r"head\.(last_layer2?\.weight_[gv])", "last_layer", r"heads.group.\1"),
        (r"masked_embed|mask_token", "mask_token", r"backbone.mask_token"),
        (r"(?:head|fc|classifier)\.(?:weight|bias)", "classifier", None),
    )
)
# What a plain ViT does not have and another ViT cannot do without: to leave it out would change every feature.
ALTERS = re.compile(r"(reg_token|register_tokens|storage_tokens|norm_pre\.|attn_pool\.|rope|cls_pos)")
PARAMETRISED = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}
SIZES = {(192, 12): "tiny", (384, 12): "small", (768, 12): "base", (1024, 24): "large", (1280, 32): "huge"}


def place(key: str) -> tuple[str, str | None]:
    """(group, our name) of a name in a file; the group is "other" and the name None for what nobody here knows."""
    bare = WRAPPERS.sub("", key, count=1) if WRAPPERS.match(key) else key
    for theirs, ours in PARAMETRISED.items():
        bare = bare.replace(theirs, ours)
    for pattern, group, name in RULES:
        if match := pattern.fullmatch(bare):
            return group, None if name is None else match.expand(name)
    return "other", None


def official_name(name: str) -> str:
    """Our name to Mugs' own (iBOT's for the mask token), as a teacher has it; a student's have `module.` before."""
    if name == "backbone.mask_token":
        return "backbone.masked_embed"
    if name.startswith("backbone."):
        return name
    if name.startswith("relation."):
        return name.replace("relation.", "backbone.relation_blocks.0.", 1)
    _, head, rest = name.split(".", 2)
    return f"{head}_head.{rest}"


@dataclass(frozen=True)
class Measures:
    """What the shapes of a ViT's weights tell. They do not tell the number of attention heads."""

    width: int
    depth: int
    patch: int
    hidden: int  # width of the MLPs
    tokens: int  # rows of the position embedding, class token included

    @property
    def timm_name(self) -> str | None:
        """timm's name of a plain ViT of these measures, if it has one."""
        name = f"vit_{SIZES.get((self.width, self.depth))}_patch{self.patch}_224"
        return name if self.hidden == 4 * self.width and timm.is_model(name) else None

    def __str__(self) -> str:
        named = f", timm's {self.timm_name}" if self.timm_name else ""
        return f"a ViT of width {self.width}, {self.depth} blocks, patches of {self.patch} pixels{named}"


def measure(backbone: Mapping[str, Tensor]) -> Measures | None:
    """Measures of a backbone under timm's names; None if it lacks what would tell them."""
    try:
        width, _, patch, _ = backbone["patch_embed.proj.weight"].shape
        tokens = backbone["pos_embed"].shape[1]
        hidden = backbone["blocks.0.mlp.fc1.weight"].shape[0]
    except (KeyError, ValueError, IndexError):
        return None
    numbers = {int(m[1]) for name in backbone if (m := re.match(r"blocks\.(\d+)\.", name))}
    return Measures(width, max(numbers) + 1, patch, hidden, tokens)


def plain_shapes(measures: Measures) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a plain ViT's weights, timm's."""
    d, h, p = measures.width, measures.hidden, measures.patch
    block: dict[str, tuple[int, ...]] = {
        "norm1.weight": (d,), "norm1.bias": (d,), "attn.qkv.weight": (3 * d, d), "attn.qkv.bias": (3 * d,),
        "attn.proj.weight": (d, d), "attn.proj.bias": (d,), "norm2.weight": (d,), "norm2.bias": (d,),
        "mlp.fc1.weight": (h, d), "mlp.fc1.bias": (h,), "mlp.fc2.weight": (d, h), "mlp.fc2.bias": (d,),
    }  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, d), "pos_embed": (1, measures.tokens, d), "patch_embed.proj.weight": (d, 3, p, p),
        "patch_embed.proj.bias": (d,), "norm.weight": (d,), "norm.bias": (d,),
    }  # fmt: skip
    return shapes | {f"blocks.{i}.{key}": shape for i in range(measures.depth) for key, shape in block.items()}


def alterations(keys: Iterable[str]) -> list[str]:
    """Names that show a ViT to be another than the plain one."""
    return [key for key in keys if place(key)[0] == "other" and ALTERS.search(key)]
