"""Carries draws out on CPUs: each image is decoded once into memory that stays, and each crop made in one pass.

Order and arithmetic are reference.py's, in float32 (kernels.py), so that views differ from the reference by rounding
alone, and from DALI's by no more than DALI does. Threads take images in turn, and hold the GIL only to pick the next.
What comes out for an image depends on that image and its draws alone, bit for bit: each crop is computed by itself, by
the same instructions, whoever else is in the batch. Views lie in memory that comes back when they are dropped.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..draws import Draws, Plan
from ..slabs import Slabs
from . import DecodeError, kernels
from .colour import MEAN, STD, colour_matrices
from .jpeg import Pixels

if TYPE_CHECKING:
    from .strong_forms import StrongForms

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.uint8)
DECODED, STRENGTHENED = 0, 1  # for profiles: no crop at all, or only what a strong form does before the cut

_TO_BITS = {torch.float16: kernels.to_half, torch.bfloat16: kernels.to_bfloat}


class _Worker:
    """What one thread needs for itself: memory for an image, its strong forms, blurred crops, and another dtype's."""

    def __init__(self, plan: Plan) -> None:
        most = max(view.size for view in plan.views)
        self.pixels = Pixels(kernels.SLACK)
        self.scratch = np.empty(3 * most * most + 1, np.float32)
        self.wide = np.empty(max(3 * view.count * view.size**2 for view in plan.views), np.float32)
        self.strong: Callable[[Draws, int, NDArray[np.uint8]], StrongForms] | None = None
        if plan.strong.any():
            # Only here: the first process on a machine compiles its loops for a quarter of a minute.
            from .strengthen import Room
            from .strong_forms import StrongForms

            room = Room(kernels.SLACK)
            self.strong = lambda draws, slot, pixels: StrongForms(plan, draws, slot, pixels, room)


@dataclass
class _Job:
    """One batch on its way through the threads."""

    data: Sequence[NDArray[np.uint8]]
    sizes: list[list[int]]
    boxes: NDArray[np.float64]  # [B, V, 4]
    colours: NDArray[np.float32]  # [B, V, 12]
    mirrored: list[list[bool]]
    sigma: list[list[float]]
    threshold: NDArray[np.float32]  # [B, V]
    draws: Draws
    views: list[NDArray[Any]]  # [B, n, 3, H, W] each; 16-bit floats as their bits
    turn: Iterator[int]
    bad: list[int]


class CpuExecutor:
    """Decodes and crops on `threads` threads, the caller's among them. DESIGN 3.3's executor for machines without a GPU.

    dtype: of the views. uint8 is not normalised: 0 ... 255, rounded. The other threads end with `close()`, or when the
    executor is dropped.
    """

    def __init__(
        self, plan: Plan, *, threads: int = 1, dtype: torch.dtype = torch.float32, upto: int = kernels.FINISHED
    ) -> None:
        if dtype not in DTYPES:
            raise ValueError(f"dtype {dtype}: views are made as {', '.join(str(known)[6:] for known in DTYPES)}")
        if threads < 1:
            raise ValueError(f"threads: {threads}; at least the caller's own is needed")
        if dtype == torch.uint8 and plan.strong.any():
            raise ValueError("dtype uint8: the noise of random erasing does not fit; views with `strong` need floats")
        self.plan, self.dtype, self.threads = plan, dtype, threads
        self._upto = upto  # how far a crop is taken; all that a profile needs, and nothing when it is not
        mean, std = (np.zeros(3), np.ones(3)) if dtype == torch.uint8 else (255 * np.array(MEAN), 255 * np.array(STD))
        offset = 0.5 if dtype == torch.uint8 else 0.0
        self._normal = np.stack([1 / std, offset - mean / std]).astype(np.float32)
        self._slabs = [Slabs() for _ in plan.views]
        self._workers = [_Worker(plan) for _ in range(threads)]
        # Crop -> its view's index, its index in the view, its size, its filter.
        self._crops = [
            (owner, copy, plan.views[owner].size, plan.views[owner].filter == "bicubic")
            for owner, copy in zip(plan.owner, plan.copies, strict=True)
        ]
        self._pool = ThreadPoolExecutor(threads - 1, "gristmill-cpu") if threads > 1 else None
        self.close = (lambda: None) if self._pool is None else weakref.finalize(self, self._pool.shutdown)

    def run(self, data: Sequence[NDArray[np.uint8]], draws: Draws) -> dict[str, Tensor]:
        """Encoded images and their draws -> for each view's name a tensor [B, n, 3, H, W], normalised.

        DecodeError names the slots of images that do not decode, or to another size than was drawn for; the executor
        can be used again at once. One thread at a time.
        """
        if not data or len(data) != len(draws.params):
            raise ValueError(f"{len(data)} images and {len(draws.params)} draws: give one for each, and at least one")
        views = [self._empty(index, len(data)) for index in range(len(self.plan.views))]
        job = _Job(
            data=data,
            sizes=draws.sizes.tolist(),
            boxes=draws.params[..., :4].astype(np.float64),
            colours=colour_matrices(draws.params).reshape(*draws.params.shape[:2], 12),
            mirrored=(draws.column("flip") > 0).tolist(),
            sigma=draws.column("sigma").tolist(),
            threshold=draws.column("solarize"),
            draws=draws,
            views=views,
            turn=iter(range(len(data))) if self._pool is None else itertools.count(),
            bad=[],
        )
        others = [] if self._pool is None else [self._pool.submit(self._work, job, w) for w in self._workers[1:]]
        try:
            self._work(job, self._workers[0])
        finally:
            errors = [other.exception() for other in others]  # waits: nobody may write into views that are given up
        for error in errors:
            if error is not None:
                raise error
        if job.bad:
            raise DecodeError(sorted(job.bad))
        return {view.name: self._tensor(array) for view, array in zip(self.plan.views, views, strict=True)}

    def _empty(self, index: int, images: int) -> NDArray[Any]:
        view = self.plan.views[index]
        kind = np.dtype({4: np.float32, 2: np.uint16, 1: np.uint8}[self.dtype.itemsize])
        shape = images, view.count, 3, view.size, view.size
        return self._slabs[index].take(int(np.prod(shape)) * kind.itemsize).view(kind).reshape(shape)

    def _tensor(self, array: NDArray[Any]) -> Tensor:
        tensor = torch.from_numpy(array.view(np.int16) if array.dtype == np.uint16 else array)
        return tensor if tensor.dtype == self.dtype else tensor.view(self.dtype)

    def _work(self, job: _Job, worker: _Worker) -> None:
        """One thread's part: image after image, as long as there are any."""
        for slot in job.turn:  # next() on it is atomic
            if slot >= len(job.data):
                return
            width, height = job.sizes[slot]
            pixels = worker.pixels.decode(job.data[slot], width, height)
            if pixels is None:
                job.bad.append(slot)
            elif not job.bad and self._upto > DECODED:  # with a bad one the batch comes again
                self._cut_all(job, slot, pixels, width, height, worker)

    def _cut_all(
        self, job: _Job, slot: int, pixels: NDArray[np.uint8], width: int, height: int, worker: _Worker
    ) -> None:
        boxes, colours, threshold = job.boxes[slot], job.colours[slot], job.threshold[slot]
        mirrored, sigma = job.mirrored[slot], job.sigma[slot]
        direct = self.dtype == torch.float32
        strong = worker.strong and worker.strong(job.draws, slot, pixels)
        for v, (owner, copy, size, cubic) in enumerate(self._crops):
            target = job.views[owner][slot, copy]
            out = target if direct else worker.wide[: target.size].reshape(target.shape)
            source = pixels, width, height, boxes[v]
            if strong is not None and strong.changed[v]:
                source = strong.source(v, size, cubic)
            if self._upto < kernels.RESIZED:
                continue
            kernels.cut(
                *(*source, size, cubic, mirrored[v], sigma[v], colours[v], threshold[v]),
                *(self._normal, worker.scratch, out, self._upto),
            )
            if strong is not None and self._upto == kernels.FINISHED:
                strong.erase(v, out)
            if self.dtype in _TO_BITS:
                _TO_BITS[self.dtype](out.reshape(-1), target.reshape(-1))
            elif not direct:
                np.copyto(target, out, casting="unsafe")
