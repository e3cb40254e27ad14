"""DALI's own webdataset reader with nothing behind it: encoded bytes, for benchmarks and comparisons."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from nvidia.dali import fn
from nvidia.dali.pipeline import pipeline_def


@pipeline_def(num_threads=1)
def _reader(paths: list[str], indices: list[str]) -> Any:
    return fn.readers.webdataset(paths=paths, index_paths=indices, ext=["jpg"], dont_use_mmap=True)


def raw_webdataset(paths: list[str], indices: list[str], batch: int, samples: int) -> Iterator[np.ndarray]:
    """The first `samples` encoded images of the tars, uint8 [n] each; `indices` are their .idx files."""
    pipeline: Any = _reader(paths, indices, batch_size=batch, device_id=None)
    pipeline.build()
    left = samples
    while left:
        (output,) = pipeline.run()
        for number in range(min(left, batch)):
            yield output.at(number)
        left -= min(left, batch)
