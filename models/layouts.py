"""Names of weights: what the papers' official code calls them, and what we and timm do.

A backbone is the same plain ViT or ResNet everywhere, under the names of timm (and torchvision), in wrappers that add
prefixes: `module.` (DDP), `backbone.` (the multi-crop wrapper of DINO and its kin), `encoder.` (SimSiam), `trunk.` (VISSL).
The heads differ (reference/mugs.md, section 9; densecl-hcsc.md 1.6, 2.10; facebookresearch/swav, moco-v3, simsiam). Each
name belongs to one group, so that a report can account for every tensor of a file. Files of two networks: pairs.py.
"""

import re
from collections.abc import Iterable

from .detectors import from_detectors

WRAPPERS = re.compile(
    r"(?:(?:_orig_mod|module|model|learner|backbone|encoder|net|convnet|trunk|_feature_blocks|bottom_up)\.)+"
)
LAYER = r"\d+\.(?:weight|bias|running_mean|running_var|num_batches_tracked)"  # of a head that is a list of layers
# (their name without wrappers, group, our name or None for what a student has no place for)
RULES: tuple[tuple[re.Pattern[str], str, str | None], ...] = tuple(
    (re.compile(pattern), group, name)
    for pattern, group, name in (
        (r"((?:cls_token|pos_embed)|(?:patch_embed|blocks|norm)\..+)", "backbone", r"backbone.\1"),
        (r"((?:conv1|bn1|layer[1-4])\..+)", "backbone", r"backbone.\1"),
        (r"(?:relation_blocks\.0|relation)\.(.+)", "relation_blocks", r"relation.\1"),
        (r"(?:heads\.)?(instance|local_group|group|patch)(?:_head)?\.(projector\..+)", "projectors", r"heads.\1.\2"),
        (r"(?:heads\.)?(instance|local_group)(?:_head)?\.(predictor\..+)", "predictors", r"heads.\1.\2"),
        (r"(?:heads\.)?(group|patch)(?:_head)?\.(last_layer2?\.weight_[gv])", "last_layer", r"heads.\1.\2"),
        (r"head\.mlp\.(.+)", "projectors", r"heads.group.projector.\1"),
        # iBOT's last_layer2 is for patches; in its shared head it is last_layer once more.
        (r"head\.(last_layer2?\.weight_[gv])", "last_layer", r"heads.group.\1"),
        # Ours, of whatever objective.
        (r"(heads\.\w+\.projector\..+)", "projectors", r"\1"),
        (r"(heads\.\w+\.predictor\..+)", "predictors", r"\1"),
        (r"(heads\.\w+\.last_layer2?\.weight_[gv])", "last_layer", r"\1"),
        # DenseCL's neck: the image's head and the locations'.
        (rf"1\.mlp2\.({LAYER})", "projectors", r"heads.dense.projector.\1"),
        (rf"1\.mlp\.({LAYER})", "projectors", r"heads.OWNER.projector.\1"),
        # `fc` where the classifier was: MoCo, HCSC, SimSiam, some SimCLR; `head` on MoCo v3's ViTs; SwAV; BYOL, SimCLR.
        (
            rf"(?:fc|head|projection_head|projector|projection|projetion)\.(?:net\.)?({LAYER})",
            "projectors",
            r"heads.OWNER.projector.\1",
        ),
        (r"projection_head\.(weight|bias)", "projectors", r"heads.OWNER.projector.0.\1"),
        (rf"(?:online_)?predictor\.(?:net\.)?({LAYER})", "predictors", r"heads.OWNER.predictor.\1"),
        (r"prototypes\.weight", "last_layer", r"heads.OWNER.last_layer.weight_v"),
        (r"prototypes\.prototypes\d+\.weight", "last_layer", None),  # DeepCluster v2's are centroids, found anew
        (r"queue\d?(?:_ptr|_index)?", "queues", None),
        (r"masked_embed|mask_token", "mask_token", r"backbone.mask_token"),
        (r"(?:head|fc|classifier)\.(?:weight|bias)", "classifier", None),
    )
)
# What the plain ones do not have and others cannot do without: to leave it out would change every feature.
ALTERS = re.compile(r"reg_token|register_tokens|storage_tokens|norm_pre\.|attn_pool\.|rope|cls_pos|^conv1\.\d")
PARAMETRISED = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}


def place(key: str, objective: str = "batch_contrast") -> tuple[str, str | None]:
    """(group, our name) of a name in a file; the group is "other" and the name None for what nobody here knows.

    objective: whose a head is that does not say it (`owner`).
    """
    bare = _bare(key)
    for theirs, ours in PARAMETRISED.items():
        bare = bare.replace(theirs, ours)
    bare = from_detectors(bare)
    for pattern, group, name in RULES:
        if match := pattern.fullmatch(bare):
            return group, None if name is None else match.expand(name).replace("OWNER", objective)
    return "other", None


def owner(keys: Iterable[str]) -> str:
    """The objective whose head a file of one network has, where the names of its head do not say it."""
    names = [_bare(key) for key in keys]
    if any(name.startswith(("projection_head.", "prototypes.")) for name in names):
        return "clusters" if any(name.startswith("prototypes.prototypes") for name in names) else "swapped"
    return "bootstrap" if any(name.startswith("predictor.") for name in names) else "batch_contrast"


def _bare(key: str) -> str:
    match = WRAPPERS.match(key)
    return key[match.end() :] if match else key


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


def alterations(keys: Iterable[str]) -> list[str]:
    """Of these names, those that show a ViT or a ResNet to be another than the plain one."""
    return [key for key in keys if ALTERS.search(key)]
