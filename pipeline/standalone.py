"""The loader on its own, for any training loop: batches of torch tensors, exact to the sample, resumable anywhere.

    from gristmill.pipeline import images

    with images("shards/train", batch=256, size=224) as stream:    # or views=[View(name="global", count=2, size=224), ...]
        stream.seek(saved_state)                                   # a string; leave it out to begin
        for batch in stream:
            loss = step(batch.views["image"])                      # float32 [256, 1, 3, 224, 224], normalised
            saved_state = stream.state()                           # under 1 kB, of any place in any number of images
            if stream.epoch == 3:
                break

Several ranks give `rank` and `world`, and all the same `batch` over all of them; state and order do not depend on these.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..shards.errors import GristmillError
from ..shards.manifest import Manifest
from ..shards.mirror import MirroredManifest, open_manifest
from ..shards.quarantine import Quarantine
from .batch import Batch, Executor
from .cursor import Cursor
from .loader import Loader
from .quality import suggest
from .source import Source
from .stats import Stage, Stats
from .stream import Stream
from .views import Augment, CacheConfig, StreamConfig, View

Place = str | Path | Mapping[str, Any]


class ImagesError(GristmillError, ValueError):
    """Arguments of which no stream can be made."""


class Images:
    """Endless iterator of Batch; made by `images`. A context manager."""

    def __init__(self, stream: Stream, loader: Loader, scratch: tempfile.TemporaryDirectory[str] | None) -> None:
        self.stream, self.loader = stream, loader
        self._cursor, self._scratch = stream.cursor, scratch

    def __iter__(self) -> Images:
        return self

    def __next__(self) -> Batch:
        batch = next(self.loader)
        # The global batch, on every rank: the state is the same on all of them.
        self._cursor = self._cursor.advance(self.loader.position - self._cursor.position, committed=True)
        return batch

    @property
    def position(self) -> int:
        """Images given so far, over all ranks."""
        return self._cursor.position

    @property
    def epoch(self) -> int:
        """How often everything was given from end to end."""
        return self.stream.epoch(self.position)

    @property
    def stats(self) -> Stats:
        return self.loader.stats

    def bottleneck(self) -> Stage:
        """What limits the stream: "storage", "reader", "augment", "consumer"; "none" before anything happened."""
        return self.loader.bottleneck()

    def state(self) -> str:
        """Where the stream stands, behind the last batch that was given: JSON for `seek`, in this or another process."""
        return self._cursor.to_json()

    def seek(self, state: str | int) -> None:
        """Go on from a state, or from a position. CursorError if the state is of other data or another order."""
        if isinstance(state, int):
            if state < 0:
                raise ImagesError(f"cannot seek to {state}: positions count images from 0")
            self._cursor = replace(self.stream.cursor, position=state, trained=state, skipped=())
        else:
            cursor = Cursor.from_json(state)
            grown = Stream(
                self.stream.sources, cursor.seed, cursor.lanes, cursor.window, cursor=cursor, take_up="never"
            )
            mine = self.stream.cursor
            if (cursor.seed, cursor.lanes, cursor.window) != (mine.seed, mine.lanes, mine.window) or (
                grown.cursor.grown != mine.grown or grown.cursor.mixture != mine.mixture
            ):
                raise ImagesError(
                    "the state is of another order: make the stream anew with images(..., state=...), which takes it over"
                )
            self._cursor = cursor
        self.loader.seek(self._cursor.position)

    def close(self) -> None:
        """Stop the threads."""
        self.loader.close()
        if self._scratch is not None:
            self._scratch.cleanup()

    def __enter__(self) -> Images:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def images(
    data: Place | Sequence[Place],
    batch: int,
    *,
    views: Sequence[View] | None = None,
    size: int = 224,
    augment: str | Augment = "none",
    seed: int | None = None,
    state: str | None = None,
    rank: int = 0,
    world: int = 1,
    stop: int | None = None,
    quarantine: str | Path | None = None,
    config: StreamConfig | None = None,
    executor: Executor | None = None,
    device: Literal["cpu", "gpu"] = "cpu",
    device_id: int | None = None,
) -> Images:
    """An endless, shuffled stream of the images in `data`: a folder or url with a manifest, or a list of them to mix.

    An entry of a list may be {"path": ..., "weight": ..., "where": ...}. `views` are crops to cut of every image; without
    them it is one, "image", of `size` pixels, the middle square unless `augment` names a preset ("weak", "moco", ...).
    `batch` is over all `world` ranks. `stop` ends the stream at a position (one rank only). `config` sets seed, lanes,
    window, prefetch, threads and cache; without it the seed is `seed` (0), lanes and window give a full shuffle of up to 4
    million images. `quarantine`
    is a file that keeps damaged samples from one run to the next; what is delivered does not depend on it.
    """
    places = [data] if isinstance(data, str | Path | Mapping) else list(data)
    entries = [dict(place) if isinstance(place, Mapping) else {"path": place} for place in places]
    manifests, sources = open_sources(entries, config.cache if config else None)
    cursor = None if state is None else Cursor.from_json(state)
    if config is None:
        # A state brings its own along: of data that grew since, others would be suggested.
        counts = np.concatenate([source.selected for source in sources])
        lanes, window = suggest(counts) if cursor is None else (cursor.lanes, cursor.window)
        config = StreamConfig.model_validate({"seed": seed or 0, "lanes": lanes, "window": window})
    elif seed is not None and seed != config.seed:
        raise ImagesError(f"seed is {seed}, and config.seed is {config.seed}: say it once, in the config")
    stream = Stream(
        sources,
        config.seed,
        config.lanes,
        config.window,
        cursor=cursor,
        take_up=config.take_up,
        mixture_from=config.mixture_from,
    )
    if views is None:
        views = [View.model_validate({"name": "image", "size": size, "augment": augment})]
    scratch = tempfile.TemporaryDirectory(prefix="gristmill-") if quarantine is None else None
    loader = Loader(
        manifests,
        list(views),
        config,
        batch=batch,
        quarantine=Quarantine(Path(scratch.name) / "quarantine.jsonl" if scratch else Path(str(quarantine))),
        order=stream,
        start=stream.cursor.position,
        stop=stop,
        executor=executor,
        device=device,
        device_id=device_id,
        rank=rank,
        world=world,
    )
    return Images(stream, loader, scratch)


def open_sources(
    entries: Sequence[Mapping[str, Any]], cache: CacheConfig | None = None
) -> tuple[list[Manifest], list[Source]]:
    """Manifests and sources of entries {"path": folder or url, "weight": 1.0, "where": ""}; copies go to the cache."""
    manifests, sources = [], []
    folder = cache.folder / "manifests" if cache else None
    for entry in entries:
        if unknown := sorted(entry.keys() - {"path", "weight", "where"}):
            raise ImagesError(f"data: unknown key {unknown[0]!r}; an entry has path, weight and where")
        manifest = open_manifest(entry["path"], folder)
        where = str(entry.get("where") or "")
        if where.strip() and isinstance(manifest, MirroredManifest):
            manifest.complete()
        manifests.append(manifest)
        sources.append(Source.of(manifest, where=where, weight=float(entry.get("weight", 1.0))))
    return manifests, sources
