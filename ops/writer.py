"""Writes checkpoints while training goes on: the step waits for a copy to host memory, and for nothing else.

A write has two phases, each ended by all ranks together: every rank writes its files beside the final place, then rank 0
publishes. Nothing here communicates. `flags()` gives two numbers that the loop adds to the vector which it reduces over
all ranks anyway, and `settle()` gets their sums, so that all ranks change phase at the same step. One write is in flight
at a time, into one host buffer that is kept. A write that fails costs that checkpoint, not the run: it is discarded on
all ranks, the older ones stay, and the loop is told why.
"""

from __future__ import annotations

import json
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..shards.storage import NO_SPACE
from .checkpoint import (
    DIGEST,
    NAMES,
    PLAIN,
    STATE,
    CheckpointError,
    Content,
    Image,
    Total,
    compose,
    key_of,
    lay_out,
)
from .stores import Store

ALIGN = 64  # bytes; every tensor type may begin there
PATIENCE = 30.0  # seconds that rank 0 waits for a note that another rank has written but a shared folder does not show
ELSEWHERE = "another rank could not"  # how the failure ends on ranks that have nothing to say about it


@dataclass(frozen=True)
class Settled:
    """How a write ended: published, or failed and discarded on all ranks (`failure` says why)."""

    position: int
    seconds: float  # since `begin`, most of them beside training
    bytes: int  # of all files on rank 0, of its own on another rank
    failure: str | None = None
    warning: str | None = None  # published, but older ones could not be removed


@dataclass
class _Job:
    """One write in flight."""

    position: int
    images: dict[str, Image]  # file name without its end -> what goes in
    note: dict[str, Any]  # what rank 0 must know of this rank's files
    state: str
    began: float
    publishing: bool = False
    names: list[str] = field(default_factory=list)  # files that this rank has put, or begun to
    size: int = 0
    error: BaseException | None = None
    warning: str | None = None
    ended: threading.Event = field(default_factory=threading.Event)


class Writer:
    """Writes, publishes and prunes the checkpoints of a run; one object on each rank, called alike on all ranks.

    keep: how many of the newest stay; None: all, captures for example. keep_every: besides, the first at or beyond each
    multiple of so many images stays (0: none). Rank 0's constructor sweeps what a killed writer left, so a collective
    must lie between constructing and the first `begin` (loading has several). Raises CheckpointError if the store cannot
    be written.
    """

    def __init__(
        self, store: Store, rank: int, world: int, keep: int | None, keep_every: int = 0, asynchronous: bool = True
    ) -> None:
        if keep is not None and keep < 1:
            raise ValueError(f"keep: {keep} checkpoints would leave none to go on from")
        self.store, self.rank, self.world = store, rank, world
        self.keep, self.keep_every, self.asynchronous = keep, keep_every, asynchronous
        self._job: _Job | None = None
        self._buffer: Tensor | None = None
        self._litter: list[tuple[int, list[str]]] = []  # what failed writes left in an object store
        if rank == 0:
            store.prepare()

    @property
    def busy(self) -> bool:
        """Whether a write is in flight; the same on all ranks."""
        return self._job is not None

    def begin(self, position: int, content: Content) -> float:
        """Copy what this rank writes, and write it in the background; returns the seconds that the caller waited.

        The tensors may change as soon as this returns. Raises RuntimeError while a write is in flight: settle it first.
        """
        began = time.perf_counter()
        if self._job is not None:
            raise RuntimeError(f"the checkpoint at {self._job.position} is in flight: settle or finish it first")
        images = {f"rank-{self.rank:05d}": lay_out(_named(content))}
        if self.rank == 0:
            images |= {f"whole-{_plain(group)}": lay_out(tensors) for group, tensors in content.whole.items()}
        index = [[p.group, p.name, p.start, p.start + p.tensor.numel()] for p in content.parts if p.tensor.numel()]
        kinds = {(p.group, p.name): [p.group, p.name, NAMES[p.tensor.dtype], list(p.shape)] for p in content.parts}
        note = {"index": index, "tensors": list(kinds.values())}
        state = json.dumps(content.state) if self.rank == 0 else ""
        self._job = job = _Job(position, images, note, state, began)
        if not self.asynchronous:
            self._run(self._write, job)
            return time.perf_counter() - began
        try:
            job.images = self._host_copy(images)
        except CheckpointError as error:  # no room for the copy is no reason to stop
            job.error = error
            job.ended.set()
        else:
            self._start(self._write, job)
        return time.perf_counter() - began

    def flags(self) -> list[float]:
        """[this rank is done with the phase, this rank failed], to be added up over all ranks."""
        job = self._job
        ended = job is not None and job.ended.is_set()
        return [float(ended), float(ended and job is not None and job.error is not None)]

    def settle(self, done: float, failed: float) -> Settled | None:
        """Take the sums of all ranks' `flags`; returns how the write ended, once it has, on all ranks at the same call.

        An error that is neither the store's nor the checkpoint's, a fault in the program, is raised on its rank.
        """
        job = self._job
        if job is None or round(done) < self.world:
            return None
        failure = None
        if round(failed):
            failure = self._give_up(job)
        elif not job.publishing:
            job.publishing = True
            if self.rank == 0:
                job.ended = threading.Event()
                if self.asynchronous:
                    self._start(self._publish, job)
                else:
                    self._run(self._publish, job)
            return None
        self._job = None
        seconds = time.perf_counter() - job.began
        return Settled(job.position, seconds, job.size, failure, job.warning)

    def finish(self, total: Total) -> Settled | None:
        """Wait until the write in flight is published; `total` adds up over ranks. None if there is none in flight.

        Collective. Raises CheckpointError on all ranks if it failed.
        """
        settled = None
        while self._job is not None:
            self._job.ended.wait()
            settled = self.settle(*total(self.flags()))
        if settled and settled.failure:
            raise CheckpointError(settled.failure)
        return settled

    def close(self) -> None:
        """Wait for this rank's part of a write in flight; what was not published by now is discarded. Not collective.

        In an object store it is left to the next writer's sweep: removing it may take long, or not be possible.
        """
        job, self._job, self._buffer = self._job, None, None
        if job is not None:
            job.ended.wait()
            if not (job.publishing or self.store.remote):
                self.store.discard(job.position, job.names)

    def _start(self, work: Any, job: _Job) -> None:
        threading.Thread(target=self._run, args=(work, job), name="checkpoint", daemon=True).start()

    def _run(self, work: Any, job: _Job) -> None:
        try:
            work(job)
        except BaseException as error:  # carried to the loop's thread, which raises or reports it in `settle`
            job.error = error
        finally:
            job.ended.set()

    def _host_copy(self, images: dict[str, Image]) -> dict[str, Image]:
        """The same files with their bodies in one host buffer, which is pinned if some tensor is on a GPU."""
        devices = {t.device for image in images.values() for t in image.tensors if t.is_cuda}
        starts, at = {}, 0
        for name, image in images.items():
            starts[name] = at
            at += -(-image.body // ALIGN) * ALIGN
        if self._buffer is None or len(self._buffer) < at:
            self._buffer = None  # before the new one is made
            try:
                self._buffer = torch.empty(at, dtype=torch.uint8, pin_memory=bool(devices))
            except RuntimeError as error:
                raise CheckpointError(
                    f"no host memory for a copy of the checkpoint ({at / 1e6:.0f} MB): {str(error).splitlines()[0]}. "
                    "Run fewer processes a machine, or write checkpoints synchronously."
                ) from error
        copies = {}
        for name, image in images.items():
            body = self._buffer[starts[name] : starts[name] + image.body]
            at = 0
            for tensor in image.tensors:
                if tensor.numel():
                    place = body[at : at + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
                    place.copy_(tensor.detach(), non_blocking=True)
                    at += tensor.nbytes
            copies[name] = Image(image.header, [body])
        for device in devices:
            torch.cuda.current_stream(device).synchronize()
        return copies

    def _write(self, job: _Job) -> None:
        """This rank's files, then the note of them that rank 0 reads."""
        while self._litter:  # here and not in `settle`: a store that has just failed may let one wait
            self.store.discard(*self._litter.pop())
        end = f"{self.store.suffix(job.position)}.safetensors"
        digests = {}
        for stem, image in job.images.items():
            name = stem + end
            job.names.append(name)
            digests[name], size = self.store.put(job.position, name, image.chunks())
            job.size += size
        whole = {stem.removeprefix("whole-"): stem + end for stem in job.images if stem.startswith("whole-")}
        mine = f"rank-{self.rank:05d}{end}"
        index = [[*row, mine] for row in job.note["index"]]
        note = {"digests": digests, "bytes": job.size, "whole": whole, "tensors": job.note["tensors"], "index": index}
        job.names.append(_note(self.rank))
        self.store.put(job.position, _note(self.rank), [memoryview(json.dumps(note).encode())])
        job.images = {}

    def _publish(self, job: _Job) -> None:
        notes = [json.loads(self._read_note(job.position, rank)) for rank in range(self.world)]
        state = compose(job.position, notes, job.state)
        job.size = sum(note["bytes"] for note in notes)
        job.names += [STATE, DIGEST]
        self.store.publish(job.position, state, [_note(rank) for rank in range(self.world)])
        try:
            self._prune(job.position)
        except OSError as error:
            job.warning = f"older checkpoints in {self.store} cannot be removed: {error.strerror or error}"

    def _read_note(self, position: int, rank: int) -> bytes:
        until = time.monotonic() + PATIENCE
        while True:
            try:
                return self.store.read_unpublished(position, _note(rank))
            except FileNotFoundError as error:
                if time.monotonic() > until:
                    raise CheckpointError(
                        f"rank 0 does not see what rank {rank} wrote to {self.store}: all ranks must share this place"
                    ) from error
                time.sleep(0.1)

    def _prune(self, newest: int) -> None:
        """Keep the newest ones up to the one just published, which is verified, and so never goes.

        Those beyond it were passed over as damaged, or belong to a future that a rollback gave up: they would be taken
        for newer.
        """
        if self.keep is None:
            return
        found = sorted(self.store.positions())
        upto = [position for position in found if position <= newest]
        kept = {*upto[-self.keep :]}
        if self.keep_every:
            firsts: dict[int, int] = {}
            for position in upto:
                firsts.setdefault(position // self.keep_every, position)
            kept |= {position for multiple, position in firsts.items() if multiple}
        for position in found:
            if position not in kept:
                self.store.remove(position)

    def _give_up(self, job: _Job) -> str:
        """Discard what this rank wrote; returns why."""
        if not self.store.remote:
            self.store.discard(job.position, job.names)
        elif not job.publishing:  # once publishing began, whether the store took the put that failed is not known
            self._litter.append((job.position, job.names))
        if job.error is None:
            return f"the checkpoint {self.store.shown(job.position)} was not written: {ELSEWHERE}"
        if isinstance(job.error, CheckpointError):
            return str(job.error)
        if not isinstance(job.error, OSError):
            self._job = None
            raise job.error
        place, why = self.store.shown(job.position), job.error.strerror or str(job.error)
        free = self.store.free()
        room = f" ({free / 1e6:.0f} MB free there)" if free is not None else ""
        remedy = "make room" if job.error.errno in NO_SPACE else f"look at {self.store}"
        return (
            f"could not write the checkpoint {place}: {why}{room}. Older checkpoints are untouched; {remedy}: the next "
            "one is tried as usual, or start the same command again if the run has ended."
        )


def _note(rank: int) -> str:
    return f"rank-{rank:05d}.json"


def _plain(group: str) -> str:
    if not PLAIN.fullmatch(group):
        raise ValueError(f"{group!r} cannot name a group of tensors: letters, digits, '_', '.' and '-' can")
    return group


def _named(content: Content) -> dict[str, Tensor]:
    """A rank's parts by their keys in its file. Raises ValueError for parts that make no sense."""
    named: dict[str, Tensor] = {}
    for part in content.parts:
        size = torch.Size(part.shape).numel()
        if part.tensor.dim() != 1 or not 0 <= part.start <= part.start + part.tensor.numel() <= size:
            raise ValueError(f"{part.group} {part.name}: {part.start} + {list(part.tensor.shape)} of {part.shape}")
        key = key_of(_plain(part.group), part.name, part.start)
        if part.tensor.numel() and key in named:
            raise ValueError(f"{part.group} {part.name}: two parts begin at {part.start}")
        if part.tensor.numel():
            named[key] = part.tensor
    return named
