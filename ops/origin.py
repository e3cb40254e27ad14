"""Where exported weights come from: one network of a checkpoint, read a tensor at a time.

Whatever ranks and ZeRO stage wrote it, a tensor is put together from the ranges that they left, and no more than that
tensor is held. A ViT's position embedding is carried over to another size here, in the run's own form.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn

from ..models.layouts import place
from ..models.student import Student, StudentConfig
from ..models.teacher import make_teacher
from ..models.vit import resize_pos_embed
from ..models.weights import Who
from .calls import describe, timm_arguments
from .checkpoint import DIGEST, CheckpointError, Saved, newest
from .exported import ExportError
from .recipe import Recipe, load_recipe, parse_recipe
from .stores import POSITION, open_store

Size = tuple[int, int]  # (height, width) in pixels


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


class Origin:
    """The student or the teacher of a checkpoint. Names are ours: `backbone.` and timm's, `heads.`, `relation.`."""

    def __init__(self, saved: Saved, who: Who = "teacher", size: Size | None = None) -> None:
        """size: for which a ViT's position embedding is carried over. ExportError for one that does not go with the network."""
        self.saved, self.who, self.size = saved, who, size
        self.recipe: Recipe = parse_recipe(saved.state["recipe"], f"the recipe in {saved.path}")
        self.config: StudentConfig = self.recipe.student
        if size and self.config.resnet:
            raise ExportError(
                f"--size: {self.config.backbone} has no position embedding and takes any size; leave it out"
            )
        with torch.device("meta"):
            student = Student(self.config)
        self.backbone: Any = student.backbone  # on the meta device: what it is made of, without its weights
        self._shapes = dict((student if who == "student" else make_teacher(student)).state_dict())
        self._ranged = saved.names(who) if who in saved.groups() else {}
        self._wholes = saved.whole(who) if who in saved.wholes() else {}
        buffers = saved.whole("buffers") if "buffers" in saved.wholes() else {}
        self._wholes |= {name.removeprefix(f"{who}/"): b for name, b in buffers.items() if name.startswith(f"{who}/")}

    @property
    def image_size(self) -> Size:
        """Pixels of the images that it is exported for: those of the stored positions, of a ResNet those of the probes."""
        side = self.recipe.probes.size if self.config.resnet else self.config.image_size
        return self.size or (side, side)

    def names(self, everything: bool = False) -> list[str]:
        """Of the backbone, or of everything that this network has. ExportError if the checkpoint lacks one."""
        only = sorted(name for name in self._shapes if everything or place(name)[0] == "backbone")
        if lost := [name for name in only if name not in self._ranged and name not in self._wholes]:
            raise ExportError(
                f"{self.saved.path} lacks {', '.join(lost[:3])} of its {self.who}; take another checkpoint"
            )
        return only

    def shapes(self) -> dict[str, Tensor]:
        """The backbone's weights under timm's names, on the meta device, positions as they are stored."""
        return {name.removeprefix("backbone."): self._shapes[name] for name in self.names()}

    def announced(self, name: str) -> Tensor:
        """What `read` will give, on the meta device."""
        if name in self._wholes:
            kept = self._wholes[name].to("meta")
        else:
            kept = torch.empty(self._ranged[name], dtype=self.saved.read(self.who, name, 0, 0).dtype, device="meta")
        if self.size is None or name != "backbone.pos_embed":
            return kept
        height, width = self._grid(self.size)
        return kept.new_empty(1, 1 + height * width, kept.shape[-1])

    def read(self, name: str, part: int = 0, of: int = 1) -> Tensor:
        """A tensor, or the part-th of `of` equal parts of its rows: of a joined `qkv`, the keys are part 1 of 3."""
        if name in self._wholes:
            value = self._wholes[name] if of == 1 else self._wholes[name].chunk(of)[part]
        else:
            rows, *rest = self._ranged[name] or (1,)
            count = math.prod((rows, *rest)) // of
            value = self.saved.read(self.who, name, part * count, (part + 1) * count)
            value = value.view(rows // of, *rest) if self._ranged[name] else value.view(())
        if self.size is None or name != "backbone.pos_embed":
            return value
        height, width = self._grid(self.size)
        if self.config.pos_interp == "official":
            return resize_pos_embed(value, height, width)
        from timm.layers.pos_embed import resample_abs_pos_embed

        return resample_abs_pos_embed(value, [height, width])

    def network(self) -> Any:
        """The backbone with its weights in float32, for evaluation, positions as they are stored; whole in memory."""
        size, self.size = self.size, None
        try:
            weights = {name.removeprefix("backbone."): self.read(name) for name in self.names()}
        finally:
            self.size = size
        with torch.device("meta"):
            backbone: Any = Student(self.config).backbone
        backbone.mask_token = None
        backbone.load_state_dict(_widened(weights), assign=True)
        return backbone.eval().requires_grad_(False)

    def plain(self, network: nn.Module) -> Any:
        """timm's own network with the weights of `network`, a ViT's for images of `image_size` only; nothing is copied."""
        import timm

        arguments = timm_arguments(self.config, self.image_size, self.backbone)
        if not self.config.resnet:
            arguments["dynamic_img_size"] = False
        weights = dict(network.state_dict())
        if "pos_embed" in weights:
            weights["pos_embed"] = _widened({"": self.read("backbone.pos_embed")})[""]
        built = timm.create_model(self.config.backbone, **arguments, device="meta")
        built.load_state_dict(weights, assign=True)
        return built.eval().requires_grad_(False)

    def about(self) -> dict[str, str]:
        """Metadata: recipe, timm's arguments, pixels, and which checkpoint it was."""
        return describe(self.recipe, self.backbone, self.size) | {
            "gristmill.network": self.who,
            "gristmill.position": str(self.saved.position),
            # No more of the path than names the run: exports travel.
            "gristmill.source": "/".join(self.saved.path.split("/")[-3:]),
            "gristmill.digest": self.saved.store.read(self.saved.position, DIGEST).decode().split()[-1],
        }

    def _grid(self, size: Size) -> Size:
        patch = int(self.backbone.stride)
        if any(side % patch for side in size):
            raise ExportError(f"--size {size[0]}x{size[1]}: both must be multiples of the patch, {patch}")
        return size[0] // patch, size[1] // patch


@contextmanager
def origin(where: str, who: Who = "teacher", size: Size | None = None) -> Iterator[Origin]:
    """Open one network of a run's newest checkpoint, or of the one named. Raises ExportError, CheckpointError."""
    saved = open_checkpoint(where)
    try:
        yield Origin(saved, who, size)
    finally:
        saved.close()


def _widened(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.float() if value.is_floating_point() else value for name, value in weights.items()}
