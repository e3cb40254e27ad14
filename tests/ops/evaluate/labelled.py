"""Labelled pictures in memory, as the probes that train read them: one colour a class, noise on top."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from gristmill.shards.errors import GristmillError
from PIL import Image
from torch import Tensor

COLOURS = np.array([[200, 40, 40], [40, 180, 60], [50, 60, 200], [210, 190, 40]])
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


class Coloured:
    """n pictures of 40 x 32 pixels in four colours; without `tell`, the labels have nothing to do with them."""

    def __init__(self, n: int, seed: int = 0, *, tell: bool = True, broken: tuple[int, ...] = ()) -> None:
        draws = np.random.default_rng(seed)
        codes = np.arange(n) % 4
        noise = draws.integers(-30, 31, (n, 32, 40, 3))
        shown = codes if tell else draws.permutation(codes)
        self.pixels = np.clip(COLOURS[shown][:, None, None] + noise, 0, 255).astype(np.uint8)
        self.labels = torch.from_numpy(codes)
        self.classes = ["red", "green", "blue", "yellow"]
        self.broken = broken

    def load(self, row: int) -> Image.Image:
        if row in self.broken:
            raise GristmillError(f"picture {row} does not decode; take it out")
        return Image.fromarray(self.pixels[row])

    def batches(self, size: int, batch: int = 128, rows: Any = None) -> Iterator[tuple[Tensor, Tensor]]:
        asked = torch.arange(len(self.labels)) if rows is None else torch.as_tensor(rows)
        for part in asked.split(batch):
            kept = torch.tensor([row for row in part.tolist() if row not in self.broken])
            squares = torch.from_numpy(self.pixels[kept.numpy()][:, :, 4:36]).permute(0, 3, 1, 2).float() / 255
            resized = torch.nn.functional.interpolate(squares, (size, size), mode="bilinear")
            yield kept, (resized - MEAN.view(3, 1, 1)) / STD.view(3, 1, 1)
