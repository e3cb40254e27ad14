"""The small way in: one folder of images, in this process, exact duplicates alone. What the demo and benchmarks use."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from .config import IngestConfig
from .report import IngestReport
from .run import ingest


def ingest_folder(
    source: str | Path,
    out: str | Path,
    *,
    shard_samples: int = 1024,
    holdout: float = 0.0,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    workers: int = 1,
) -> IngestReport:
    """Bring the images below `source` into `out/train` (and `out/probe`); `progress(done, total)` counts files."""
    config = IngestConfig(shard_samples=shard_samples, holdout=holdout, seed=seed, unit=256)
    shown = progress and (lambda stats: progress(stats.decided, stats.inputs))
    return ingest([source], out, config, workers=workers, progress=shown)
