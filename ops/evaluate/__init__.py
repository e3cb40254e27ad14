"""What features are worth: k-NN, retrieval, neighbours, signs of collapse, classifiers and detectors on top, places.

Each granularity has its own probe: instance retrieval, purity of neighbourhoods, coarse and fine k-NN, segmentation of
patches. `examine` is `gristmill eval`; during training online.py asks. Names are imported when first asked for, so that the command line does not load torch to print its help.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .chosen import Asked, chance, measure
    from .dense import PixelClasses, patch_tokens, pixel_patches, segment
    from .exam import Request, examine
    from .features import Features, extract, pixel_features
    from .knn import knn_accuracy, knn_predict, nearest
    from .pictures import Pictures, open_pictures
    from .probes import Probes, chance_levels, label_free, run_probes
    from .purity import expected_purity, neighbour_purity
    from .retrieval import Retrieval, expected_average_precision, retrieve
    from .subject import Subject, open_subject

_HOME = {
    "Asked": "chosen",
    "chance": "chosen",
    "measure": "chosen",
    "Request": "exam",
    "examine": "exam",
    "Pictures": "pictures",
    "open_pictures": "pictures",
    "Subject": "subject",
    "open_subject": "subject",
    "PixelClasses": "dense",
    "patch_tokens": "dense",
    "pixel_patches": "dense",
    "segment": "dense",
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
    "expected_purity": "purity",
    "neighbour_purity": "purity",
    "Retrieval": "retrieval",
    "expected_average_precision": "retrieval",
    "retrieve": "retrieval",
}

__all__ = [
    "Asked",
    "Features",
    "Pictures",
    "PixelClasses",
    "Probes",
    "Request",
    "Retrieval",
    "Subject",
    "chance",
    "chance_levels",
    "examine",
    "expected_average_precision",
    "expected_purity",
    "extract",
    "knn_accuracy",
    "knn_predict",
    "label_free",
    "measure",
    "nearest",
    "neighbour_purity",
    "open_pictures",
    "open_subject",
    "patch_tokens",
    "pixel_features",
    "pixel_patches",
    "retrieve",
    "run_probes",
    "segment",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
