"""Whether DALI works at all: two small pictures decoded and resized, for `gristmill doctor`."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import nvidia.dali as dali
import simplejpeg
from nvidia.dali import fn
from nvidia.dali.pipeline import Pipeline


def decode_two(device: str, card: int | None) -> tuple[str, float]:
    """DALI's release, and seconds for two pictures. RuntimeError where they come out wrong.

    device: "cpu" or "mixed"; card: number of the GPU, None without one.
    """
    grey = np.full((32, 48, 3), 128, np.uint8)
    pictures = [np.frombuffer(simplejpeg.encode_jpeg(grey), np.uint8)] * 2
    begin = time.perf_counter()
    pipeline = Pipeline(batch_size=2, num_threads=1, device_id=card)
    with pipeline:
        encoded = fn.external_source(lambda: pictures, batch=True)
        small: Any = fn.resize(fn.decoders.image(encoded, device=device), size=[16, 16])
        pipeline.set_outputs(small)
    pipeline.build()
    (output,) = pipeline.run()
    array = np.asarray(output.as_cpu().at(1) if card is not None else output.at(1))
    if array.shape != (16, 16, 3) or abs(int(array.mean()) - 128) > 2:
        raise RuntimeError(f"a grey picture came out as {array.shape} with mean {array.mean():.0f}")
    return dali.__version__, time.perf_counter() - begin
