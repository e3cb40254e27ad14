"""Whether code goes the way that it has for a CPU: smaller blocks, a look at values, which would make a GPU's host wait.

Everybody who decides by the kind of device asks here. A context variable turns the answer around where a GPU's way is
to be looked at without one: `gristmill plan` follows a step on tensors that are a CPU's in name only.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_elsewhere: ContextVar[bool] = ContextVar("_elsewhere", default=False)


def on_host(device: str) -> bool:
    """Whether tensors of this type of device go a CPU's way."""
    return device == "cpu" and not _elsewhere.get()


@contextmanager
def off_host() -> Iterator[None]:
    """Inside, in this thread, code goes on as on a GPU, whatever device it runs on."""
    token = _elsewhere.set(True)
    try:
        yield
    finally:
        _elsewhere.reset(token)
