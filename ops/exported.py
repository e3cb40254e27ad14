"""What an export leaves on the disk: a file or a folder that is complete or absent.

safetensors are written one tensor at a time, so that memory does not grow with the network; a file gets its name when its
last byte is on the disk, a folder when its last file is (shards/storage.py). A folder is never replaced.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..shards.errors import GristmillError
from ..shards.storage import PARTIAL, published, sync_folder
from .checkpoint import Image, lay_out


class ExportError(GristmillError):
    """Weights that cannot be written where, or as, they were asked for."""


def writable(path: str | Path, suffix: str, why: str) -> Path:
    """The path of a file to be written. ExportError for another ending, a folder that is not there or is in its place."""
    path = Path(path)
    if path.suffix != suffix:
        raise ExportError(f"{path}: {why}, so let its name end in {suffix}")
    if not path.parent.is_dir():
        raise ExportError(f"{path}: there is no folder {path.parent}; make it first")
    if path.is_dir():
        raise ExportError(f"{path} is a folder; name a file")
    return path


def write_torch(path: str | Path, tree: dict[str, Any]) -> Path:
    """A torch file of tensors and plain containers, complete or absent. ExportError for a name that is not *.pth."""
    path = writable(path, ".pth", "what detectors read is a torch file")
    with published(path) as draft:
        torch.save(tree, draft)  # pyright: ignore[reportArgumentType]
    return path


def write_tensors(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    read: Callable[[str], Tensor] | None = None,
) -> Path:
    """A safetensors file, complete or absent. read: gives the values, one tensor at a time; `tensors` may then be meta.

    Raises ExportError for a name that is not *.safetensors (timm goes by it) or a folder that is not there.
    """
    path = writable(path, ".safetensors", "what is written is safetensors")
    image = lay_out(tensors, {"format": "pt", **(metadata or {})})
    names = {id(tensor): name for name, tensor in tensors.items()}
    with published(path) as draft:
        draft.write(image.header)
        for tensor in image.tensors:
            value = tensor if read is None else read(names[id(tensor)])
            if (value.shape, value.dtype) != (tensor.shape, tensor.dtype):
                raise ExportError(f"{names[id(tensor)]} is {value.dtype} {tuple(value.shape)}, not as announced")
            for chunk in Image(b"", [value]).chunks():
                draft.write(chunk)  # pyright: ignore[reportArgumentType]
    return path


def write_text(path: Path, text: str) -> Path:
    """A text file, complete or absent."""
    with published(path) as draft:
        draft.write(text.encode())
    return path


def new_folder(path: str | Path) -> Path:
    """The path of a folder to be made. ExportError where something is there already, or its parent is not."""
    path = Path(path)
    if path.suffix in (".safetensors", ".pth", ".onnx", ".pt2", ".md"):
        raise ExportError(f"{path}: what is written is a folder; let its name not end in {path.suffix}")
    if path.exists() or path.is_symlink():
        raise ExportError(f"{path} exists; name a folder that does not, or remove it first")
    if not path.parent.is_dir():
        raise ExportError(f"{path}: there is no folder {path.parent}; make it first")
    return path


@contextmanager
def published_folder(path: str | Path, names: tuple[str, ...]) -> Iterator[Path]:
    """A folder to fill with files of these names, which appears under `path` only if the block ends well.

    It is filled beside its place. What a killed export left there is removed, unless it holds anything else.
    """
    path = new_folder(path)
    beside = path.with_name(path.name + PARTIAL)
    if beside.exists():
        if not beside.is_dir() or {each.name.removesuffix(PARTIAL) for each in beside.iterdir()} - set(names):
            raise ExportError(f"{beside} is in the way, and holds what no export left; move it away")
        shutil.rmtree(beside)
    beside.mkdir()
    try:
        yield beside
        sync_folder(beside)
        os.rename(beside, path)
        sync_folder(path.parent)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
