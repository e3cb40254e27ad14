"""The one base of every error that a user can cause and mend, and the hint for a name that was nearly right.

The command line prints such an error without a traceback and leaves with exit code 2, so its message has to
stand alone: it names the thing that is wrong and what to do about it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class GristmillError(Exception):
    """A fault in the input, the recipe or the machine. The message names the thing and the remedy."""


def nearest(name: object, known: Iterable[str], *, cutoff: float = 0.6) -> str:
    """ "did you mean 'x'? " with the known name that is most like this one; "" where none is like enough."""
    near = difflib.get_close_matches(str(name), list(known), n=1, cutoff=cutoff)
    return f"did you mean {near[0]!r}? " if near else ""
