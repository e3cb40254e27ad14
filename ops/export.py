"""Our weights for others: one network of a checkpoint, in the layout and under the names that they read.

timm's (`timm.create_model(NAME, checkpoint_path=FILE, ...)`), transformers' (huggingface.py), detectors' (detectors.py), the
official Mugs code's, or a program that needs no code of anybody (programs.py). From a checkpoint, tensors are read one at a
time from whatever ranges ranks and ZeRO stage left (origin.py), and safetensors are written so, too (exported.py): memory
does not grow with the network. Beside every export lies a card that says what it is (card.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import cast

from torch import Tensor, nn

from ..models.layouts import official_name
from ..models.student import Student
from ..models.weights import Who
from .calls import FORMATS, Format, call, describe, timm_arguments, usage
from .card import beside, card, check_card, write_card
from .detectors import DETECTORS, Detector, check, contents, renamed, settings
from .exported import ExportError, write_tensors, write_torch
from .huggingface import write_huggingface
from .origin import Origin, Size, open_checkpoint, origin
from .programs import SUFFIX, Program, write_program

__all__ = [
    "FORMATS",
    "ExportError",
    "Format",
    "call",
    "describe",
    "export_checkpoint",
    "export_detector",
    "export_timm",
    "open_checkpoint",
    "timm_arguments",
    "usage",
    "write_tensors",
    "write_torch",
]

MUGS = ("instance", "local_group", "group", "patch")  # whose heads the official layout has names for


def export_timm(network: Student | nn.Module, path: str | Path, metadata: Mapping[str, str] | None = None) -> Path:
    """Write a network's backbone under timm's names. Raises ExportError for a name that is not *.safetensors."""
    return write_tensors(path, _weights(network), metadata)


def export_detector(
    network: Student | nn.Module, path: str | Path, detector: Detector, metadata: Mapping[str, str] | None = None
) -> Path:
    """Write a network's backbone as a detector reads it, a *.pth. Raises ExportError, DetectorError."""
    weights = _weights(network)
    check(detector, weights, "this backbone")
    names = {renamed(detector, name): name for name in weights}
    return write_torch(path, contents(detector, names, weights.__getitem__, metadata or {}))


def _weights(network: Student | nn.Module) -> dict[str, Tensor]:
    backbone = network.backbone if isinstance(network, Student) else network
    return {name: value for name, value in backbone.state_dict().items() if name != "mask_token"}


def export_checkpoint(
    where: str, out: str | Path, who: Who = "teacher", *, format: Format = "timm", size: Size | None = None
) -> tuple[Path, dict[str, str]]:
    """Write one network of a checkpoint, and its card; returns the path and the metadata, with what loads it.

    format: "timm", the backbone; "huggingface", a folder for transformers; "onnx" and "torch-export", a program; "detectron2"
    and "mmdetection", the backbone as these read it; "official", backbone, local-group block and heads under the names of
    the official Mugs code; "card", nothing but the card. size: (height, width) for which a ViT's position embedding is
    carried over, in the run's own form (others carry it otherwise). Beyond what is in the file, the metadata returned
    have "gristmill.card", where the card lies, "gristmill.settings" of a detector, "gristmill.difference" of a program.
    Raises ExportError, DetectorError, CheckpointError.
    """
    with origin(where, who, size) as source:
        _suited(format, source)
        about = source.about()
        if format == "card":
            path = Path(out)
            about["gristmill.card"] = str(write_card(path, card(source, format, about, path, where)))
            return path, about
        if format == "huggingface":
            path = Path(out)
            write_huggingface(source, path, about, card(source, format, about, path, where))
            return path, about | {"gristmill.card": str(path / "README.md")}
        check_card(beside(Path(out)))
        if format in SUFFIX:
            path, difference = write_program(source, out, cast(Program, format), about)
            about["gristmill.difference"] = f"{difference:.1e}"
        elif format in DETECTORS:
            path = _for_detector(source, out, cast(Detector, format), about)
        else:
            path = _as_tensors(source, out, format == "official", about)
        about["gristmill.card"] = str(write_card(beside(path), card(source, format, about, path, where)))
        return path, about


def _for_detector(source: Origin, out: str | Path, detector: Detector, about: dict[str, str]) -> Path:
    shapes = source.shapes()
    measures = check(detector, shapes, source.config.backbone)
    names = {renamed(detector, name): f"backbone.{name}" for name in shapes}
    path = write_torch(out, contents(detector, names, source.read, about))
    side = (source.size or (source.config.image_size,))[0]
    about["gristmill.settings"] = json.dumps(settings(detector, measures, source.backbone, str(path), side))
    return path


def _as_tensors(source: Origin, out: str | Path, official: bool, about: Mapping[str, str]) -> Path:
    ours = source.names(everything=official)
    names = {official_name(name) if official else name.removeprefix("backbone."): name for name in ours}
    announced = {theirs: source.announced(name) for theirs, name in names.items()}
    return write_tensors(out, announced, about, lambda theirs: source.read(names[theirs]))


def _suited(format: Format, source: Origin) -> None:
    """ExportError where the network does not go with what is asked."""
    config, size = source.config, source.size
    if format == "official":
        strange = [name for name in config.objectives if name not in MUGS or config.projection(name) is not None]
        if config.resnet or strange:
            has = config.backbone if config.resnet else f"the objective {strange[0]}"
            raise ExportError(f"--format official is Mugs' layout, which has no place for {has}; leave --format out")
    if format in DETECTORS and size and size[0] != size[1]:
        raise ExportError(f"--size {size[0]}x{size[1]}: {format} takes position embeddings of square images only")
