"""Carries draws out with DALI: each image is decoded once and all crops cut of it; the same graph for CPU and GPU.

Order: decode (decode.py; upright, RGB) -> cut and resize, mirrored by a box that runs backwards -> blur where drawn ->
colours, one matrix a crop (colour.py) -> cut to 0 ... 255 -> solarise where drawn -> normalise; float32 from the
resize on. Blur comes before colours, not after as in DINO: they commute but for what is cut off, and crops of one size
are then stacked, so that the rest is one operator a view instead of one a crop. All numbers of a batch enter as one
packed array and are sliced as vectors, since each slice costs its own operator. The filter is triangular and
antialiased, torchvision's default; bicubic takes half as long again. reference.py says plainly what this graph
computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali import fn, math, types
from nvidia.dali.pipeline import pipeline_def
from torch import Tensor

from ..draws import NEVER, Draws, Plan
from . import DecodeError
from .colour import MEAN, STD, colour_matrices
from .decode import Decoder

Device = Literal["cpu", "gpu"]

# The packed array, float32 [B, V, 18]: box start (y, x), box end (y, x), sigma, solarise threshold, 3 x 4 colours.
_START, _END, _SIGMA, _THRESHOLD, _COLOURS, _WIDTH = slice(0, 2), slice(2, 4), 4, 5, slice(6, 18), 18


def pack(draws: Draws) -> NDArray[np.float32]:
    """Draws as the graph reads them: float32 [B, V, 18]."""
    packed = np.empty((*draws.params.shape[:2], _WIDTH), np.float32)
    flip = draws.column("flip") > 0
    x0, x1 = draws.column("x0"), draws.column("x1")
    packed[..., 0], packed[..., 1] = draws.column("y0"), np.where(flip, x1, x0)
    packed[..., 2], packed[..., 3] = draws.column("y1"), np.where(flip, x0, x1)
    packed[..., _SIGMA], packed[..., _THRESHOLD] = draws.column("sigma"), draws.column("solarize")
    packed[..., _COLOURS] = colour_matrices(draws.params).reshape(*draws.params.shape[:2], 12)
    return packed


@pipeline_def(enable_conditionals=True, prefetch_queue_depth=1)
def multi_crop(plan: Plan, device: Device) -> Any:
    """The graph: decoded image and packed numbers in, [n, 3, H, W] a sample out for each view in the recipe's order."""
    # DALI's nodes are annotated as Any: its stubs say "node or list of nodes", and that a node has no truth value.
    image: Any = fn.external_source(name="image", device=device, dtype=types.UINT8, ndim=3, layout="HWC")
    packed: Any = fn.external_source(name="packed", dtype=types.FLOAT, ndim=2)
    outputs: list[Any] = []
    for view in plan.views:
        first = plan.columns[view.name].start
        last = plan.columns[view.name].stop
        crops = []
        for v in range(first, last):
            crop: Any = fn.resize(
                image,
                size=[view.size, view.size],
                roi_start=packed[v, _START],
                roi_end=packed[v, _END],
                interp_type=types.INTERP_LINEAR,
                antialias=True,
                dtype=types.FLOAT,
            )
            # What can never be drawn is left out of the graph, what is always drawn is not asked for.
            if plan.blur[v] == 1:
                crop = fn.gaussian_blur(crop, sigma=packed[v, _SIGMA])
            elif plan.blur[v] > 0:
                sigma = packed[v, _SIGMA]
                if sigma > 0:
                    crop = fn.gaussian_blur(crop, sigma=sigma)
            crops.append(crop)
        stacked: Any = fn.stack(*crops, axis_name="F")
        if plan.coloured[first:last].any():
            matrices = fn.reshape(packed[first:last, _COLOURS], shape=[last - first, 3, 4])
            stacked = fn.coord_transform(stacked, MT=fn.per_frame(matrices))
            stacked = math.clamp(stacked, 0.0, 255.0)
        if plan.solarize[first:last].any():
            threshold: Any = fn.reshape(packed[first:last, _THRESHOLD], shape=[last - first, 1, 1, 1])
            lowest: Any = fn.reductions.min(threshold)
            if lowest < NEVER:
                if device == "gpu":
                    threshold = threshold.gpu()
                stacked = stacked + (stacked >= threshold) * (255.0 - 2.0 * stacked)
        normal = fn.crop_mirror_normalize(
            fn.reshape(stacked, layout="FHWC"),  # arithmetic forgets the layout
            mean=[255 * value for value in MEAN],
            std=[255 * value for value in STD],
            output_layout="FCHW",
            dtype=types.FLOAT,
        )
        outputs.append(normal)
    return tuple(outputs)


class DaliExecutor:
    """Decodes and runs `multi_crop` for batches of up to `batch` images.

    device "cpu" needs no driver and no `device_id`; "gpu" decodes on the GPU `device_id` (default: torch's current one)
    and leaves the views there. What comes out for an image depends on that image and its draws alone, bit for bit.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        device: Device = "cpu",
        device_id: int | None = None,
        threads: int = 1,
        batch: int,
    ) -> None:
        if device == "gpu" and device_id is None:
            device_id = torch.cuda.current_device()
        self.plan = plan
        self.device: Device = device
        self.device_id = device_id if device == "gpu" else None
        self.batch = batch
        self._decoder = Decoder(device, self.device_id, threads)
        how: dict[str, Any] = {"batch_size": batch, "num_threads": threads, "device_id": self.device_id}
        self._pipeline: Any = multi_crop(plan, device, **how)
        self._pipeline.build()

    def run(self, data: Sequence[NDArray[np.uint8]], draws: Draws) -> dict[str, Tensor]:
        """Encoded images and their draws -> for each view's name a float32 tensor [B, n, 3, H, W], normalised.

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
        self._pipeline.feed_input("packed", pack(draws))
        stream = {} if self.device_id is None else {"cuda_stream": torch.cuda.current_stream(self.device_id)}
        outputs = self._pipeline.run(**stream)
        named = zip(self.plan.views, outputs, strict=True)
        return {view.name: torch.from_dlpack(output.as_tensor()) for view, output in named}
