"""Checkpoints: tensors by (group, name, range), complete or absent, and no pickle. DESIGN 3.7.

A checkpoint is a folder `<position>` of safetensors files, `state.json` (cursor, recipe, ..., where each range lies, the
digest of each file) and `state.digest`. Every rank writes what it holds and reads what it needs: a tensor is put together
from whatever ranges there are, so a run goes on with other ranks or another ZeRO stage. The files are laid out here, in
the published format (https://github.com/huggingface/safetensors#format), and not by the library's `save_file`: so their
bytes go from host memory through the digest to a disk or an object store in one pass. Reading is the library's.
DeepSpeed's own files are never read or written. Where the folders lie is stores.py's; writing them is writer.py's.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..shards.errors import GristmillError

if TYPE_CHECKING:
    from .stores import Store

VERSION = 2
CHUNK = 16 << 20  # bytes that go through the digest at a time
SHOWN = 2  # damaged files that a message names, of each checkpoint
STATE, DIGEST = "state.json", "state.digest"
NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES = {name: dtype for dtype, name in NAMES.items()}
PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")  # what may name a group or a file
FINE, MISSING, DIFFERS, UNREADABLE = range(4)
WHAT = {MISSING: "is missing", DIFFERS: "does not match its digest", UNREADABLE: "cannot be read"}

Total = Callable[[list[float]], list[float]]  # the sum over all ranks, entry by entry


class CheckpointError(GristmillError):
    """A checkpoint that cannot be written or read, or does not belong to this run."""


@dataclass(frozen=True)
class Part:
    """Elements [start, start + len) of the flattened (row-major) tensor `name` of `shape`; `tensor` is 1-D."""

    group: str
    name: str
    start: int
    shape: tuple[int, ...]
    tensor: Tensor


@dataclass
class Content:
    """What goes into a checkpoint, as one rank sees it."""

    parts: list[Part] = field(default_factory=list)  # all ranks' together cover each tensor exactly once
    whole: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # equal on all ranks; rank 0 writes them
    state: dict[str, Any] = field(default_factory=dict)  # JSON; rank 0's


@dataclass(frozen=True)
class Image:
    """A safetensors file before it is written: its header, then `tensors` one after the other."""

    header: bytes
    tensors: list[Tensor]

    @property
    def body(self) -> int:
        """Bytes that follow the header."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def chunks(self) -> Iterator[memoryview]:
        """The file's bytes, at most CHUNK at a time."""
        yield memoryview(self.header)
        for tensor in self.tensors:
            if tensor.numel():
                flat = tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy()
                for start in range(0, len(flat), CHUNK):
                    yield flat[start : start + CHUNK].data


def lay_out(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Image:
    """The safetensors file of some named tensors. Raises CheckpointError for a type that the format does not have."""
    # Wide types first, as the library has them: so each tensor begins at a multiple of its own item size.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    table: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for name, tensor in ordered:
        if tensor.dtype not in NAMES:
            raise CheckpointError(f"{name}: tensors of type {tensor.dtype} cannot be kept in a checkpoint")
        end = at + tensor.nbytes
        table[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return Image(len(text).to_bytes(8, "little") + text, [tensor for _, tensor in ordered])


def key_of(group: str, name: str, start: int) -> str:
    """What a range is called inside a rank's file; groups hold no colon, names may hold anything."""
    return f"{group}:{start}:{name}"


def digest_of(data: bytes) -> str:
    """blake2b-128, in hex."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def compose(position: int, ranks: list[dict[str, Any]], state: str) -> str:
    """`state.json` from what each rank noted of its files, and the run's state as JSON text.

    Raises CheckpointError if the ranges of some tensor leave a gap or overlap, or ranks disagree on its shape or type.
    """
    tensors: dict[str, dict[str, Any]] = {}
    ranges: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for rank in ranks:
        for group, name, dtype, shape in rank["tensors"]:
            kind = tensors.setdefault(group, {}).setdefault(name, {"dtype": dtype, "shape": shape})
            if kind != {"dtype": dtype, "shape": shape}:
                raise CheckpointError(f"ranks disagree on {group} {name}: {dtype} {shape} and {kind}")
        for group, name, start, stop, _ in rank["index"]:
            ranges.setdefault((group, name), []).append((start, stop))
    for group, names in tensors.items():
        for name, kind in names.items():
            at, size = 0, math.prod(kind["shape"])
            for start, stop in [*sorted(ranges.get((group, name), [])), (size, size)]:
                if start != at:
                    what = "are held by no rank" if start > at else "are held twice"
                    raise CheckpointError(f"elements {min(at, start)} to {max(at, start)} of {group} {name} {what}")
                at = stop
    document = {
        "version": VERSION,
        "position": position,
        "digests": {name: digest for rank in ranks for name, digest in rank["digests"].items()},
        "bytes": sum(rank["bytes"] for rank in ranks),
        "whole": {group: name for rank in ranks for group, name in rank["whole"].items()},
        "tensors": tensors,
        "index": [row for rank in ranks for row in rank["index"]],
    }
    # One line a field: a person can read the cursor without scrolling through the index.
    lines = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in document.items()]
    return "{\n" + ",\n".join([*lines[:2], f'"state": {state}', *lines[2:]]) + "\n}\n"


class Saved:
    """A published checkpoint, open for reading. Only the ranges asked for are read; what is returned is a copy."""

    def __init__(self, store: Store, position: int):
        """Reads and checks `state.json`; raises CheckpointError that says what is wrong with it, OSError passes."""
        try:
            text = store.read(position, STATE)
            digests = store.read(position, DIGEST).decode(errors="replace").split()
        except FileNotFoundError as error:
            raise CheckpointError(f"{STATE} or {DIGEST} is missing") from error
        if digest_of(text) not in digests:  # a checkpoint that is being replaced has two for a moment
            raise CheckpointError(f"{STATE} does not match its digest")
        try:
            document = json.loads(text)
            if document["version"] != VERSION:
                raise CheckpointError(f"{STATE} has version {document['version']!r}; this Gristmill reads {VERSION}")
            self.state: dict[str, Any] = document["state"]
            self.digests: dict[str, str] = document["digests"]
            self._tensors: dict[str, dict[str, Any]] = document["tensors"]
            self._whole: dict[str, str] = document["whole"]
            self._ranges: dict[tuple[str, str], list[tuple[int, int, str]]] = {}
            for group, name, start, stop, file in document["index"]:
                self._ranges.setdefault((group, name), []).append((start, stop, file))
            foreign = [n for n in [*self.digests, *self._whole.values()] if not PLAIN.fullmatch(n)]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{STATE} is no checkpoint's ({type(error).__name__}: {error})") from error
        if document["position"] != position or foreign:
            raise CheckpointError(f"{STATE} belongs to another folder")
        self.store, self.position, self.path = store, position, store.shown(position)
        self._open: dict[str, Any] = {}

    def groups(self) -> list[str]:
        """Groups of tensors kept by range."""
        return list(self._tensors)

    def wholes(self) -> list[str]:
        """Groups kept whole."""
        return list(self._whole)

    def names(self, group: str) -> dict[str, tuple[int, ...]]:
        """Shapes by name of a group kept by range. Raises CheckpointError for a group that is not there."""
        if group not in self._tensors:
            raise CheckpointError(f"{self.path} holds no group {group!r}, only {', '.join(self._tensors) or 'none'}")
        return {name: tuple(kind["shape"]) for name, kind in self._tensors[group].items()}

    def read(self, group: str, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Elements [start, stop) of a flattened tensor, 1-D, from whichever files hold them."""
        shape = self.names(group).get(name)
        if shape is None:
            raise CheckpointError(f"{self.path} holds no tensor {name!r} in group {group!r}")
        size = math.prod(shape)
        stop = size if stop is None else stop
        if not 0 <= start <= stop <= size:
            raise CheckpointError(f"{self.path}: {group} {name} has {size} elements, not [{start}, {stop})")
        out = torch.empty(stop - start, dtype=DTYPES[self._tensors[group][name]["dtype"]])
        for begin, end, file in self._ranges.get((group, name), []):
            low, high = max(begin, start), min(end, stop)
            if low < high:
                there = self._file(file).get_slice(key_of(group, name, begin))
                out[low - start : high - start].copy_(there[low - begin : high - begin])
        return out

    def whole(self, group: str) -> dict[str, Tensor]:
        """A group kept whole. Raises CheckpointError for a group that is not there."""
        if group not in self._whole:
            raise CheckpointError(f"{self.path} holds no whole {group!r}, only {', '.join(self._whole) or 'none'}")
        file = self._file(self._whole[group])
        return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (it is no dict)

    def assembled(self, group: str) -> dict[str, Tensor]:
        """All full tensors of a group, kept by range or whole or some this and some that way; for one process."""
        tensors = self.whole(group) if group in self._whole else {}
        if group in self._tensors or group not in self._whole:
            tensors |= {name: self.read(group, name).view(shape) for name, shape in self.names(group).items()}
        return tensors

    def verify(self, names: list[str]) -> list[tuple[int, str]]:
        """(FINE, MISSING, DIFFERS or UNREADABLE; why) of each of these files."""
        found = []
        for name in names:
            try:
                good = self.store.digest(self.position, name) == self.digests[name]
                found.append((FINE if good else DIFFERS, ""))
            except FileNotFoundError:
                found.append((MISSING, ""))
            except OSError as error:
                found.append((UNREADABLE, f" ({error.strerror or error})"))
        return found

    def close(self) -> None:
        """Let go of the files; tensors that were read stay."""
        self._open.clear()
        self.store.release()

    def _file(self, name: str) -> Any:
        if name not in self._open:
            try:
                where = self.store.local(self.position, name, self.digests[name])
                self._open[name] = safe_open(where, framework="pt")  # pyright: ignore[reportArgumentType]
            except (OSError, SafetensorError) as error:
                why = getattr(error, "strerror", None) or error
                raise CheckpointError(f"{name} of {self.path} cannot be read: {why}") from None
        return self._open[name]


def newest(
    store: Store, rank: int = 0, world: int = 1, total: Total = list, at_most: int | None = None
) -> tuple[Saved | None, list[str]]:
    """The newest checkpoint whose digests hold, the same on all ranks, and a line for each newer one passed over.

    Collective: file i is verified by rank i % world, and `total` makes the findings everyone's. at_most: none beyond this
    position. (None, []) if there is none. Raises CheckpointError, on all ranks, if there are some but all are damaged, or
    if an object store does not answer: what cannot be seen now may be good, and is not passed over.
    """
    passed: list[str] = []
    for position in _positions(store, rank, total, at_most):
        place = store.shown(position)
        saved, (problem, why) = _open_saved(store, position)
        if problem == UNREADABLE and not store.remote:  # a bad sector: others are likely to be readable
            problem = DIFFERS
        states = total([float(problem == code) for code in range(4)])
        if states[UNREADABLE]:
            raise CheckpointError(
                f"{place}: {why or 'another rank could not read it'}; start again when it can be read"
            )
        if saved is None or states[FINE] < world:
            saved = None
            passed.append(f"checkpoint {place} was passed over: {why or STATE + ': another rank could not read it'}")
            continue
        names = sorted(saved.digests)
        mine = dict(zip(names[rank::world], saved.verify(names[rank::world]), strict=True))
        codes = total([float(mine[name][0]) if name in mine else 0.0 for name in names])
        damage = [
            (round(code), f"{name} {WHAT[round(code)]}" + mine.get(name, (0, ""))[1])
            for name, code in zip(names, codes, strict=True)
            if code
        ]
        if not damage:
            return saved, passed
        saved.close()
        more = f"; and {len(damage) - SHOWN} more of {len(names)} files" if len(damage) > SHOWN else ""
        texts = "; ".join(text for _, text in damage[:SHOWN]) + more
        if store.remote and any(code == UNREADABLE for code, _ in damage):
            raise CheckpointError(f"{place}: {texts}; start again when it can be read")
        passed.append(f"checkpoint {place} is damaged ({texts}) and was passed over")
    if passed:
        lines = "".join(f"  {line}\n" for line in passed)
        raise CheckpointError(f"no checkpoint is readable:\n{lines}Remove {store} to start from the beginning.")
    return None, passed


def _open_saved(store: Store, position: int) -> tuple[Saved | None, tuple[int, str]]:
    try:
        return Saved(store, position), (FINE, "")
    except CheckpointError as error:
        return None, (DIFFERS, str(error))
    except OSError as error:
        return None, (UNREADABLE, f"{STATE} cannot be read: {error.strerror or error}")


def _positions(store: Store, rank: int, total: Total, at_most: int | None) -> list[int]:
    """Rank 0's list, newest first, on all ranks: what others see of a shared folder may be seconds old."""
    found: list[int] = []
    why = "rank 0 could not list it"
    count = 0.0
    if rank == 0:
        try:
            found = [position for position in store.positions() if at_most is None or position <= at_most]
            count = float(len(found))
        except OSError as error:
            count, why = -1.0, str(error.strerror or error)
    (count,) = total([count])
    if count < 0:
        raise CheckpointError(f"the checkpoints in {store} cannot be listed: {why}; start again when they can")
    if not count:
        return []
    # In halves of 20 bits, so that a sum in fp32 is exact.
    halves = [float(half) for position in found for half in divmod(position, 1 << 20)] or [0.0] * (2 * round(count))
    halves = [round(half) for half in total(halves)]
    return [(high << 20) + low for high, low in zip(halves[::2], halves[1::2], strict=True)]
