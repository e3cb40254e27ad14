"""Data in motion: a position in, a batch of augmented views out. The only package that imports DALI.

Names are resolved when they are first asked for (PEP 562), so that looking at an order or a cursor loads neither torch
nor DALI. Read order.py, draws.py and augment/graph.py, in that order, to see what becomes of a position; standalone.py is the
way in for who wants nothing but the loader.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .augment.cpu import CpuExecutor
    from .augment.dali import DaliExecutor
    from .batch import Batch, LoaderError, StallError
    from .cursor import Cursor, CursorError
    from .draws import Draws, Plan, draw
    from .fetch import DamageError
    from .groups import named_views
    from .loader import Loader
    from .masks import MaskConfig, draw_masks
    from .order import Order, Sequential
    from .probing import probe_batches
    from .quality import check_working_set, suggest
    from .reader import Reader
    from .source import Source
    from .standalone import Images, images
    from .stats import Stats, bottleneck
    from .stream import Stream
    from .views import Augment, CacheConfig, StreamConfig, Strong, View

_HOMES = {
    "Augment": "views",
    "Batch": "batch",
    "CacheConfig": "views",
    "CpuExecutor": "augment.cpu",
    "Cursor": "cursor",
    "CursorError": "cursor",
    "DaliExecutor": "augment.dali",
    "DamageError": "fetch",
    "Draws": "draws",
    "Images": "standalone",
    "Loader": "loader",
    "MaskConfig": "masks",
    "LoaderError": "batch",
    "Order": "order",
    "Plan": "draws",
    "Reader": "reader",
    "Sequential": "order",
    "Source": "source",
    "StallError": "batch",
    "Stats": "stats",
    "Stream": "stream",
    "StreamConfig": "views",
    "Strong": "views",
    "View": "views",
    "bottleneck": "stats",
    "check_working_set": "quality",
    "draw": "draws",
    "draw_masks": "masks",
    "images": "standalone",
    "named_views": "groups",
    "probe_batches": "probing",
    "suggest": "quality",
}

__all__ = [
    "Augment",
    "Batch",
    "CacheConfig",
    "CpuExecutor",
    "Cursor",
    "CursorError",
    "DaliExecutor",
    "DamageError",
    "Draws",
    "Images",
    "Loader",
    "LoaderError",
    "MaskConfig",
    "Order",
    "Plan",
    "Reader",
    "Sequential",
    "Source",
    "StallError",
    "Stats",
    "Stream",
    "StreamConfig",
    "Strong",
    "View",
    "bottleneck",
    "check_working_set",
    "draw",
    "draw_masks",
    "images",
    "named_views",
    "probe_batches",
    "suggest",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
