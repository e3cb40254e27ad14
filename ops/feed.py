"""The data side of a run: the data sets that a recipe names, the stream over them, and this rank's loader.

All ranks must read one and the same stream, also when a data set grew between two of them opening it: rank 0 decides
(which shards are taken up, which removed samples are honoured) and its cursor is what the others build theirs from.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ..pipeline.cursor import Cursor
from ..pipeline.loader import Loader
from ..pipeline.quality import check_together, node_lanes
from ..pipeline.standalone import open_sources
from ..pipeline.stream import Stream
from ..shards.errors import GristmillError
from ..shards.places import is_remote
from ..shards.quarantine import Quarantine
from .recipe import Recipe, RecipeError

Everyones = Callable[[list[str]], list[str]]


class Feed:
    """Manifests, stream and cursor of a recipe on one rank. `begin` first; it is collective."""

    def __init__(self, recipe: Recipe, rank: int, world: int) -> None:
        self.recipe, self.rank, self.world = recipe, rank, world
        entries = [source.model_dump() for source in recipe.sources]
        self.manifests, self.sources = open_sources(entries, recipe.stream.cache)
        selected = sum(int(source.selected.sum()) for source in self.sources)
        if selected < recipe.batch:
            names = ", ".join(source.name for source in self.sources)
            raise RecipeError(f"batch: {recipe.batch} is more than the {selected} images of {names}")
        self.ranks_per_node = min(world, int(os.environ.get("LOCAL_WORLD_SIZE", world)))
        self.stream: Stream | None = None
        self._starts: np.ndarray | None = None

    def begin(self, cursor: Cursor | None, everyones: Everyones) -> Cursor:
        """Set the stream up, anew or from a checkpoint's cursor; the cursor to go on with. Collective.

        Raises CursorError, on all ranks, if the data are not those of the cursor.
        """
        told, stream, error = "", None, None
        if self.rank == 0:
            try:
                stream = self._stream(cursor, first=True)
                self._check_cache(stream)
                told = stream.cursor.to_json()
            except GristmillError as problem:
                error, told = problem, f"!{problem}"
        told = everyones([told])[0]
        if error is not None:
            raise error
        if told.startswith("!"):
            raise RecipeError(told[1:])
        if stream is None:
            stream = self._stream(Cursor.from_json(told), first=False)
        self.stream = stream
        return stream.cursor

    @property
    def images(self) -> int:
        """How many images the data sets have together, the left out ones included: what `index` counts."""
        assert self.stream is not None
        return int(self.stream.counts.sum())

    def index(self, ids: np.ndarray) -> Tensor:
        """Numbers of images, int64 [n] on the host, of their places (shard, row) [n, 2]: shard by shard, row by row."""
        assert self.stream is not None
        if self._starts is None or len(self._starts) != len(self.stream.counts):
            self._starts = np.concatenate([[0], np.cumsum(self.stream.counts)])[:-1]
        return torch.from_numpy(self._starts[ids[:, 0]] + ids[:, 1])

    def go_back(self, now: Cursor, then: Cursor) -> Cursor:
        """The cursor of an earlier checkpoint of this run, with what was decided about the data since: growth, weights."""
        return replace(now, position=then.position, trained=then.trained, skipped=then.skipped)

    def loader(self, position: int, quarantine: Quarantine, plan, device: str, device_id: int | None) -> Loader:
        """This rank's share of batches from a position on."""
        assert self.stream is not None
        return Loader(
            self.manifests,
            plan,
            self.recipe.stream,
            order=self.stream,
            start=position,
            batch=self.recipe.batch,
            quarantine=quarantine,
            device="gpu" if device == "cuda" else "cpu",
            device_id=device_id,
            rank=self.rank,
            world=self.world,
            lanes=self._lanes(),
        )

    def _stream(self, cursor: Cursor | None, *, first: bool) -> Stream:
        stream = self.recipe.stream
        return Stream(
            self.sources,
            stream.seed,
            stream.lanes,
            stream.window,
            cursor=cursor,
            take_up=stream.take_up if first else "never",
            mixture_from=stream.mixture_from if first else None,
        )

    def _check_cache(self, stream: Stream) -> None:
        """WorkingSetError if the cache cannot hold what a node needs at once."""
        cache = self.recipe.stream.cache
        if cache is None:
            return
        orders = [order.latest for order in stream.orders]
        sizes = []
        for manifest, order in zip(self.manifests, orders, strict=True):
            remote = np.array([is_remote(manifest.place(shard)) for shard in range(len(order.counts))])
            sizes.append(np.where(remote, manifest.shard_bytes[: len(remote)], 0))
        how = {"batch": self.recipe.batch, "ranks": self.world, "ranks_per_node": self.ranks_per_node}
        check_together(orders, sizes, cache.bytes, **how)

    def _lanes(self) -> np.ndarray | None:
        """The lanes that this node reads, if they are not all and can be told."""
        if len(self.sources) > 1:
            return None
        lanes = self.recipe.stream.lanes
        nodes = node_lanes(lanes, self.recipe.batch, self.world, self.ranks_per_node)
        mine = nodes[self.rank // self.ranks_per_node]
        return mine if len(mine) < lanes else None
