"""How the CPU executor's loops become machine code: compiled as they are imported, kept beside the byte code.

A process that finds the kept code loads it in a few tenths of a second; the first on a machine compiles for some ten.
Numba keeps it in __pycache__ (or, where that cannot be written, in the user's cache folder), named by processor, and
drops it when the source changes. Where there is no place at all, each process compiles for itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
from numba.core import config

# A product and a sum may become one instruction, the sign of zero is nobody's business; sums keep their order, or
# the same crop would come out otherwise on another machine for no reason.
_HOW: dict[str, Any] = {"nogil": True, "fastmath": {"contract", "nsz"}, "error_model": "numpy", "boundscheck": False}
_EXACTLY: dict[str, Any] = _HOW | {"fastmath": False}


def compiled(signature: str, *, exact: bool = False) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: machine code for exactly these types, at once, that runs without the GIL.

    exact: every product is rounded by itself, for arithmetic that has to be NumPy's to the bit.
    """
    how = _EXACTLY if exact else _HOW

    def make(function: Callable[..., Any]) -> Callable[..., Any]:
        # Four values side by side (a pixel's colours) become one vector only with this, which Numba leaves off.
        before, config.SLP_VECTORIZE = config.SLP_VECTORIZE, 1
        try:
            try:
                return numba.njit(signature, cache=True, **how)(function)
            except RuntimeError as error:
                if "cache" not in str(error):
                    raise
                return numba.njit(signature, **how)(function)
        finally:
            config.SLP_VECTORIZE = before

    return make


def inlined(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator: a part of compiled functions, compiled with them."""
    return numba.njit(**_HOW)(function)


def exactly_inlined(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same for parts of those that are `exact`: how products are rounded is said for each of them."""
    return numba.njit(**_EXACTLY)(function)
