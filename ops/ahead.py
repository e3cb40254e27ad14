"""One batch ahead of the step: what the loader gave, or why it could not, which all ranks hear of in the next verdict."""

from __future__ import annotations

from collections.abc import Iterator

from ..pipeline.loader import Batch, Loader
from ..shards.errors import GristmillError


class DataLossError(GristmillError):
    """Another rank could not read its part of a batch."""


class Ahead:
    """The next batch of a loader, up to the image `end`; `error`: why there is none."""

    def __init__(self, loader: Loader, end: int):
        self.loader: Iterator[Batch] = loader
        self.end = end
        self.batch: Batch | None = None
        self.error: GristmillError | None = None
        self._next = loader.position

    def fetch(self) -> None:
        """Have the next batch, if the run needs one."""
        if self._next >= self.end:
            return
        try:
            self.batch = next(self.loader)
            self._next = self.loader.position  # pyright: ignore[reportAttributeAccessIssue]
        except GristmillError as error:
            self.error = error

    def take(self) -> Batch:
        batch, self.batch = self.batch, None
        assert batch is not None
        return batch

    def agree(self, faults: float, world: int) -> None:
        """All ranks stop when one has no data (`faults`: how many have none); that one says why."""
        if self.error is not None:
            raise self.error
        if faults:
            raise DataLossError(f"{faults:.0f} of {world} processes could not read their data; see their messages")
