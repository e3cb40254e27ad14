"""Features of pictures, computed once: kept in a folder by what they were made of, complete or absent, checked on reading.

The key is a digest of the subject, the pictures, the size, the number of blocks and the code's version, so that a file
is either right or not asked for. Work is cut into the same batches however many threads, processes or ranks share it, and
each batch is computed by one thread: the bits do not depend on the sharing. Processes are started here, or are
torchrun's ranks; each leaves its part in a file, and the first one puts them together.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...shards.errors import GristmillError
from ...shards.storage import published
from ..checkpoint import lay_out
from .pictures import Pictures, cores
from .subject import Subject

VERSION = 1  # of what is computed: raise it, and old files are no longer asked for
BATCH = 64  # pictures; part of the key, since sums inside a network may differ between batch sizes
ABOUT = "gristmill.features"
Done = Callable[[int], object]  # pictures done, as they come


class CacheError(GristmillError):
    """Features that could not be computed or kept."""


@dataclass(frozen=True)
class Kept:
    """Features fp32 on the CPU of the pictures in `rows` int64 [m], ascending; `damaged` are left out, with the reason.

    classes and means [m, n, d]: class token, and mean of the patches, of the last n blocks, the last one last.
    """

    rows: Tensor
    classes: Tensor
    means: Tensor
    damaged: dict[int, str]

    @property
    def features(self) -> Tensor:
        """Of the last block, [m, d]: what k-NN and retrieval look at."""
        return self.classes[:, -1]


def features_of(
    subject: Subject,
    pictures: Pictures,
    folder: str | Path | None = None,
    *,
    blocks: int = 1,
    processes: int = 1,
    alone: bool = False,
    done: Done | None = None,
) -> Kept:
    """Features of all pictures, from `folder` if they are there, else computed and left there (None: not kept).

    processes: on this machine. Under torchrun (RANK, WORLD_SIZE) each rank computes its share instead, all of them must call
    this, and all get the features; `folder` is then one that all can see. alone: this rank does it without the others. Raises CacheError, PicturesError, OSError.
    """
    about = _about(subject, pictures, blocks)
    ranks = 1 if alone else int(os.environ.get("WORLD_SIZE", "1"))
    if folder is None:
        if max(ranks, processes) > 1:
            raise CacheError("several processes leave their parts in a folder; name one with --cache")
        return _put(*_compute(subject, pictures, blocks, 0, 1, done))
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{key_of(about)}.safetensors"
    kept = read_features(path, about)
    if ranks > 1:
        kept = _by_ranks(subject, pictures, blocks, path, about, kept, done)
    if kept is None and processes > 1:
        _by_processes(subject, pictures, blocks, path, processes, done)
        kept = _merge(path, about, processes)
    if kept is None:
        tensors, damaged = _compute(subject, pictures, blocks, 0, 1, done)
        _write(path, tensors, about, damaged)
        kept = _put(tensors, damaged)
    elif done:
        done(len(pictures))
    pictures.damaged.update(kept.damaged)
    return kept


def key_of(about: dict[str, Any]) -> str:
    """The name of the file that keeps the features that are described so."""
    return hashlib.blake2b(json.dumps(about, sort_keys=True).encode(), digest_size=16).hexdigest()


def read_features(path: Path, about: dict[str, Any]) -> Kept | None:
    """What a file keeps; None if it is not there, of something else, or damaged, so that it is made again."""
    try:
        with safe_open(path, framework="pt") as file:  # pyright: ignore[reportArgumentType]
            told = json.loads((file.metadata() or {})[ABOUT])
            tensors = {name: file.get_tensor(name) for name in ("rows", "classes", "means")}
    except (OSError, ValueError, KeyError, SafetensorError):
        return None
    if told.get("about") != about or told.get("digest") != _digest(tensors):
        return None
    return _put(tensors, {int(row): why for row, why in told["damaged"].items()})


def _about(subject: Subject, pictures: Pictures, blocks: int) -> dict[str, Any]:
    return {
        "version": VERSION,
        "subject": subject.identity,
        "pictures": pictures.identity,
        "size": subject.size,
        "blocks": blocks,
        "batch": BATCH,
        "torch": torch.__version__,
        "device": subject.device.type,
    }


def _put(tensors: dict[str, Tensor], damaged: dict[int, str]) -> Kept:
    return Kept(tensors["rows"], tensors["classes"], tensors["means"], damaged)


def _compute(
    subject: Subject, pictures: Pictures, blocks: int, part: int, parts: int, done: Done | None, threads: int = 0
) -> tuple[dict[str, Tensor], dict[int, str]]:
    """The batches part, part + parts, ...: rows, classes and means, and what was damaged among them."""
    every = range(0, len(pictures), BATCH)
    mine = [range(start, min(start + BATCH, len(pictures))) for start in every][part::parts]
    seen = 0
    lock = threading.Lock()

    def one(rows: range) -> tuple[Tensor, Tensor, Tensor]:
        nonlocal seen
        # A ResNet's average and a ViT's patches are summed by one thread: how many there are must not show in the bits.
        torch.set_num_threads(1)
        found = [_see(subject, *each, blocks) for each in pictures.batches(subject.size, BATCH, torch.tensor(rows))]
        with lock:
            seen += len(rows)
            if done:
                done(seen * parts)
        return found[0] if found else (torch.zeros(0, dtype=torch.int64), torch.zeros(0), torch.zeros(0))

    before = torch.get_num_threads()
    workers = threads or cores()
    try:
        with ThreadPoolExecutor(workers, "gristmill-features") as pool:
            found = [each for each in pool.map(one, mine) if len(each[0])]
    finally:
        torch.set_num_threads(before)
    if not found and parts == 1:
        raise CacheError(f"none of the {len(pictures)} pictures of {pictures.where} decodes; nothing can be evaluated")
    inside = {row for rows in mine for row in rows}
    damaged = {row: why for row, why in pictures.damaged.items() if row in inside}
    empty = (torch.zeros(0, dtype=torch.int64), *[torch.zeros(0, blocks, subject.width)] * 2)
    columns = [torch.cat(each) for each in zip(*found, strict=True)] if found else list(empty)
    return dict(zip(("rows", "classes", "means"), columns, strict=True)), damaged


def _see(subject: Subject, rows: Tensor, images: Tensor, blocks: int) -> tuple[Tensor, Tensor, Tensor]:
    found = subject.blocks(images, blocks)
    means = [patches.mean(1) for _, patches in found]
    if means[-1].shape[-1] != subject.width:  # raw pixels: their patches are not features of the picture
        means = [first for first, _ in found]
    return rows, torch.stack([first for first, _ in found], 1).cpu(), torch.stack(means, 1).cpu()


def _digest(tensors: dict[str, Tensor]) -> str:
    state = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        value = tensors[name]
        state.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        state.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return state.hexdigest()


def _write(path: Path, tensors: dict[str, Tensor], about: dict[str, Any], damaged: dict[int, str]) -> None:
    tensors = {name: value.contiguous() for name, value in tensors.items()}
    told = {"about": about, "digest": _digest(tensors), "damaged": damaged}
    image = lay_out(tensors, {"format": "pt", ABOUT: json.dumps(told)})
    with published(path) as draft:
        for chunk in image.chunks():
            draft.write(chunk)  # pyright: ignore[reportArgumentType]


def _part(path: Path, part: int, parts: int) -> Path:
    return path.with_name(f"{path.stem}.part-{part}-of-{parts}.safetensors")


def _leave_part(subject: Subject, pictures: Pictures, blocks: int, path: Path, part: int, parts: int) -> None:
    """A worker's whole work. Threads are shared out, so that all workers together have the machine's."""
    threads = max(1, cores() // parts) if "RANK" not in os.environ else 0
    tensors, damaged = _compute(subject, pictures, blocks, part, parts, None, threads)
    _write(_part(path, part, parts), tensors, _about(subject, pictures, blocks), damaged)


def _merge(path: Path, about: dict[str, Any], parts: int) -> Kept:
    """Put all parts together, in the order of the rows, and take them away."""
    found = []
    for part in range(parts):
        kept = read_features(_part(path, part, parts), about)
        if kept is None:
            raise CacheError(f"part {part} of {parts} is missing from {path.parent}, or damaged; start it again")
        found.append(kept)
    rows = torch.cat([each.rows for each in found])
    order = rows.argsort()
    columns = {"rows": rows[order]}
    for name in ("classes", "means"):
        columns[name] = torch.cat([getattr(each, name) for each in found if len(each.rows)])[order]
    damaged = {row: why for each in found for row, why in each.damaged.items()}
    _write(path, columns, about, damaged)
    for part in range(parts):
        _part(path, part, parts).unlink(missing_ok=True)
    return _put(columns, damaged)


def _by_processes(subject: Subject, pictures: Pictures, blocks: int, path: Path, parts: int, done: Done | None) -> None:
    import torch.multiprocessing as processes

    # Workers are forked from a server without threads that has imported all this once; this process has threads.
    context = processes.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    work = [
        context.Process(target=_leave_part, args=(subject, pictures, blocks, path, part, parts), daemon=True)
        for part in range(parts)
    ]
    try:
        for process in work:
            process.start()
        for number, process in enumerate(work, 1):
            process.join()
            if process.exitcode:
                raise CacheError(
                    f"the process for part {number - 1} ended with {process.exitcode}; see its error above"
                )
            if done:
                done(len(pictures) * number // parts)
    except BaseException:
        for process in work:
            if process.pid is not None:
                process.kill()
                process.join()
        for part in range(parts):
            _part(path, part, parts).unlink(missing_ok=True)
        raise


def _by_ranks(
    subject: Subject,
    pictures: Pictures,
    blocks: int,
    path: Path,
    about: dict[str, Any],
    kept: Kept | None,
    done: Done | None,
) -> Kept:
    from torch import distributed

    rank, parts = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    with _group():
        # Whether there is a file is decided by one: another may see it a moment later.
        there: list[Any] = [kept is not None]
        distributed.broadcast_object_list(there, 0)
        if not there[0]:
            _leave_part(subject, pictures, blocks, path, rank, parts)
            distributed.barrier()
            if rank == 0:
                _merge(path, about, parts)
            if done:
                done(len(pictures))
        distributed.barrier()
    kept = read_features(path, about)
    if kept is None:
        raise CacheError(f"rank {rank} does not see {path}, which rank 0 has written; let --cache name a shared folder")
    return kept


@contextmanager
def _group() -> Iterator[None]:
    from torch import distributed

    own = not distributed.is_initialized()
    if own:
        distributed.init_process_group("gloo")
    try:
        yield
    finally:
        if own:
            distributed.destroy_process_group()
