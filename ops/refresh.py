"""A pass over the data for an objective that asks for one: every image's embedding by the teacher, in the order of `index`.

As HCSC and DeepCluster embed a data set before they cluster it: the middle of each image (Resize 256, CenterCrop 224, in
proportion), the network in evaluation mode, with the objective's own head. Ranks take whole batches of fixed place and size,
so the numbers do not depend on how many there are. Images that a filter or a takedown leaves out, and those that turn out to
be damaged, get a row of zeros: a pass must not end a run of days, and a substitute would stand there twice.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from ..models.teacher import make_teacher
from ..pipeline.loader import Loader
from ..pipeline.order import Ints, Sequential
from ..pipeline.stream import Stream
from ..pipeline.views import View
from ..shards.quarantine import Quarantine
from .evaluate.features import evaluating
from .ranks import gather
from .recipe import Recipe, RecipeError

if TYPE_CHECKING:
    from .run import Run

BATCH = 128  # images at once, the same on every rank
BORDER = 256 / 224  # side of the square that an image is resized to, over that of what is cut out of its middle


class Everything:
    """The order of all samples that a stream reads, once each, data set by data set, shard by shard."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self._own = [Sequential(source.selected) for source in stream.sources]
        self._ends = np.cumsum([own.samples for own in self._own])

    @property
    def samples(self) -> int:
        return int(self._ends[-1])

    def locate(self, positions: ArrayLike) -> tuple[Ints, Ints]:
        """(shard int64 [n], row int64 [n]) of positions int64 [n] below `samples`; shards count through all data sets."""
        place = np.asarray(positions, np.int64) % self.samples
        which = np.searchsorted(self._ends, place, side="right")
        shard, row = np.empty_like(place), np.empty_like(place)
        for number, (own, source) in enumerate(zip(self._own, self.stream.sources, strict=True)):
            here = which == number
            if here.any():
                shard[here], rank = own.locate(place[here] - (self._ends[number] - own.samples))
                row[here] = source.rows(shard[here], rank)
                shard[here] += self.stream.first[number]
        return shard, row

    def pool(self, position: int) -> Everything:
        """What a substitute is drawn from; its row is dropped again."""
        return self

    def removed(self, shard: Ints, row: Ints) -> NDArray[np.bool_]:
        """Whether each sample was taken down: bool [n]."""
        return self.stream.removed(shard, row)


@torch.no_grad()
def embed_all(run: Run, name: str, *, batch: int = BATCH) -> Tensor:
    """Unit rows float32 [images, dim] of all images of a run's data sets, on its device, equal on all ranks. Collective.

    name: the objective whose head it is. A row of zeros: left out, taken down or damaged (`(rows == 0).all(1)` counts
    these). RecipeError if the teacher has no such head.
    """
    stream = run.feed.stream
    assert stream is not None
    order = Everything(stream)
    share = -(-order.samples // (batch * run.world)) * batch
    start = min(run.rank * share, order.samples)
    stop = min(start + share, order.samples)
    mine = torch.zeros(share, run.recipe.student.out_of(name), device=run.device)
    kept = torch.full((share,), -1, dtype=torch.int64)
    with _teacher(run) as network, evaluating(network):
        head = _head(network, name)
        for position, ids, images in _middles(run, order, start, stop, batch):
            with run.engine.autocast():
                tokens = network.backbone(images)  # pyright: ignore[reportCallIssue]
                found = head(network.backbone.norm(tokens[:, 0]))  # pyright: ignore[reportCallIssue]
            rows = F.normalize((found[0] if isinstance(found, tuple) else found).float(), dim=1)
            meant = np.stack(order.locate(np.arange(position, position + len(ids))), axis=1)
            whole = torch.from_numpy((ids == meant).all(axis=1))
            place = position - start
            mine[place : place + len(ids)] = torch.where(whole.to(rows.device).unsqueeze(1), rows, 0.0)
            kept[place : place + len(ids)] = run.feed.index(meant)
    rows, kept = gather(mine), gather(kept.to(run.device))
    every = rows.new_zeros(run.feed.images, rows.shape[1])
    every[kept[kept >= 0]] = rows[kept >= 0]
    return every


def _middles(
    run: Run, order: Everything, start: int, stop: int, batch: int
) -> Iterator[tuple[int, NDArray[np.int64], Tensor]]:
    """Positions from `start` to `stop` in batches: where each begins, places (shard, row) [b, 2], images [b, 3, S, S]."""
    if start >= stop:
        return
    size = _size(run.recipe)
    wide = round(size * BORDER)
    edge = (wide - size) // 2
    view = View.model_validate({"name": "middle", "size": wide, "augment": "none"})
    # All may be damaged, and shards are read whole and once: nothing here stops a run, or pushes what it needs out of a cache.
    config = run.recipe.stream.model_copy(update={"damage_bound": 1.0, "cache": None})
    with tempfile.TemporaryDirectory(prefix="gristmill-") as scratch:
        loader = Loader(
            run.feed.manifests,
            [view],
            config,
            order=order,
            start=start,
            stop=stop,
            batch=min(batch, stop - start),
            quarantine=Quarantine(Path(scratch) / "quarantine.jsonl"),
            device="gpu" if run.device.type == "cuda" else "cpu",
            device_id=run.device.index,
        )
        with loader:
            for got in loader:
                images = got.views["middle"][:, 0, :, edge : edge + size, edge : edge + size]
                yield got.position, got.ids, images.to(run.device).contiguous()


def _size(recipe: Recipe) -> int:
    """Pixels a side of the teacher's largest crops (the student's, where the teacher has none)."""
    views = [view for view in recipe.views if view.role != "student"] or list(recipe.views)
    return max(view.size for view in views)


def _head(network: nn.Module, name: str) -> nn.Module:
    heads: Any = network.heads
    if name not in heads:
        raise RecipeError(f"objective {name} asks for embeddings of all images, but the student has no head {name}")
    return heads[name]


@contextmanager
def _teacher(run: Run) -> Iterator[Any]:
    """The teacher as one ordinary module on every rank. Collective.

    Where ZeRO 3 scatters its weights, rank 0 puts them together and tells the others, tensor by tensor.
    """
    teacher = run.engine.teacher
    if teacher.stage < 3:
        yield teacher.module
        return

    def build() -> nn.Module:
        return make_teacher(run.build())

    with teacher.plain(build) as whole:
        network = build() if whole is None else whole
        for tensor in (*network.parameters(), *network.buffers()):
            tensor.data.copy_(gather(tensor.data.unsqueeze(0).contiguous())[0])
        yield network
