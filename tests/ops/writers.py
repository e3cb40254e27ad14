"""What tests of the writer share: small contents of one number, and the steps of a loop that settles them."""

import threading
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from gristmill.ops.checkpoint import Content, Part, newest
from gristmill.ops.stores import LocalStore
from gristmill.ops.writer import Settled, Writer
from torch import Tensor

ONE = list  # `total` of a single rank


def content(tensor: Tensor, start: int = 0, size: int | None = None) -> Content:
    part = Part("student", "w", start, (size or tensor.numel(),), tensor)
    return Content([part], {"objectives": {"queue": torch.ones(9)}}, {"cursor": "{}"})


def halves(value: float, size: int = 1000) -> list[Content]:
    tensor = torch.full((size,), value)
    return [content(tensor[: size // 3], 0, size), content(tensor[size // 3 :], size // 3, size)]


def write(store: LocalStore, position: int, value: float = 1.0, keep: int = 9, keep_every: int = 0) -> Settled | None:
    writer = Writer(store, 0, 1, keep, keep_every)
    writer.begin(position, content(torch.full((1000,), value)))
    return writer.finish(ONE)


def value(store: LocalStore) -> tuple[int, float]:
    """(position, the number in it) of the newest whole checkpoint."""
    saved, _ = newest(store)
    assert saved is not None
    numbers = saved.assembled("student")["w"].unique().tolist()
    assert len(numbers) == 1
    return saved.position, numbers[0]


def step(writers: list[Writer]) -> list[Settled | None]:
    """What the loop does at each step: flags added up over ranks, then settled on all."""
    sums = [sum(column) for column in zip(*(writer.flags() for writer in writers), strict=True)]
    return [writer.settle(*sums) for writer in writers]


def steps(writers: list[Writer]) -> list[Settled]:
    """Steps until the write is settled, on all ranks at the same one."""
    until = time.monotonic() + 120
    while time.monotonic() < until:
        settled = step(writers)
        if any(settled):
            assert all(settled)
            return [each for each in settled if each]
        time.sleep(0.001)
    raise TimeoutError("the write was not settled")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class Gated(LocalStore):
    """Writes files only once `gate` is set."""

    def __init__(self, root: Path):
        super().__init__(root)
        self.gate = threading.Event()

    def put(self, position: int, name: str, chunks: Iterable[memoryview]) -> tuple[str, int]:
        assert self.gate.wait(120)
        return super().put(position, name, chunks)
