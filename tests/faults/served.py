"""The data set behind a server, the loader's own client, and what it counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gristmill.pipeline.loader import Loader
from gristmill.pipeline.views import CacheConfig, StreamConfig
from gristmill.shards.client import RemoteStats
from gristmill.shards.manifest import Manifest
from gristmill.shards.mirror import open_manifest
from gristmill.shards.remote import client_for
from gristmill.shards.retry import RetryPolicy

from ..faulty_http import FaultyServer
from .streams import CONFIG

TARS = [f"/set/{shard:06d}.tar" for shard in range(8)]


def publish(server: FaultyServer, root: Path) -> str:
    """Put a data set onto the server; the url of its folder."""
    for path in sorted(root.rglob("*")):
        if path.is_file():
            server.put(f"/set/{path.relative_to(root)}", path.read_bytes())
    return server.url("/set")


def mirrored(url: str, folder: Path) -> Manifest:
    """The manifest, with all its rows here, so that faults from now on meet shards alone."""
    manifest = open_manifest(url, folder, policy=RetryPolicy(first_pause=0.005, longest_pause=0.05, deadline=60.0))
    manifest.rows(0)
    return manifest


def cached(folder: Path, size: int, config: StreamConfig = CONFIG) -> StreamConfig:
    return config.model_copy(update={"cache": CacheConfig(folder=folder, bytes=size)})


def client_stats(loader: Loader) -> RemoteStats:
    """What the loader's requests met with."""
    return client_for(loader.reader._fetcher.policy).stats


def counted(stats: RemoteStats) -> dict[str, Any]:
    return {f"retried {reason}": count for reason, count in sorted(stats.retries.items())}
