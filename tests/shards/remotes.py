"""An object behind HTTP for tests, and a reader of it that soon loses patience."""

from __future__ import annotations

from gristmill.shards.client import Client
from gristmill.shards.remote import HttpBlob
from gristmill.shards.retry import RetryPolicy

from ..faulty_http import FaultyServer

DATA = bytes(range(256)) * 2000  # 512,000 bytes
QUICK = RetryPolicy(deadline=20.0, first_pause=0.005, longest_pause=0.05, stall_timeout=3.0, min_rate=1e6)


def blob_of(server: FaultyServer, path: str = "/a.tar", **limits: float) -> HttpBlob:
    """A blob with a client of its own, so that counters and limits are the test's."""
    return HttpBlob(server.url(path), Client(QUICK.model_copy(update=limits)))
