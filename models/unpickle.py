"""Weight files of others, read without ever executing what is in them.

A .pth file is a pickle, and a pickle is a program. torch's restricted reader builds tensors and plain containers and
knows no other call; beyond these it is allowed `argparse.Namespace`, a bag of names in which the official DINO, iBOT
and Mugs code keeps its arguments, and only while one of these files is read. What else a file asks for is named
and the file is refused. Zip archives and safetensors are mapped, not read: of a checkpoint of many gigabytes only the
tensors that are used come into memory.
"""

import argparse
import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

ALLOWED: list[Any] = [argparse.Namespace]


class WeightsError(ValueError):
    """A file of weights that cannot be read or does not fit. The message names the file, the thing and the remedy."""


@dataclass(frozen=True)
class WeightFile:
    """An open file of weights: nested dictionaries of tensors as it holds them, and what identifies it."""

    path: Path
    sha256: str
    tree: dict[str, Any]
    metadata: dict[str, str] = field(default_factory=dict)  # of a safetensors file


def read_weights(path: str | Path) -> WeightFile:
    """Open a .pth or .safetensors file, told apart by their first bytes, whatever they are called.

    Tensors lie in the file still and change with it: copy what is kept. Raises WeightsError for a file that is not
    there, is no checkpoint, is cut short, or is a pickle that asks for other globals.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            first = file.read(9)
            file.seek(0)
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        raise WeightsError(f"{path}: there is no such file") from None
    except IsADirectoryError:
        raise WeightsError(
            f"{path} is a folder; name the file of weights in it (a run's own: `gristmill export`)"
        ) from None
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror or error}") from None
    if first[8:9] == b"{":
        return _safetensors(path, sha256)
    if first[:4] == b"PK\x03\x04" or first[:1] == b"\x80":
        tree = _pickle(path, mapped=first[:2] == b"PK")
        if not isinstance(tree, dict):
            raise WeightsError(
                f"{path} holds a {type(tree).__name__}, not a dictionary of weights; save the network's state_dict()"
            )
        return WeightFile(path, sha256, tree)
    raise WeightsError(f"{path} is not a checkpoint: neither a torch file nor safetensors")


def _safetensors(path: Path, sha256: str) -> WeightFile:
    try:
        with safe_open(path, framework="pt") as file:  # pyright: ignore[reportArgumentType]
            tree = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
            return WeightFile(path, sha256, tree, dict(file.metadata() or {}))
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path} is damaged or no safetensors file: {error}; fetch it again") from None


@contextmanager
def _only(allowed: list[Any]) -> Iterator[None]:
    """Let torch's reader know these globals and no others: torch's own parts and other libraries allow more of them."""
    before = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(allowed)
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def _pickle(path: Path, *, mapped: bool) -> Any:
    with _only(ALLOWED):
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        except Exception as error:
            # Whatever a broken or hostile file makes the reader stumble over: it does not say which errors it raises.
            if names := _foreign(path, str(error)):
                raise WeightsError(
                    f"{path} is refused: its pickle asks for {', '.join(names)}, and running what a file asks for is not "
                    "safe. Where you trust it, save its state_dict as safetensors, and import that"
                ) from None
            why = str(error).strip().split("\n")[0] or type(error).__name__
            raise WeightsError(f"{path} is not a checkpoint, or damaged ({why[:200]}); fetch it again") from None


def _foreign(path: Path, message: str) -> list[str]:
    """Globals beyond the allowed ones that a pickle names; only the first where the file is older than zip archives."""
    try:
        found = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # as above; it only reads zip archives, and the file is refused in any case
        found = []
    return sorted(found) or re.findall(r"GLOBAL ([\w.]+)", message)[:1]
