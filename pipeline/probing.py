"""Every healthy image of a data set once, unaltered, for probes: the loader's other use."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from ..shards.manifest import Manifest
from ..shards.quarantine import Quarantine
from ..shards.tombstones import Tombstones
from .batch import Executor
from .loader import Loader
from .order import Ints, Order, Readable, Sequential
from .source import Places
from .views import StreamConfig, View


class _Spared:
    """An order in which removed samples are known, so that they are never read."""

    def __init__(self, order: Order | Sequential, places: Places) -> None:
        self.order, self.samples, self.removed = order, order.samples, places.hold

    def locate(self, positions: ArrayLike) -> tuple[Ints, Ints]:
        return self.order.locate(positions)

    def pool(self, position: int) -> Sequential:
        return self.order.pool(position)


def probe_batches(
    manifest: Manifest,
    size: int,
    batch: int,
    *,
    limit: int | None = None,
    quarantine: Quarantine | None = None,
    config: StreamConfig | None = None,
    executor: Executor | None = None,
    device: Literal["cpu", "gpu"] = "cpu",
    device_id: int | None = None,
) -> Iterator[tuple[list[str], Tensor]]:
    """Every healthy image once, in the manifest's order: (keys, images float32 [b, 3, size, size]), b <= batch.

    Of a data set larger than `limit`, that many images, the same ones every time, from all over it. The middle square
    of each image, unaltered but for resizing and normalisation. Unlike training, a probe leaves damaged and removed
    images out: a substitute would be in it twice, and be its own nearest neighbour.
    """
    samples = manifest.samples if limit is None else min(limit, manifest.samples)
    plain = Sequential(manifest.counts) if samples == manifest.samples else Order(manifest.counts, seed=0)
    places = Tombstones.of(manifest).places(manifest.urls)
    order: Readable = _Spared(plain, Places(places)) if len(places) else plain
    view = View.model_validate({"name": "probe", "size": size, "augment": "none"})
    with tempfile.TemporaryDirectory(prefix="gristmill-") as scratch:
        loader = Loader(
            manifest,
            [view],
            config or StreamConfig.model_validate({}),
            order=order,
            stop=samples,
            batch=min(batch, samples),
            quarantine=Quarantine(Path(scratch) / "quarantine.jsonl") if quarantine is None else quarantine,
            executor=executor,
            device=device,
            device_id=device_id,
        )
        with loader:
            for got in loader:
                meant = np.stack(order.locate(np.arange(got.position, got.position + len(got.keys))), axis=1)
                whole = (got.ids == meant).all(axis=1)
                if whole.any():
                    keys = [key for key, good in zip(got.keys, whole, strict=True) if good]
                    images = got.views["probe"][:, 0]
                    yield keys, images if whole.all() else images[torch.from_numpy(whole).to(images.device)]
