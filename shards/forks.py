"""What has to be made anew in a forked child: locks that another thread of the parent may just have held, above all.

Whoever needs that is remembered weakly, so that being told of forks keeps nothing alive.
"""

from __future__ import annotations

import os
import weakref
from typing import Protocol


class Forked(Protocol):
    """Something that a child inherits and cannot use as it is."""

    def after_fork(self) -> None:
        """Called in the child, before anything else runs there."""
        ...


_known: weakref.WeakSet[Forked] = weakref.WeakSet()


def tell(one: Forked) -> None:
    """Have `one.after_fork()` called in every child from now on."""
    _known.add(one)


def _in_child() -> None:
    for one in list(_known):
        one.after_fork()


os.register_at_fork(after_in_child=_in_child)
