"""What the operator sees: metrics of a run, the port that serves them, and a view of them in the terminal.

Nothing is imported until it is asked for, so that `gristmill status` does not wait for torch and a training run does
not load rich.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .exporter import Exporter, ExporterError
    from .metrics import Metrics
    from .status import StatusError, show_status

__all__ = ["Exporter", "ExporterError", "Metrics", "StatusError", "show_status"]

_HOME = {
    "Exporter": "exporter",
    "ExporterError": "exporter",
    "Metrics": "metrics",
    "StatusError": "status",
    "show_status": "status",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)
