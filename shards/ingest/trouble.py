"""What is wrong with one input, told from what is wrong with the machine or the network.

A file that is gone, locked or replaced costs its own inputs, and they are counted as unreadable. A machine without
memory or descriptors, and storage that does not answer, say nothing about any input: those errors go on and stop the
ingest, which takes up from there when it is started again.
"""

from __future__ import annotations

import errno
import zlib

from ..errors import GristmillError
from ..retry import StorageError
from .candidate import Outcome

Problem = tuple[Outcome, str]

MAX_BYTES = 256 << 20  # of one image; what is larger is never read
_MACHINE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
_OBJECT = {
    "missing": "is not there",
    "denied": "is refused",
    "changed": "was replaced since the inputs were listed",
}
# What codecs and pyarrow raise for damage; pyarrow's ArrowInvalid is a ValueError, and its OSError has no number.
DAMAGE = (ValueError, EOFError, zlib.error, NotImplementedError)


def too_large(size: int) -> Problem:
    """The problem of an input of `size` bytes."""
    return Outcome.TOO_LARGE, f"{size} bytes, more than {MAX_BYTES >> 20} MiB"


def problem_of(error: BaseException) -> Problem:
    """The problem of the input that was being read. Raises the error again if it is not the input's."""
    if isinstance(error, StorageError) and error.reason in _OBJECT:
        return Outcome.UNREADABLE, _OBJECT[error.reason]
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno in _MACHINE):
        raise error
    if isinstance(error, OSError):
        return Outcome.UNREADABLE, error.strerror or brief(error)
    if isinstance(error, GristmillError) or not isinstance(error, DAMAGE):
        raise error
    return Outcome.UNREADABLE, brief(error)


def brief(error: BaseException) -> str:
    """The first line of an error's message, not too long."""
    lines = str(error).splitlines()
    return f"damaged ({(lines[0] if lines else type(error).__name__)[:200]})"
