"""Data in motion: a position in, a batch of augmented views out. The only package that imports DALI.

Names are resolved when they are first asked for (PEP 562), so that looking at an order or a cursor loads neither torch
nor DALI. Read order.py, draws.py and augment/dali.py, in that order, to see what becomes of a position.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .augment.dali import DaliExecutor
    from .cursor import Cursor, CursorError
    from .draws import Draws, Plan, draw
    from .loader import Batch, Loader, Stats, probe_batches
    from .order import Order, Sequential
    from .reader import DamageError, Reader
    from .views import Augment, StreamConfig, View

_HOMES = {
    "Augment": "views",
    "Batch": "loader",
    "Cursor": "cursor",
    "CursorError": "cursor",
    "DaliExecutor": "augment.dali",
    "DamageError": "reader",
    "Draws": "draws",
    "Loader": "loader",
    "Order": "order",
    "Plan": "draws",
    "Reader": "reader",
    "Sequential": "order",
    "Stats": "loader",
    "StreamConfig": "views",
    "View": "views",
    "draw": "draws",
    "probe_batches": "loader",
}

__all__ = [
    "Augment",
    "Batch",
    "Cursor",
    "CursorError",
    "DaliExecutor",
    "DamageError",
    "Draws",
    "Loader",
    "Order",
    "Plan",
    "Reader",
    "Sequential",
    "Stats",
    "StreamConfig",
    "View",
    "draw",
    "probe_batches",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
