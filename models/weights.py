"""Weights of others for our networks, with an account of every tensor: used, left out, missing, reshaped.

Taken are full checkpoints of the official Mugs, DINO and iBOT code, files that hold one network (flat, or under
"state_dict" or "model", with whatever wrappers' prefixes), bare backbones, as .pth or .safetensors, and what
`gristmill import` and `gristmill export` write. Features stay exact at the size that the position embedding is stored
for; for another one it is carried over as the student does it (reference/mugs.md, 6 #17).
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor

from .layouts import Measures, alterations, measure, place, plain_shapes
from .student import Student
from .unpickle import WeightFile, WeightsError, read_weights
from .vit import Backbone, PosInterp, resize_pos_embed

Who = Literal["student", "teacher"]
WHO: tuple[Who, Who] = ("student", "teacher")
NESTED = ("state_dict", "model")  # under which files keep the one network that they hold
# Parts of a full checkpoint beside its networks, and the group under which a report lists them.
BESIDE = {
    "student_mem": "memories", "teacher_mem": "memories", "instance-sup.": "queues", "local-group-sup.": "queues",
    "group-sup.": "centre", "dino_loss": "centre", "ibot_loss": "centre", "optimizer": "optimizer",
    "objectives": "memories", "fp16_scaler": "bookkeeping", "epoch": "bookkeeping", "args": "bookkeeping",
}  # fmt: skip


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
    source: WeightFile | str | Path, who: Who = "teacher", backbone: Backbone | None = None
) -> tuple[dict[str, Tensor], Report]:
    """A backbone's weights under timm's names, in fp32 where the file has other floats.

    who: which network of a full checkpoint. backbone: what they must fit, on any device, meta too; without one they are
    as the file has them. Raises WeightsError for a file that is none, lacks the network, holds no plain ViT or an
    incomplete one, values that are not finite, or shapes that do not fit (with timm's name of one that would).
    """
    interp: PosInterp = "official" if backbone is None else backbone.pos_interp
    wanted = None if backbone is None else {f"backbone.{key}": value for key, value in backbone.state_dict().items()}
    state, report = _import(source, who, wanted, interp, whole=False)
    return {name.removeprefix("backbone."): value for name, value in state.items()}, report


def import_student(
    source: WeightFile | str | Path, who: Who = "student", student: Student | None = None
) -> tuple[dict[str, Tensor], Report]:
    """Backbone, local-group block and heads, as far as the file has them, under the names of `Student`.

    student: what they must fit; what it has and the file lacks is listed as missing, what it lacks is left out, and the
    position embedding is carried over. `load_state_dict(state, strict=False)` puts them in. Raises as `import_backbone`.
    """
    interp: PosInterp = "official" if student is None else student.config.pos_interp
    return _import(source, who, None if student is None else student.state_dict(), interp, whole=True)


def choose(tree: Mapping[str, Any], who: Who, path: Path) -> tuple[dict[str, Any], str, dict[str, list[str]]]:
    """(one network of a file, flat; which it is; everything else by group). WeightsError if there is none such."""
    rest: dict[str, list[str]] = {}
    if any(f"{each}/backbone.cls_token" in tree for each in WHO):  # ours, of a whole import
        split: dict[str, dict[str, Any]] = {}
        for name, value in tree.items():
            part, _, rest_of_name = name.partition("/")
            split.setdefault(part, {})[rest_of_name] = value
        tree = split
    held = [each for each in WHO if isinstance(tree.get(each), Mapping)]
    if held and who not in held:
        raise WeightsError(f"{path} holds no {who}, only a {held[0]}; ask for --{held[0]}")
    if not held:
        inner = [key for key in NESTED if isinstance(tree.get(key), Mapping)]
        if not inner:
            return dict(tree), "the only one", rest
    key = who if held else inner[0]
    for name, part in tree.items():
        if name != key:
            group = "other network" if name in WHO else BESIDE.get(str(name), "other")
            names = [f"{name}/{k}" for k in part] if isinstance(part, Mapping) and group != "optimizer" else [str(name)]
            rest.setdefault(group, []).extend(names)
    return dict(tree[key]), key if held else "the only one", rest


def _import(
    source: WeightFile | str | Path, who: Who, wanted: dict[str, Tensor] | None, interp: PosInterp, *, whole: bool
) -> tuple[dict[str, Tensor], Report]:
    file = source if isinstance(source, WeightFile) else read_weights(source)
    flat, network, ignored = choose(file.tree, who, file.path)
    found, strange = _placed(flat, file.path)
    backbone = {name.removeprefix("backbone."): v for name, (g, _, v) in found.items() if g == "backbone"}
    measures = _plain(backbone, file.path, flat)
    state: dict[str, Tensor] = {}
    for name, (group, key, value) in found.items():
        if group == "backbone" or (whole and (wanted is None or name in wanted)):
            state[name] = value
        else:
            ignored.setdefault(group, []).append(key)
    for group, key in strange:
        ignored.setdefault(group, []).append(key)
    reshaped: dict[str, str] = {}
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
    report = Report(file.path.name, file.sha256, network, str(measures), sorted(state), ignored, missing, reshaped)
    if measures.timm_name is None:
        report.notes.append("weights do not tell the number of attention heads: set student.heads as it was trained")
    return state, report


def _placed(flat: Mapping[Any, Any], path: Path) -> tuple[dict[str, tuple[str, str, Tensor]], list[tuple[str, str]]]:
    """Tensors by our name, as (group, the file's name, value); and (group, name) of what has no place with us."""
    found: dict[str, tuple[str, str, Tensor]] = {}
    strange: list[tuple[str, str]] = []
    for key, value in flat.items():
        group, name = place(str(key)) if isinstance(value, Tensor) else (BESIDE.get(str(key), "other"), None)
        if isinstance(value, Tensor) and (value.layout != torch.strided or value.device.type != "cpu"):
            raise WeightsError(f"{path}: {key} is a {value.layout} tensor on {value.device}; save it as a plain one")
        if name is None:
            strange.append((group, str(key)))
        elif name in found:
            raise WeightsError(f"{path}: {found[name][1]} and {key} are both {name}; keep one network in the file")
        else:
            found[name] = group, str(key), value
    return found, strange


def _plain(backbone: dict[str, Tensor], path: Path, flat: Mapping[Any, Any]) -> Measures:
    """Raise WeightsError unless these are all weights of a plain ViT, and nothing that would make it another."""
    if not backbone:
        shown = ", ".join(map(str, list(flat)[:3])) or "nothing"
        raise WeightsError(
            f"{path}: nothing in it matches a ViT (cls_token, pos_embed, blocks.0....); it holds {shown}; Gristmill's "
            "backbones are plain ViTs under timm's names"
        )
    measures = measure(backbone)
    wanted = {} if measures is None else plain_shapes(measures)
    for name in [*(name for name in backbone if measures and name not in wanted), *alterations(map(str, flat))]:
        raise WeightsError(
            f"{path} is not a plain ViT (class token, learned positions, GELU): it has {name}, without which its features "
            "would be others; choose a checkpoint of a plain one"
        )
    if measures is None or (lacking := sorted(wanted.keys() - backbone.keys())):
        first = "patch_embed.proj.weight, pos_embed or blocks.0" if measures is None else ", ".join(lacking[:3])
        raise WeightsError(f"{path} is incomplete: it lacks {first}; fetch it again")
    for name, value in backbone.items():
        if tuple(value.shape) != wanted[name]:
            raise WeightsError(
                f"{path}: {name} has shape {tuple(value.shape)} where {measures} has {wanted[name]}; choose a checkpoint of "
                "a plain ViT for images of three channels"
            )
    return measures


def _fit(
    state: dict[str, Tensor],
    wanted: Mapping[str, Tensor],
    reshaped: dict[str, str],
    interp: PosInterp,
    measures: Measures,
    path: Path,
) -> None:
    """Carry the position embedding over; raise WeightsError if anything else differs in shape or the backbone in depth."""
    lengths = state["backbone.pos_embed"].shape[1], wanted["backbone.pos_embed"].shape[1]
    old, new = (math.isqrt(length - 1) for length in lengths)
    if old != new and state["backbone.pos_embed"].shape[2] == wanted["backbone.pos_embed"].shape[2]:
        if old * old + 1 != lengths[0]:
            raise WeightsError(f"{path}: a position embedding of {lengths[0]} rows is not of square images")
        stored = state["backbone.pos_embed"].float()
        if interp == "timm":
            state["backbone.pos_embed"] = resample_abs_pos_embed(stored, [new, new], [old, old])
        else:
            state["backbone.pos_embed"] = resize_pos_embed(stored, new, new)
        reshaped["backbone.pos_embed"] = f"{old} x {old} to {new} x {new} patches, bicubic, {interp} form"
    wrong = [name for name, value in state.items() if name not in wanted or value.shape != wanted[name].shape]
    wrong += [name for name in wanted if place(name)[0] == "backbone" and name not in state]
    if not wrong:
        return
    shown = "; ".join(f"{name} {_shape(state, name)} there, {_shape(wanted, name)} here" for name in wrong[:3])
    more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
    ours = measure({n.removeprefix("backbone."): v for n, v in wanted.items() if n.startswith("backbone.")})
    if not any(name.startswith("backbone.") for name in wrong):
        raise WeightsError(
            f"{path}: heads differ ({shown}{more}); give the recipe's student those sizes, or import the backbone alone"
        )
    fitting = (
        f"student.backbone={measures.timm_name}"
        if measures.timm_name
        else f"student.embed_dim={measures.width} student.depth={measures.depth} student.patch_size={measures.patch}"
    )
    raise WeightsError(f"{path} is {measures}, the student {ours} ({shown}{more}); set {fitting}")


def _shape(tensors: Mapping[str, Tensor], name: str) -> str:
    return str(tuple(tensors[name].shape)) if name in tensors else "absent"


def _parts(names: list[str]) -> str:
    """backbone (150), heads.group (8), ..."""
    counts: dict[str, int] = {}
    for name in names:
        part = ".".join(name.split(".")[: 2 if name.startswith("heads.") else 1])
        counts[part] = counts.get(part, 0) + 1
    return ", ".join(f"{part} ({count})" for part, count in counts.items())
