"""Waiting for what another thread, process or program does: until it is so, however busy the machine is, and not for ever."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def wait_for(
    happened: Callable[[], T], seconds: float, what: str | Callable[[], object] = "nothing", every: float = 0.05
) -> T:
    """What `happened` returns once it is true; AssertionError saying `what` after so many seconds."""
    until = time.monotonic() + seconds
    while not (found := happened()):
        assert time.monotonic() < until, f"not within {seconds:.0f} s: {what() if callable(what) else what}"
        time.sleep(every)
    return found
