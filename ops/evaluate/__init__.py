"""What the features are worth, measured without training anything: k-NN, retrieval, neighbours, signs of collapse.

Each granularity has its own probe: coarse and fine k-NN, instance retrieval. Names are imported when first asked for,
so that the command line does not load torch to print its help.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .features import Features, extract, pixel_features
    from .knn import knn_accuracy, knn_predict, nearest
    from .probes import Probes, chance_levels, label_free, run_probes
    from .retrieval import Retrieval, expected_average_precision, retrieve

_HOME = {
    "Features": "features",
    "extract": "features",
    "pixel_features": "features",
    "knn_accuracy": "knn",
    "knn_predict": "knn",
    "nearest": "knn",
    "Probes": "probes",
    "chance_levels": "probes",
    "label_free": "probes",
    "run_probes": "probes",
    "Retrieval": "retrieval",
    "expected_average_precision": "retrieval",
    "retrieve": "retrieval",
}

__all__ = [
    "Features",
    "Probes",
    "Retrieval",
    "chance_levels",
    "expected_average_precision",
    "extract",
    "knn_accuracy",
    "knn_predict",
    "label_free",
    "nearest",
    "pixel_features",
    "retrieve",
    "run_probes",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
