"""Weights of others for our networks, with an account of every tensor: used, left out, missing, reshaped.

Taken are full checkpoints of the official Mugs, DINO and iBOT code, of MoCo, DenseCL, HCSC and BYOL-like code (two networks
in one dictionary: pairs.py), files that hold one network (flat, or under "state_dict" or "model", with whatever wrappers'
prefixes: SwAV, SimCLR, SimSiam, VISSL, torchvision, timm, detectors), as .pth or .safetensors, and what `gristmill
import` and `gristmill export` write. A ViT's features stay exact at the size that the position embedding is stored for;
for another one it is carried over as the student does it (reference/mugs.md, 6 #17).
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor, nn

from .choice import BESIDE, choose
from .layouts import alterations, owner, place
from .measures import Measures, ResNetMeasures, is_resnet, measure
from .pair import Pair, Who
from .student import Student
from .unpickle import WeightFile, WeightsError, read_weights
from .vit import PosInterp, resize_pos_embed


@dataclass(frozen=True)
class Report:
    """What became of a file's contents. `used` and `missing` are our names, `ignored` the file's, by group."""

    source: str
    sha256: str
    network: str  # "student", "teacher", or "the only one"
    what: str  # the backbone in words
    used: list[str]
    ignored: dict[str, list[str]] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)  # of what was asked for; these stay as they were drawn
    reshaped: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """For people."""
        lines = [f"{self.source}: {self.what}", f"  sha256    {self.sha256}", f"  network   {self.network}"]
        lines.append(f"  used      {len(self.used)} tensors: {_parts(self.used)}")
        if self.ignored:
            groups = (f"{group} ({len(names)})" for group, names in sorted(self.ignored.items()))
            lines.append(f"  left out  {', '.join(groups)}")
        if self.missing:
            lines.append(f"  missing   {len(self.missing)} tensors: {_parts(self.missing)}")
        lines += [f"  reshaped  {name}: {how}" for name, how in self.reshaped.items()]
        return lines + [f"  note      {note}" for note in self.notes]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def import_backbone(
    source: WeightFile | str | Path, who: Who | None = "teacher", backbone: nn.Module | None = None
) -> tuple[dict[str, Tensor], Report]:
    """A backbone's weights under timm's names, in fp32 where the file has other floats.

    who: which network of a full checkpoint; None: the one that its authors evaluate, the teacher of Mugs, DINO and iBOT,
    the query or online network of MoCo's and BYOL's kind. backbone: what they must fit, on any device, meta too; without
    one they are as the file has them. Raises WeightsError for a file that is none, lacks the network, holds no plain ViT or
    ResNet or an incomplete one, values that are not finite, or shapes that do not fit (with timm's name of one that would).
    """
    interp: PosInterp = getattr(backbone, "pos_interp", "official")
    wanted = None if backbone is None else {f"backbone.{key}": value for key, value in backbone.state_dict().items()}
    state, report = _import(source, who, wanted, interp, whole=False)
    return {name.removeprefix("backbone."): value for name, value in state.items()}, report


def import_student(
    source: WeightFile | str | Path, who: Who | None = "student", student: Student | None = None
) -> tuple[dict[str, Tensor], Report]:
    """Backbone, local-group block and heads, as far as the file has them, under the names of `Student`.

    student: what they must fit; what it has and the file lacks is listed as missing, what it lacks is left out, and the
    position embedding is carried over. `load_state_dict(state, strict=False)` puts them in. Raises as `import_backbone`.
    """
    interp: PosInterp = "official" if student is None else student.config.pos_interp
    return _import(source, who, None if student is None else student.state_dict(), interp, whole=True)


def _import(
    source: WeightFile | str | Path,
    who: Who | None,
    wanted: dict[str, Tensor] | None,
    interp: PosInterp,
    *,
    whole: bool,
) -> tuple[dict[str, Tensor], Report]:
    file = source if isinstance(source, WeightFile) else read_weights(source)
    flat, network, ignored, pair = choose(file.tree, who, file.path)
    found, strange = _placed(flat, file.path, pair, "teacher" if network == "teacher" else "student")
    notes = _count_from_zero(found)
    if wanted is not None:
        found = _as_wanted(found, wanted)
    backbone = {name.removeprefix("backbone."): v for name, (g, _, v) in found.items() if g == "backbone"}
    measures = _plain(backbone, file.path, flat, [key for group, key in strange if group == "other"])
    state: dict[str, Tensor] = {}
    for name, (group, key, value) in found.items():
        if group == "backbone" or (whole and (wanted is None or name in wanted)):
            state[name] = value
        else:
            ignored.setdefault(group, []).append(key)
    for group, key in strange:
        ignored.setdefault(group, []).append(key)
    reshaped: dict[str, str] = {}
    for name, value in state.items():
        if name.startswith("heads.") and value.shape[2:] == (1, 1):
            state[name] = value.flatten(1)
            reshaped[name] = "1x1 convolution to linear layer"
    if wanted is not None:
        _fit(state, wanted, reshaped, interp, measures, file.path)
    for name, value in state.items():
        # A copy: what is mapped from a file would change with it.
        state[name] = value.clone(memory_format=torch.contiguous_format)
        if value.is_floating_point() and value.dtype != torch.float32:
            reshaped.setdefault(name, f"{str(value.dtype).removeprefix('torch.')} to float32")
            state[name] = value.float()
        if not torch.isfinite(state[name]).all():
            raise WeightsError(f"{file.path}: {name} has values that are not finite; this checkpoint is not usable")
    missing = [name for name in wanted or {} if name not in state]
    notes += _about_heads(measures, pair)
    report = Report(
        file.path.name, file.sha256, network, str(measures), sorted(state), ignored, missing, reshaped, notes
    )
    return state, report


Found = dict[str, tuple[str, str, Tensor]]  # by our name: group, the file's name, value


def _placed(flat: Mapping[Any, Any], path: Path, pair: Pair | None, who: Who) -> tuple[Found, list[tuple[str, str]]]:
    """Tensors by our name, and (group, name) of what has no place with us."""
    found: Found = {}
    strange: list[tuple[str, str]] = []
    objective = owner(map(str, flat))
    for key, value in flat.items():
        group, name = BESIDE.get(str(key), "other"), None
        if isinstance(value, Tensor):
            group, name = place(str(key), objective) if pair is None else pair.place(str(key), who)
            if value.layout != torch.strided or value.device.type != "cpu":
                raise WeightsError(
                    f"{path}: {key} is a {value.layout} tensor on {value.device}; save it as a plain one"
                )
        if name is None or not isinstance(value, Tensor):
            strange.append((group, str(key)))
        elif name in found:
            raise WeightsError(f"{path}: {found[name][1]} and {key} are both {name}; keep one network in the file")
        else:
            found[name] = group, str(key), value
    return found, strange


def _count_from_zero(found: Found) -> list[str]:
    """Give batch norms of old or frozen files the count of batches that they lack; what there is to say of it."""
    lacking = [
        (name, counter)
        for name in found
        if name.endswith(".running_var")
        and (counter := name.replace("running_var", "num_batches_tracked")) not in found
    ]
    for name, counter in lacking:
        found[counter] = found[name][0], found[name][1], torch.zeros((), dtype=torch.int64)
    return [f"{len(lacking)} batch norms have no count of batches in the file; it begins at 0"] if lacking else []


def _as_wanted(found: Found, wanted: Mapping[str, Tensor]) -> Found:
    """MoCo v2's head and HCSC's are one thing; which objective of the two the student has, it goes to."""
    has = {name.split(".")[1] for name in wanted if name.startswith("heads.")}
    for theirs, ours in (("instance", "hierarchy"), ("hierarchy", "instance")):
        if ours in has and theirs not in has and not any(name.startswith(f"heads.{ours}.") for name in found):
            return {name.replace(f"heads.{theirs}.", f"heads.{ours}.", 1): each for name, each in found.items()}
    return found


def _about_heads(measures: Measures | ResNetMeasures, pair: Pair | None) -> list[str]:
    if isinstance(measures, ResNetMeasures):
        return []
    if measures.timm_name is None:
        return ["weights do not tell the number of attention heads: set student.heads as it was trained"]
    if measures.width == 384 and pair is not None and pair.family.objective == "batch_contrast":
        return ["MoCo v3's ViT-S has 12 attention heads, timm's has 6: set student.heads=12"]
    return []


def _plain(
    backbone: dict[str, Tensor], path: Path, flat: Mapping[Any, Any], unknown: list[str]
) -> Measures | ResNetMeasures:
    """Raise WeightsError unless these are all weights of a plain ViT or ResNet, and nothing that would make it another."""
    if not backbone:
        shown = ", ".join(map(str, list(flat)[:3])) or "nothing"
        raise WeightsError(
            f"{path}: nothing in it matches a ViT (cls_token, pos_embed, blocks.0....) or a ResNet (conv1, layer1.0....); it "
            f"holds {shown}; Gristmill's backbones are plain ViTs and ResNets under timm's names"
        )
    measures, kind = measure(backbone), ResNetMeasures if is_resnet(backbone) else Measures
    wanted = {} if measures is None else measures.shapes()
    altered = alterations(unknown if kind is Measures else list(backbone))
    for name in [*(name for name in backbone if measures and name not in wanted), *altered]:
        raise WeightsError(
            f"{path} is not a {kind.kind} ({kind.marks}): it has {name}, without which its features would be others; "
            "choose a checkpoint of a plain one"
        )
    if measures is None or (lacking := sorted(wanted.keys() - backbone.keys())):
        first = ", ".join(lacking[:3]) if measures else kind.needs
        raise WeightsError(f"{path} is incomplete: it lacks {first}; fetch it again")
    for name, value in backbone.items():
        if tuple(value.shape) != wanted[name]:
            raise WeightsError(
                f"{path}: {name} has shape {tuple(value.shape)} where {measures} has {wanted[name]}; choose a checkpoint of "
                f"a {kind.kind} for images of three channels"
            )
    return measures


def _fit(
    state: dict[str, Tensor],
    wanted: Mapping[str, Tensor],
    reshaped: dict[str, str],
    interp: PosInterp,
    measures: Measures | ResNetMeasures,
    path: Path,
) -> None:
    """Carry the position embedding over; raise WeightsError if anything else differs in shape or the backbone in depth."""
    if "backbone.pos_embed" in state and "backbone.pos_embed" in wanted:
        _carry(state, wanted["backbone.pos_embed"], reshaped, interp, path)
    wrong = [name for name, value in state.items() if name not in wanted or value.shape != wanted[name].shape]
    wrong += [name for name in wanted if place(name) == ("backbone", name) and name not in state]
    if not wrong:
        return
    shown = "; ".join(f"{name} {_shape(state, name)} there, {_shape(wanted, name)} here" for name in wrong[:3])
    more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
    if not any(name.startswith("backbone.") for name in wrong):
        raise WeightsError(
            f"{path}: heads differ ({shown}{more}); give the recipe's student those sizes, or import the backbone alone"
        )
    ours = measure({n.removeprefix("backbone."): v for n, v in wanted.items() if n.startswith("backbone.")})
    raise WeightsError(f"{path} is {measures}, the student {ours or 'another'} ({shown}{more}); {measures.remedy}")


def _carry(
    state: dict[str, Tensor], embedding: Tensor, reshaped: dict[str, str], interp: PosInterp, path: Path
) -> None:
    """The position embedding to the grid of `embedding`, unless they differ in width too."""
    lengths = state["backbone.pos_embed"].shape[1], embedding.shape[1]
    old, new = (math.isqrt(length - 1) for length in lengths)
    if old == new or state["backbone.pos_embed"].shape[2] != embedding.shape[2]:
        return
    if old * old + 1 != lengths[0]:
        raise WeightsError(f"{path}: a position embedding of {lengths[0]} rows is not of square images")
    stored = state["backbone.pos_embed"].float()
    if interp == "timm":
        state["backbone.pos_embed"] = resample_abs_pos_embed(stored, [new, new], [old, old])
    else:
        state["backbone.pos_embed"] = resize_pos_embed(stored, new, new)
    reshaped["backbone.pos_embed"] = f"{old} x {old} to {new} x {new} patches, bicubic, {interp} form"


def _shape(tensors: Mapping[str, Tensor], name: str) -> str:
    return str(tuple(tensors[name].shape)) if name in tensors else "absent"


def _parts(names: list[str]) -> str:
    """backbone (150), heads.group (8), ..."""
    counts: dict[str, int] = {}
    for name in names:
        part = ".".join(name.split(".")[: 2 if name.startswith("heads.") else 1])
        counts[part] = counts.get(part, 0) + 1
    return ", ".join(f"{part} ({count})" for part, count in counts.items())
