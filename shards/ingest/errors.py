"""What can be wrong with an ingest as a whole. What is wrong with one input is its `Outcome`."""

from __future__ import annotations

from ..errors import GristmillError


class IngestError(GristmillError):
    """An ingest that cannot be done, or not go on; the message says how it can."""
