"""Our weights for others: a backbone as safetensors under timm's names, written tensor by tensor.

`timm.create_model(NAME, checkpoint_path=FILE, num_classes=0, ...)` takes what is written here; the call with all its
arguments is in the file's metadata, beside the recipe, the position and the digest of the checkpoint that it came
from. From a checkpoint, tensors are read one at a time from whatever ranges ranks and ZeRO stage left, so that memory
does not grow with the network. Only complete files get their name.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import click
import torch
from torch import Tensor

from ..models.layouts import official_name, place
from ..models.student import Student, StudentConfig
from ..models.teacher import make_teacher
from ..models.vit import Backbone, resize_pos_embed
from ..models.weights import Who
from ..shards.errors import GristmillError
from ..shards.storage import published
from .checkpoint import DIGEST, CheckpointError, Image, Saved, lay_out, newest
from .recipe import Recipe, load_recipe, parse_recipe
from .stores import POSITION, open_store

Format = Literal["timm", "official"]


class ExportError(GristmillError):
    """Weights that cannot be written where, or as, they were asked for."""


def export_timm(network: Student | Backbone, path: str | Path, metadata: Mapping[str, str] | None = None) -> Path:
    """Write a network's backbone under timm's names. Raises ExportError for a name that is not *.safetensors."""
    backbone = network.backbone if isinstance(network, Student) else network
    state = {name: value for name, value in backbone.state_dict().items() if name != "mask_token"}
    return write_tensors(path, state, metadata)


def write_tensors(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    read: Callable[[str], Tensor] | None = None,
) -> Path:
    """A safetensors file, complete or absent. read: gives the values, one tensor at a time; `tensors` may then be meta.

    Raises ExportError for a name that is not *.safetensors (timm goes by it) or a folder that is not there.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ExportError(f"{path}: what is written is safetensors, so let its name end in .safetensors")
    if not path.parent.is_dir():
        raise ExportError(f"{path}: there is no folder {path.parent}; make it first")
    if path.is_dir():
        raise ExportError(f"{path} is a folder; name a file")
    image = lay_out(tensors, {"format": "pt", **(metadata or {})})
    names = {id(tensor): name for name, tensor in tensors.items()}
    with published(path) as draft:
        draft.write(image.header)
        for tensor in image.tensors:
            value = tensor if read is None else read(names[id(tensor)])
            if (value.shape, value.dtype) != (tensor.shape, tensor.dtype):
                raise ExportError(f"{names[id(tensor)]} is {value.dtype} {tuple(value.shape)}, not as announced")
            for chunk in Image(b"", [value]).chunks():
                draft.write(chunk)  # pyright: ignore[reportArgumentType]
    return path


def open_checkpoint(where: str) -> Saved:
    """A run's newest whole checkpoint, or the one named by its folder; every file checked against its digest."""
    path = Path(where)
    if "://" not in where and not path.is_dir():
        raise ExportError(f"{where}: there is no such folder; name a run, or one of its checkpoints/POSITION")
    parent, _, name = where.rstrip("/").rpartition("/")
    if POSITION.fullmatch(name):
        place = open_store(parent or ".")
        if int(name) not in place.positions():
            raise ExportError(f"{where} is no checkpoint; {parent or '.'} holds {place.positions() or 'none'}")
        saved = Saved(place, int(name))
        for file, (problem, why) in zip(saved.digests, saved.verify(list(saved.digests)), strict=True):
            if problem:
                raise CheckpointError(
                    f"{saved.path} is damaged: {file} is not as it was written{why}; take another one"
                )
        return saved
    store: str | Path = where
    if "://" not in where and not any(POSITION.fullmatch(each.name) for each in path.iterdir()):
        store = path / "checkpoints"
        if (path / "recipe.yaml").is_file():
            store = load_recipe(path / "recipe.yaml").checkpoint.store or store
    saved, told = newest(open_store(store))
    for line in told:
        click.echo(line, err=True)
    if saved is None:
        raise ExportError(f"{where} holds no checkpoint; name a run folder, or a checkpoint in it")
    return saved


def export_checkpoint(
    where: str, out: str | Path, who: Who = "teacher", *, format: Format = "timm", size: tuple[int, int] | None = None
) -> tuple[Path, dict[str, str]]:
    """Write one network of a checkpoint; returns the file and its metadata.

    format: "timm", the backbone; "official", backbone, local-group block and heads under the names of the official Mugs
    code. size: (height, width) for which the position embedding is carried over, in the run's own form (timm's differs
    from the papers' away from the stored size). Raises ExportError, CheckpointError.
    """
    saved = open_checkpoint(where)
    try:
        recipe = parse_recipe(saved.state["recipe"], f"the recipe in {saved.path}")
        with torch.device("meta"):
            student = Student(recipe.student)
        wanted = dict(student.state_dict())
        ranged = saved.names(who) if who in saved.groups() else {}
        wholes = saved.whole(who) if who in saved.wholes() else {}
        buffers = saved.whole("buffers") if "buffers" in saved.wholes() else {}
        wholes |= {name.removeprefix(f"{who}/"): b for name, b in buffers.items() if name.startswith(f"{who}/")}

        def read(name: str) -> Tensor:
            value = saved.read(who, name).view(ranged[name]) if name in ranged else wholes[name]
            return _carried(value, student.backbone, size) if name == "backbone.pos_embed" and size else value

        only = set(wanted if who == "student" else make_teacher(student).state_dict())
        only = {n for n in only if format == "official" or place(n)[0] == "backbone"}
        if lost := sorted(name for name in only if name not in ranged and name not in wholes):
            raise ExportError(f"{saved.path} lacks {', '.join(lost[:3])} of its {who}; take another checkpoint")
        names = {(official_name(n) if format == "official" else n.removeprefix("backbone.")): n for n in sorted(only)}
        shapes = {theirs: _announced(saved, who, ours, wholes) for theirs, ours in names.items()}
        if size:
            theirs = "backbone.pos_embed" if format == "official" else "pos_embed"
            shapes[theirs] = read("backbone.pos_embed").to("meta")
        about = describe(recipe, student.backbone, size) | {
            "gristmill.network": who,
            "gristmill.position": str(saved.position),
            # No more of the path than names the run: exports travel.
            "gristmill.source": "/".join(saved.path.split("/")[-3:]),
            "gristmill.digest": saved.store.read(saved.position, DIGEST).decode().split()[-1],
        }
        return write_tensors(out, shapes, about, lambda theirs: read(names[theirs])), about
    finally:
        saved.close()


def describe(recipe: Recipe, backbone: Backbone, size: tuple[int, int] | None = None) -> dict[str, str]:
    """Metadata of an export: recipe, and how timm builds the network that takes it."""
    from ..pipeline.augment.colour import MEAN, STD

    arguments = timm_arguments(recipe.student, size)
    return {
        "gristmill.recipe": recipe.name,
        "gristmill.model": recipe.student.backbone,
        "gristmill.arguments": json.dumps(arguments),
        "gristmill.mean": json.dumps(MEAN),
        "gristmill.std": json.dumps(STD),
    }


def timm_arguments(config: StudentConfig, size: tuple[int, int] | None = None) -> dict[str, Any]:
    """What `timm.create_model(config.backbone, ...)` wants besides its name to build the same backbone."""
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


def call(metadata: Mapping[str, str], path: Path) -> str:
    """The line of Python that loads an export."""
    arguments = ", ".join(f"{key}={value!r}" for key, value in json.loads(metadata["gristmill.arguments"]).items())
    return f"timm.create_model({metadata['gristmill.model']!r}, checkpoint_path={str(path)!r}, {arguments})"


def _announced(saved: Saved, who: str, name: str, wholes: Mapping[str, Tensor]) -> Tensor:
    """A tensor's shape and type, on the meta device."""
    if name in wholes:
        return wholes[name].to("meta")
    kind = saved.read(who, name, 0, 0).dtype
    return torch.empty(saved.names(who)[name], dtype=kind, device="meta")


def _carried(embedding: Tensor, backbone: Backbone, size: tuple[int, int]) -> Tensor:
    patch = backbone.patch_embed.patch_size[0]
    if any(side % patch for side in size):
        raise ExportError(f"--size {size[0]}x{size[1]}: both must be multiples of the patch, {patch}")
    height, width = (side // patch for side in size)
    if backbone.pos_interp == "official":
        return resize_pos_embed(embedding, height, width)
    from timm.layers.pos_embed import resample_abs_pos_embed

    return resample_abs_pos_embed(embedding, [height, width])
