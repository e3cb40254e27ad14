"""Carries draws out with DALI: each image is decoded once and all crops cut of it; the same graph for CPU and GPU.

decode.py decodes, packed.py turns the draws into the numbers that the graph in graph.py reads; here they are put
together and handed a batch at a time. Nothing is prefetched inside: the loader's threads do that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..draws import Draws, Plan
from . import DecodeError
from .decode import Decoder
from .graph import Device, multi_crop
from .packed import pack

DTYPES = (torch.float32, torch.float16)


class DaliExecutor:
    """Decodes and runs `multi_crop` for batches of up to `batch` images.

    device "cpu" needs no driver and no `device_id`; "gpu" decodes on the GPU `device_id` (default: torch's current one)
    and leaves the views there. dtype: of the views, float32 or float16. What comes out for an image depends on that image and its draws alone, bit for bit.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        device: Device = "cpu",
        device_id: int | None = None,
        threads: int = 1,
        batch: int,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if dtype not in DTYPES:
            raise ValueError(f"dtype {dtype}: DALI makes views as {' or '.join(str(known)[6:] for known in DTYPES)}")
        if device == "gpu" and device_id is None:
            device_id = torch.cuda.current_device()
        self.plan = plan
        self.device: Device = device
        self.device_id = device_id if device == "gpu" else None
        self.batch, self.dtype = batch, dtype
        self._decoder = Decoder(device, self.device_id, threads)
        how: dict[str, Any] = {"batch_size": batch, "num_threads": threads, "device_id": self.device_id}
        self._pipeline: Any = multi_crop(plan, device, dtype == torch.float16, **how)
        self._pipeline.build()

    def run(self, data: Sequence[NDArray[np.uint8]], draws: Draws) -> dict[str, Tensor]:
        """Encoded images and their draws -> for each view's name a tensor [B, n, 3, H, W], normalised.

        1 <= B <= batch. The tensors are DALI's own memory, which they keep alive. DecodeError names the slots of images
        that do not decode, or to another size than was drawn for; the executor can be used again at once.
        """
        if not 1 <= len(data) <= self.batch or len(data) != len(draws.params):
            raise ValueError(f"{len(data)} images and {len(draws.params)} draws; the graph takes 1 ... {self.batch}")
        images = self._decoder.decode(data)
        # A box outside of its image would not be an error to DALI, but the end of the process.
        noted = [(height, width, 3) for width, height in draws.sizes.tolist()]
        bad = [slot for slot, image in enumerate(images) if image is None or tuple(image.shape) != noted[slot]]
        if bad:
            raise DecodeError(bad)
        self._pipeline.feed_input("image", images)
        self._pipeline.feed_input("packed", pack(self.plan, draws))
        stream = {} if self.device_id is None else {"cuda_stream": torch.cuda.current_stream(self.device_id)}
        outputs = self._pipeline.run(**stream)
        named = zip(self.plan.views, outputs, strict=True)
        return {view.name: torch.from_dlpack(output.as_tensor()) for view, output in named}
