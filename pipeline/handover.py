"""How views come to the GPU that trains: on a stream beside training, whole before anybody hears of them.

Decoding and augmentation of the next batch so run beside the training of this one, and wait for none of it. Views are
copied once more, out of DALI's memory or out of the host's, into torch's, which knows by `received` that another stream
still reads them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor


@cache
def _stream(index: int) -> torch.cuda.Stream:
    """One for all loaders of a GPU: memory that torch keeps belongs to the stream on which it was taken."""
    return torch.cuda.Stream(index)


class Handover:
    """To one GPU (default: torch's current one).

    `sending` and `send` are for the thread that augments, `received` is for the one that uses the views.
    """

    def __init__(self, device_id: int | None = None) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device() if device_id is None else device_id)
        self._stream = _stream(self.device.index)

    @contextmanager
    def sending(self) -> Iterator[None]:
        """Inside, this thread works on the GPU and on the stream beside training: a new thread begins on GPU 0."""
        with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
            yield

    def send(self, views: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Inside of `sending`: views as they come from an executor, to views on the GPU, there when this returns."""
        sent = {name: self._copied(view) for name, view in views.items()}
        self._stream.synchronize()  # this thread waits, and no other; until then the executor's memory is its own
        return sent

    def _copied(self, view: Tensor) -> Tensor:
        if view.is_cuda:
            return view.to(self.device, copy=True)
        return view.pin_memory().to(self.device, non_blocking=True)

    def received(self, views: Mapping[str, Tensor]) -> None:
        """The calling thread's current stream uses these from now on: before it is done, nobody gets their memory."""
        for view in views.values():
            view.record_stream(torch.cuda.current_stream(self.device))
