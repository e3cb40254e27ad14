"""For the server that forks workers, when tests share one: a client that is killed while it asks must not end it.

Of an ingest it belongs to the process that was killed, and does right to end.
"""

from __future__ import annotations

import errno
from multiprocessing import reduction
from typing import Any

_recvfds = reduction.recvfds  # pyright: ignore


def _or_aborted(*arguments: Any) -> Any:
    try:
        return _recvfds(*arguments)
    except EOFError as error:
        raise OSError(errno.ECONNABORTED, "the client is gone") from error  # which the server passes by


reduction.recvfds = _or_aborted  # pyright: ignore
