"""Encoded images of any positions, straight out of the tars, with damage replaced slot by slot.

One `preadv` a sample at the manifest's offset, in file order, on a few threads: both the read and the checksum release
the interpreter lock, so this costs a fraction of walking a tar member by member, and a damaged tar cannot take the rest
of its shard with it. What is wrong in the data itself (bytes missing, flipped, not an image) is put into quarantine and
replaced by the first healthy sample of a sequence that only (seed, position) decides, so that the stream is the same
whether the damage was known before or not. What is wrong around it (a shard that is not there, an I/O error) stops the
run at once: another sample in its place would be another stream on the next machine.
"""

from __future__ import annotations

import io
import os
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image

from ..shards.errors import GristmillError
from ..shards.manifest import Manifest, Rows
from ..shards.quarantine import Quarantine
from .order import Locator, Sequential
from .philox import SUBSTITUTE, integers

_OPEN_SHARDS = 128  # descriptors kept between batches; a process may commonly have 1,024
_CANDIDATES = 64  # tried at a time; with at most a few in a thousand damaged, the first one nearly always serves
_ORIENTATION, _SIDEWAYS = 0x0112, (5, 6, 7, 8)  # EXIF: turned by a quarter, so that width and height change places
_BLOCK = 512  # of a tar


class DamageError(GristmillError):
    """More damage than a run may read past, or a shard that is missing, unreadable or another one than indexed."""


@dataclass
class Sample:
    """One encoded image and where it came from."""

    data: np.ndarray  # uint8 [bytes]
    key: str
    place: tuple[int, int]  # shard, row
    size: tuple[int, int]  # width, height, upright


@dataclass
class ReadResult:
    """Samples of B positions, in the order of the positions. Everything tells of what was delivered, substitutes too."""

    data: list[np.ndarray]  # uint8 [bytes] each
    keys: list[str]
    ids: np.ndarray  # int64 [B, 2]: shard, row
    sizes: np.ndarray  # int32 [B, 2]: width, height in pixels, upright
    substituted: np.ndarray  # bool [B]

    def put(self, slot: int, sample: Sample) -> None:
        """Let a substitute take this slot."""
        self.data[slot], self.keys[slot] = sample.data, sample.key
        self.ids[slot], self.sizes[slot], self.substituted[slot] = sample.place, sample.size, True


class _Damage(Exception):
    """What is wrong with one sample. Never leaves this module: it becomes a line in the quarantine."""


class Reader:
    """Reads samples by position. `read` and `replace` may be called from several threads; `close` it when done.

    `order` says which sample a position reads, `seed` which one stands in for it. `damage_bound` is the share of the
    data set that may be in quarantine (always at least one sample) before DamageError stops the run.
    """

    def __init__(
        self,
        manifest: Manifest,
        quarantine: Quarantine,
        *,
        order: Locator,
        seed: int,
        threads: int = 2,
        damage_bound: float = 0.001,
    ) -> None:
        self.manifest, self.quarantine, self.order, self.seed = manifest, quarantine, order, seed
        self.damage_limit = max(1, int(damage_bound * manifest.samples))
        self.busy: dict[int, str] = {}  # thread -> the shard that it is reading, for whoever asks why it takes so long
        self._all = Sequential(manifest.counts)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="gristmill-read")
        self._threads = threads
        self._files: dict[int, int] = {}  # descriptors of open shards
        self._lock = threading.RLock()
        self._check_bound()

    def read(self, positions: ArrayLike, decode_check: bool = False) -> ReadResult:
        """Samples of positions int64 [B]. `decode_check` decodes each image as well, and counts failure as damage.

        DamageError when a shard cannot be opened or read, was replaced, or too much of the data is damaged.
        """
        positions = np.asarray(positions, np.int64)
        shards, rows = self.order.locate(positions)
        in_file_order = np.lexsort((rows, shards))
        groups = [
            (shard, list(slots)) for shard, slots in groupby(in_file_order.tolist(), key=lambda i: int(shards[i]))
        ]
        with self._lock:
            found: list[Sample | str | None] = [None] * len(positions)

            def work(part: int) -> None:
                for shard, slots in groups[part :: self._threads]:
                    self.busy[part] = self.manifest.urls[shard]
                    try:
                        for slot in slots:
                            found[slot] = self._take(shard, int(rows[slot]), decode_check)
                    finally:
                        del self.busy[part]
                    if len(self._files) > _OPEN_SHARDS and (handle := self._files.pop(shard, None)) is not None:
                        os.close(handle)

            jobs = [self._pool.submit(work, part) for part in range(min(self._threads, len(groups)))]
            wait(jobs)
            for job in jobs:
                job.result()
            if len(self._files) >= _OPEN_SHARDS:
                self._forget(set(self._files) - {shard for shard, _ in groups})
            substituted = np.zeros(len(positions), bool)
            samples: list[Sample] = []
            # Damage is booked in slot order, not in the order in which the threads met it.
            for slot, sample in enumerate(found):
                if not isinstance(sample, Sample):
                    if sample is not None:
                        self._condemn(int(shards[slot]), int(rows[slot]), sample)
                    sample, substituted[slot] = self._substitute(int(positions[slot]), decode_check), True
                samples.append(sample)
        return ReadResult(
            data=[sample.data for sample in samples],
            keys=[sample.key for sample in samples],
            ids=np.array([sample.place for sample in samples], np.int64).reshape(-1, 2),
            sizes=np.array([sample.size for sample in samples], np.int32).reshape(-1, 2),
            substituted=substituted,
        )

    def replace(self, position: int, bad: tuple[int, int], reason: str) -> Sample:
        """The substitute at this position, now that its sample `bad` (shard, row) proved damaged in decoding."""
        with self._lock:
            self._condemn(int(bad[0]), int(bad[1]), reason)
            return self._substitute(position, decode_check=False)

    def close(self) -> None:
        """Stop the threads and close the shards."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        with self._lock:
            self._forget(set(self._files))

    def _take(self, shard: int, row: int, decode_check: bool) -> Sample | str | None:
        """The sample, or what is wrong with it, or None if that is already known."""
        if (self.manifest.urls[shard], row) in self.quarantine:
            return None
        rows = self.manifest.rows(shard)
        try:
            data = self._bytes(shard, row, rows)
            size = (int(rows.width[row]), int(rows.height[row])) if rows.deep else _header_size(data)
        except _Damage as damage:
            return str(damage)
        if decode_check and not decodes(data):
            return "does not decode"
        return Sample(data, rows.keys[row], (shard, row), size)

    def _bytes(self, shard: int, row: int, rows: Rows) -> np.ndarray:
        offset, length = int(rows.offset[row]), int(rows.length[row])
        # Without a checksum the tar's own header, just before the data, tells whether this still is the same member.
        ahead = 0 if rows.deep else min(_BLOCK, offset)
        whole = np.empty(ahead + length, np.uint8)
        done = 0
        try:
            handle = self._handle(shard)
            while done < len(whole):
                got = os.preadv(handle, [whole.data[done:]], offset - ahead + done)
                if not got:
                    break
                done += got
        except OSError as error:
            raise self._shard_error(shard, f"cannot be read ({error.strerror})") from error
        if done < len(whole):
            raise _Damage(f"truncated: {max(0, done - ahead)} of {length} bytes at offset {offset}")
        data = whole[ahead:]
        if rows.deep:
            crc = zlib.crc32(data.data)
            if crc != int(rows.crc32[row]):
                raise _Damage(f"checksum {crc:08x} instead of {int(rows.crc32[row]):08x} at offset {offset}")
        elif ahead == _BLOCK and _member_size(whole[:_BLOCK]) != length:
            raise _Damage(f"no tar member of {length} bytes at offset {offset}")
        return data

    def _handle(self, shard: int) -> int:
        """A shard's descriptor. Within a batch only one thread deals with a shard, so none opens it twice."""
        if shard not in self._files:
            handle = os.open(self.manifest.path(shard), os.O_RDONLY | os.O_CLOEXEC)
            self._files[shard] = handle
            size, indexed = os.fstat(handle).st_size, int(self.manifest.shard_bytes[shard])
            # A shorter shard was truncated: what is left of it is good. A longer one is another shard.
            if size > indexed:
                raise self._shard_error(shard, f"was replaced: it has {size} bytes instead of {indexed}")
        return self._files[shard]

    def _forget(self, shards: set[int]) -> None:
        """Close these shards. No thread may be reading."""
        for shard in shards:
            os.close(self._files.pop(shard))

    def _substitute(self, position: int, decode_check: bool) -> Sample:
        """First healthy sample of the position's own sequence. What turns out damaged on the way is booked too."""
        tried = 0
        while tried <= 16 * self.damage_limit + 1024:
            draws = integers(self.seed, [position], SUBSTITUTE, tried + _CANDIDATES, self._all.samples)[0, tried:]
            for shard, row in zip(*self._all.locate(draws), strict=True):
                sample = self._take(int(shard), int(row), decode_check)
                if isinstance(sample, Sample):
                    return sample
                if sample is not None:
                    self._condemn(int(shard), int(row), sample)
            tried += _CANDIDATES
        raise self._too_much()

    def _condemn(self, shard: int, row: int, reason: str) -> None:
        self.quarantine.add(self.manifest.urls[shard], row, self.manifest.rows(shard).keys[row], reason)
        self._check_bound()

    def _check_bound(self) -> None:
        if self.quarantine.count > self.damage_limit:
            raise self._too_much()

    def _too_much(self) -> DamageError:
        first = next(iter(self.quarantine))
        return DamageError(
            f"{self.quarantine.count} of {self.manifest.samples} samples in {self.manifest.root} are damaged, more than "
            f"the {self.damage_limit} allowed; the first is {first.key} in {first.shard} ({first.reason}). Run "
            f"`gristmill verify {self.manifest.root}`, restore these shards or ingest again, or raise damage_bound"
        )

    def _shard_error(self, shard: int, problem: str) -> DamageError:
        return DamageError(
            f"shard {self.manifest.urls[shard]} {problem}: {self.manifest.path(shard)}. Restore it or ingest again, then "
            f"resume; `gristmill verify {self.manifest.root}` checks the whole data set"
        )


def _member_size(header: np.ndarray) -> int:
    """Size of the member that a tar header block announces, or -1 where there is no header."""
    field = header[124:136].tobytes()
    if field[0] & 0x80:  # GNU: base 256, for members of 8 GiB and more
        return int.from_bytes(field[1:], "big")
    digits = field.strip(b" \0")
    return int(digits, 8) if digits and not digits.strip(b"01234567") else -1


def _header_size(data: np.ndarray) -> tuple[int, int]:
    """Upright width and height from an image's header, without decoding it."""
    try:
        with Image.open(io.BytesIO(data.data)) as image:
            width, height = image.size
            sideways = image.getexif().get(_ORIENTATION) in _SIDEWAYS
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise _Damage(f"no image header: {error}") from error
    return (height, width) if sideways else (width, height)


def decodes(data: np.ndarray) -> bool:
    """Whether Pillow decodes these encoded bytes, uint8 [n]."""
    try:
        with Image.open(io.BytesIO(data.data)) as image:
            image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return False
    return True
