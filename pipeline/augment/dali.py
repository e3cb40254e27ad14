"""Carries draws out with DALI: each image is decoded once and all crops cut of it; the same graph for CPU and GPU.

decode.py decodes, packed.py turns the draws into the numbers that the graphs in graph.py read, one graph a view; here
they are put together and handed a batch at a time. Nothing is prefetched inside: the loader's threads do that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali.tensors import TensorCPU, TensorGPU, TensorListCPU, TensorListGPU
from torch import Tensor

from ..draws import Draws, Plan
from . import DecodeError
from .decode import Decoder
from .graph import Device, crops_of
from .packed import pack

DTYPES = (torch.float32, torch.float16)


class DaliExecutor:
    """Decodes and runs `crops_of` of each view for batches of up to `batch` images.

    device "cpu" needs no driver and no `device_id`; "gpu" decodes on the GPU `device_id` (default: torch's current one)
    and leaves the views there. dtype: of the views, float32 or float16. What comes out for an image depends on that image
    and its draws alone, bit for bit.
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
        self._threads = threads
        self._graphs = self._built()
        self._read: list[Any] = []  # images that graphs on a GPU may still read after `run`

    def _built(self) -> list[Any]:
        """A graph a view."""
        how: dict[str, Any] = {"num_threads": self._threads, "device_id": self.device_id}
        half = self.dtype == torch.float16
        graphs: list[Any] = [
            crops_of(self.plan, view, self.device, half, batch_size=self.batch * view.count, **how)
            for view in self.plan.views
        ]
        for graph in graphs:
            graph.build()
        return graphs

    def run(self, data: Sequence[NDArray[np.uint8]], draws: Draws) -> dict[str, Tensor]:
        """Encoded images and their draws -> for each view's name a tensor [B, n, 3, H, W], normalised.

        1 <= B <= batch. The tensors are DALI's own memory, which they keep alive. DecodeError names the slots of images
        that do not decode, or to another size than was drawn for; the executor can be used again at once.
        """
        if not 1 <= len(data) <= self.batch or len(data) != len(draws.params):
            raise ValueError(f"{len(data)} images and {len(draws.params)} draws; the graph takes 1 ... {self.batch}")
        self._read = []  # what is decoded now comes behind the last graphs on the stream: it may have their images' place
        images = self._decoder.decode(data)
        # A box outside of its image would not be an error to DALI, but the end of the process.
        noted = [(height, width, 3) for width, height in draws.sizes.tolist()]
        bad = [slot for slot, image in enumerate(images) if image is None or tuple(image.shape) != noted[slot]]
        if bad:
            raise DecodeError(bad)
        self._read = images if self.device_id is not None else []
        self._graphs = self._graphs or self._built()
        try:
            made = self._made(images, pack(self.plan, draws))
        except BaseException:
            self._graphs = []  # one that was fed or begun would give this batch's crops to the next: built anew
            raise
        named = zip(self.plan.views, map(torch.from_dlpack, made), strict=True)
        return {view.name: crops.unflatten(0, (-1, view.count)) for view, crops in named}

    def _made(self, images: list[Any], packed: NDArray[np.float32]) -> list[Any]:
        """What the graphs make of images and numbers [B, V, width]: a DALI tensor [B * n, 3, H, W] a view."""
        gpu = self.device_id is not None
        stream = torch.cuda.current_stream(self.device_id) if gpu else None
        kinds: tuple[Any, Any] = (TensorGPU, TensorListGPU) if gpu else (TensorCPU, TensorListCPU)
        one, many = kinds
        given = [one(image, "HWC") for image in images]
        for view, graph in zip(self.plan.views, self._graphs, strict=True):
            repeated = many([image for image in given for _ in range(view.count)], "HWC", contiguous=False)
            graph.feed_input("image", repeated, cuda_stream=stream)
            rows = packed[:, self.plan.columns[view.name]]
            graph.feed_input("packed", np.ascontiguousarray(rows.reshape(-1, rows.shape[-1])))
            graph.schedule_run()
        return [graph.outputs(stream)[0].as_tensor() for graph in self._graphs]
