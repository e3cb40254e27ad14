"""Encoded bytes to pixels with nvImageCodec, the decoder inside DALI, called by itself so that damage stays contained.

DALI 2.4's own `fn.decoders.image` throws when an image of a batch does not decode, and corrupts memory on the way: on
the CPU with batches of 32 and 64 the process died of a segmentation fault within a few such batches, whether the image
was cut short or no image at all. With the bad image last, or the batch small, it lived: the likely cause is that the
threads still write the images behind it. nvImageCodec called directly gives None for that image and decodes the
others, on the CPU to the same bits and in about the same time.

Which of a GPU's decoders takes an image must not depend on the batch, as they round differently: the hardware decoder,
where there is one, is offered all of them (by default it gets a share of the batch, and the rest goes to the others),
and what it cannot take falls to the next by its kind alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia import nvimgcodec
from torch import Tensor

# Fancy upsampling is libjpeg's; without it a GPU gives other colours than a CPU.
# Room is reserved once, for what photographs need, so that no batch waits for an allocation.
_OPTIONS = ":fancy_upsampling=1 nvjpeg_cuda_decoder:device_memory_padding=16777216 nvjpeg_cuda_decoder:host_memory_padding=8388608"
_IN_TURN = (nvimgcodec.HW_GPU_ONLY, nvimgcodec.GPU_ONLY, nvimgcodec.HYBRID_CPU_GPU, nvimgcodec.CPU_ONLY)


class Decoder:
    """`decode(data)` gives upright RGB images, uint8 [H, W, 3], on the device; None for each that does not decode."""

    def __init__(self, device: Literal["cpu", "gpu"], device_id: int | None, threads: int) -> None:
        self._device_id = device_id if device == "gpu" else None
        self._params = nvimgcodec.DecodeParams(apply_exif_orientation=True, color_spec=nvimgcodec.SRGB)
        if self._device_id is None:
            where, backends = nvimgcodec.NVIMGCODEC_DEVICE_CPU_ONLY, [nvimgcodec.Backend(nvimgcodec.CPU_ONLY)]
        else:
            fixed = {"load_hint": 1.0, "load_hint_policy": nvimgcodec.LoadHintPolicy.FIXED}
            where, backends = self._device_id, [nvimgcodec.Backend(kind, **fixed) for kind in _IN_TURN]
        self._decoder = nvimgcodec.Decoder(
            device_id=where, max_num_cpu_threads=threads, backends=backends, options=_OPTIONS
        )

    def decode(self, data: Sequence[NDArray[np.uint8]]) -> list[NDArray[np.uint8] | Tensor | None]:
        """Arrays of encoded bytes -> NumPy arrays (device "cpu") or torch tensors on the GPU, ready on its stream."""
        data = list(data)
        if self._device_id is None:
            images = self._decoder.decode(data, params=self._params)
            return [None if image is None else np.asarray(image) for image in images]
        stream = torch.cuda.current_stream(self._device_id)
        images = self._decoder.decode(data, params=self._params, cuda_stream=stream.cuda_stream)
        return [None if image is None else torch.from_dlpack(image) for image in images]
