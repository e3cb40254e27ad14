"""What every drawing starts from: the networks and objectives of the newest checkpoint, and a few images to show them.

Images are the probes' own (whole, middle square), the same ones every time, from all over the data set; labels are used
only to say whether what was found is of one kind. One pass over `SEEN` of them serves the tree and the local groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ....models.student import Student
from ....objectives import Mixture
from ....pipeline.probing import probe_batches
from ....shards.labels import Labels
from ....shards.manifest import Manifest
from ....shards.mirror import open_manifest
from ...checkpoint import CheckpointError, newest
from ...networks import build_mixture, saved_networks
from ...recipe import Recipe
from ...stores import open_store
from ..crops import as_pixels

SEEN, SHOWN = 256, 6  # images that the tree and the groups are made of, and those that are looked at one by one
BATCH = 32
THUMBNAIL = 64  # pixels


@dataclass(frozen=True)
class Images:
    """keys [n]; pixels normalised fp32 [n, 3, S, S]."""

    keys: list[str]
    pixels: Tensor

    def thumbnails(self, size: int = THUMBNAIL) -> np.ndarray:
        """uint8 [n, size, size, 3], or as they are where they are smaller."""
        small = (
            F.interpolate(self.pixels, size=(size, size), mode="area") if self.pixels.shape[-1] > size else self.pixels
        )
        return as_pixels(small.numpy())


@dataclass(frozen=True)
class Glance:
    """What the teacher's backbone makes of `SEEN` images: keys; thumbnails uint8 [n, T, T, 3]; token tensors fp32 [n, d]."""

    keys: list[str]
    thumbnails: np.ndarray
    class_token: Tensor  # after the last norm
    query: Tensor  # mean of all tokens before it: what asks a memory of local groups
    row: Tensor  # mean of the patches after it: what such a memory holds


@dataclass
class Source:
    """A run's newest checkpoint, in evaluation mode and on the CPU, with its recipe."""

    recipe: Recipe
    student: Student
    teacher: Student
    objectives: Mixture
    position: int

    @property
    def size(self) -> int:
        """Pixels a side of the teacher's largest crops (the student's, where the teacher has none)."""
        views = [view for view in self.recipe.views if view.role != "student"] or list(self.recipe.views)
        return max(view.size for view in views)

    @cached_property
    def reference(self) -> Manifest:
        return open_manifest(self.recipe.probes.reference or self.recipe.sources[0].path)

    @cached_property
    def labels(self) -> Labels | None:
        return Labels.open(self.reference.root)

    def queries(self, count: int, size: int) -> Images:
        """Images that training did not see where the recipe holds some back, else of the reference."""
        held_back = self.recipe.probes.query
        return _images(Manifest.open(held_back) if held_back else self.reference, count, size)

    @cached_property
    @torch.no_grad()
    def glance(self) -> Glance:
        images, backbone = _images(self.reference, SEEN, self.size), self.teacher.backbone
        parts = []
        for pixels in images.pixels.split(BATCH):
            before = backbone(pixels)
            after = backbone.norm(before)
            parts.append((after[:, 0], before.mean(1), after[:, 1:].mean(1)))
        class_token, query, row = (torch.cat(tensors).float() for tensors in zip(*parts, strict=True))
        return Glance(images.keys, images.thumbnails(), class_token, query, row)

    def codes(self, keys: Sequence[str]) -> dict[str, np.ndarray]:
        """Label codes int64 [n] by level, coarse first; negative: not known. Empty without labels."""
        if self.labels is None:
            return {}
        return {name: np.asarray(self.labels.codes(list(keys), name)) for name in self.labels.names}


def open_source(folder: Path, recipe: Recipe) -> Source:
    """Open a run folder. CheckpointError where no checkpoint is there, or it is not the recipe's."""
    saved, _ = newest(open_store(recipe.checkpoint.store or folder / "checkpoints"))
    if saved is None:
        raise CheckpointError(f"{folder} holds no checkpoint; train on for one, every {recipe.checkpoint.every} images")
    try:
        student, teacher = saved_networks(saved, recipe, "student", "teacher")
        objectives = build_mixture(recipe, student, images=int(saved.state.get("images", 0)))
        objectives.load(saved.whole("objectives"))
    except ValueError as error:
        raise CheckpointError(
            f"{saved.path} does not fit {folder / 'recipe.yaml'}: {error}; use the recipe that it was written with"
        ) from error
    finally:
        saved.close()
    return Source(recipe, student.eval(), teacher.eval(), objectives, saved.position)


def _images(manifest: Manifest, count: int, size: int) -> Images:
    """Of a data set, `count` images from all over it."""
    keys, pixels = [], []
    for names, batch in probe_batches(manifest, size, BATCH, limit=count):
        keys += names
        pixels.append(batch.float().cpu())
    if not keys:
        raise CheckpointError(f"{manifest.root} has no healthy image to show; see `gristmill verify`")
    return Images(keys, torch.cat(pixels))
