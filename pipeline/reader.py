"""Encoded images of any positions, straight out of the tars, with damage replaced slot by slot.

A batch is sorted by place and dealt out to a few threads (share.py), which read it into memory that is used again and
check it, without the interpreter lock; each sample is a view of that memory. What is wrong in the
data itself (bytes missing, flipped, not an image) is put into quarantine and replaced by the first healthy sample of a
sequence that only (seed, position) decides, so that the stream is the same whether the damage was known before or not.
A sample that was removed on request is replaced likewise, and is no damage. What is wrong around the data (a shard that
is not there, storage that does not answer) stops the run: another sample would be another stream on the next machine.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import ArrayLike

from ..shards.manifest import Manifest
from ..shards.quarantine import Quarantine
from ..shards.retry import RetryPolicy
from .ahead import Ahead
from .checks import decodes
from .crew import Crew
from .fetch import DamageError, Fetcher
from .library import Library
from .order import Ints, Readable
from .philox import SUBSTITUTE, integers
from .share import REMOVED, Found, Share, native_loop
from .slabs import Slabs
from .usage import FetchStats, Usage, usage
from .views import CacheConfig

__all__ = ["DamageError", "ReadResult", "Reader", "Sample", "decodes"]

_CANDIDATES = 64  # tried at a time; with at most a few in a thousand damaged, the first one nearly always serves
_PLAIN = 4  # batches that are read before the compiled loop is loaded, so that a start does not wait for it
_PATIENCE = 3.0  # seconds that closing waits for a read that hangs


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
    substituted: np.ndarray  # bool [B]: stands in for another one, damaged or removed
    removed: np.ndarray  # bool [B]: for a removed one

    def put(self, slot: int, sample: Sample) -> None:
        """Let a substitute take this slot."""
        self.data[slot], self.keys[slot] = sample.data, sample.key
        self.ids[slot], self.sizes[slot], self.substituted[slot] = sample.place, sample.size, True


class Reader:
    """Reads samples by position. `read` and `replace` may be called from several threads; `close` it when done.

    `order` says which sample a position reads, over the shards of `manifest` (or of several, one after the other),
    `seed` which one stands in for it. `damage_bound` is the share of the data that may be in quarantine (always at least
    one sample) before DamageError stops the run. Shards behind urls go through `cache`, if there is one.
    """

    def __init__(
        self,
        manifest: Manifest | Sequence[Manifest],
        quarantine: Quarantine,
        *,
        order: Readable,
        seed: int,
        threads: int = 2,
        damage_bound: float = 0.001,
        cache: CacheConfig | None = None,
        policy: RetryPolicy | None = None,
        lanes: Ints | None = None,
    ) -> None:
        self.library, self.quarantine, self.order, self.seed = Library(manifest), quarantine, order, seed
        self.damage_limit = max(1, int(damage_bound * self.library.samples))
        self._fetcher = Fetcher(self.library, order, cache=cache, policy=policy, lanes=lanes)
        self._crew, self._slabs = Crew(threads, "gristmill-read"), Slabs()
        self._bad: dict[int, set[int]] = {}  # rows in quarantine by shard
        self._bad_known = 0
        self._numbers: dict[str, int] | None = None
        self._ahead = Ahead(order)
        self._lock = threading.RLock()
        self._reads, self._loop = 0, None
        self._check_bound()

    @property
    def stats(self) -> FetchStats:
        return self._fetcher.stats

    def usage(self) -> Usage:
        """Where the bytes came from, counted since the start."""
        return usage(self._fetcher)

    def read(self, positions: ArrayLike, decode_check: bool = False) -> ReadResult:
        """Samples of positions int64 [B]. `decode_check` decodes each image as well, and counts failure as damage.

        DamageError when a shard cannot be opened or read, was replaced, or too much of the data is damaged; StorageError
        when a server did not give it within the deadline.
        """
        positions = np.asarray(positions, np.int64)
        with self._lock:
            self._reads += 1
            if self._reads == _PLAIN:
                self._loop = native_loop()
            shards, rows = self._ahead.locate(positions)
            found = Found(len(positions))
            removed = self.order.removed(shards, rows)
            for slot in np.flatnonzero(removed).tolist():
                found.problems[slot] = REMOVED
            self._gather(shards, rows, found, decode_check)
            self._ask_again(shards, rows, found, decode_check)
            ids = np.stack([shards, rows], axis=1)
            result = ReadResult(
                found.data, found.keys, ids, found.sizes,
                np.zeros(len(positions), bool), removed,
            )  # fmt: skip
            # Damage is booked in slot order, not in the order in which the threads met it.
            for slot, problem in enumerate(found.problems):
                if problem is not None:
                    if isinstance(problem, str):
                        self._condemn(int(shards[slot]), int(rows[slot]), problem)
                    result.put(slot, self._substitute(int(positions[slot]), decode_check))
            if len(positions):
                self._fetcher.settle(int(positions[-1]) + 1, len(positions))
        return result

    def replace(self, position: int, bad: tuple[int, int], reason: str) -> Sample:
        """The substitute at this position, now that its sample `bad` (shard, row) proved damaged in decoding."""
        with self._lock:
            self._condemn(int(bad[0]), int(bad[1]), reason)
            return self._substitute(position, decode_check=False)

    def doing(self) -> list[tuple[str, str, float]]:
        """What the threads are at: (stage "read", "cache" or "storage", shard, since when by the monotonic clock)."""
        return [(stage, self.library.name(shard), since) for stage, shard, since in self._fetcher.activity.now()]

    def close(self) -> None:
        """Stop the threads and close the shards. A thread that hangs in the storage is left behind with its shard."""
        self._fetcher.halt()
        self._crew.close(_PATIENCE)
        self._fetcher.close(_PATIENCE)

    def _gather(self, shards: Ints, rows: Ints, found: Found, decode_check: bool) -> None:
        """Read the slots that have no problem and no data yet, on all threads."""
        self._learn_quarantine()
        chosen = np.arange(len(shards))
        if any(problem is not None for problem in found.problems):
            chosen = np.array([i for i in chosen if found.problems[i] is None and found.data[i] is None], np.int64)
        by_place = chosen[np.lexsort((rows[chosen], shards[chosen]))]
        slots, sorted_rows, of = by_place.tolist(), rows[by_place], shards[by_place]
        if not len(of):
            return
        starts = [0, *(np.flatnonzero(np.diff(of)) + 1).tolist()]
        groups = list(zip(of[starts].tolist(), starts, [*starts[1:], len(of)], strict=True))
        threads = min(self._crew.size, len(groups))
        work = partial(self._work, slots=slots, rows=sorted_rows, found=found, decode_check=decode_check)
        begin, waited = time.perf_counter(), [0.0] * threads
        self._crew.run([partial(work, groups[part::threads], waited=waited, part=part) for part in range(threads)])
        self.stats.seconds += min(max(waited, default=0.0), time.perf_counter() - begin)

    def _work(
        self,
        groups: list[tuple[int, int, int]],
        *,
        slots: list[int],
        rows: Ints,
        found: Found,
        decode_check: bool,
        waited: list[float],
        part: int,
    ) -> None:
        """One thread's part of a batch: (shard, from which of the sorted slots, to which)."""
        fetcher, loop = self._fetcher, self._loop
        most = max(1, fetcher.most_open // 2)
        try:
            for first in range(0, len(groups), most):
                lot, share = groups[first : first + most], Share(fetcher, self._slabs, found, decode_check, loop)
                for shard, a, b in lot:
                    share.add(shard, slots[a:b], rows[a:b], self._bad.get(shard))
                share.read()
                waited[part] += share.waited
                if fetcher.crowded():
                    fetcher.thin([shard for shard, _, _ in lot])
        finally:
            fetcher.busy.pop(threading.get_ident(), None)

    def _ask_again(self, shards: Ints, rows: Ints, found: Found, decode_check: bool) -> None:
        """What came wrong over a network, or out of the cache, may come right when it is fetched once more."""
        wrong = [slot for slot, problem in enumerate(found.problems) if isinstance(problem, str)]
        again = {shard: self._fetcher.mistrust(shard) for shard in {int(shards[slot]) for slot in wrong}}
        wrong = [slot for slot in wrong if again[int(shards[slot])]]
        if wrong:
            for slot in wrong:
                found.problems[slot] = None
            self._gather(shards, rows, found, decode_check)
            self.stats.refetched += sum(found.problems[slot] is None for slot in wrong)

    def _substitute(self, position: int, decode_check: bool) -> Sample:
        """First healthy sample of the position's own sequence. What turns out damaged on the way is booked too."""
        pool, tried = self.order.pool(position), 0
        while tried <= 16 * self.damage_limit + 1024:
            draws = integers(self.seed, [position], SUBSTITUTE, tried + _CANDIDATES, pool.samples)[0, tried:]
            shards, rows = pool.locate(draws)
            for i in np.flatnonzero(~self.order.removed(shards, rows)).tolist():
                one, found = slice(i, i + 1), Found(1)
                self._gather(shards[one], rows[one], found, decode_check)
                self._ask_again(shards[one], rows[one], found, decode_check)
                place = (int(shards[i]), int(rows[i]))
                if found.problems[0] is None:
                    return Sample(found.data[0], found.keys[0], place, (int(found.sizes[0, 0]), int(found.sizes[0, 1])))
                if isinstance(found.problems[0], str):
                    self._condemn(*place, found.problems[0])
            tried += _CANDIDATES
        raise self._too_much()

    def _condemn(self, shard: int, row: int, reason: str) -> None:
        self._fetcher.compare(shard)
        self.quarantine.add(self.library.name(shard), row, self.library.rows(shard).keys[row], reason)
        self._check_bound()

    def _learn_quarantine(self) -> None:
        """Sort new entries of the quarantine by shard; those of other data sets are not ours."""
        if self.quarantine.count == self._bad_known:
            return
        if self._numbers is None:
            self._numbers = {self.library.name(shard): shard for shard in range(len(self.library))}
        for entry in self.quarantine:
            if (shard := self._numbers.get(entry.shard)) is not None:
                self._bad.setdefault(shard, set()).add(entry.row)
        self._bad_known = self.quarantine.count

    def _check_bound(self) -> None:
        if self.quarantine.count > self.damage_limit:
            raise self._too_much()

    def _too_much(self) -> DamageError:
        first, title = next(iter(self.quarantine), None), self.library.title
        about = "" if first is None else f"; the first is {first.key} in {first.shard} ({first.reason})"
        return DamageError(
            f"{self.quarantine.count} of {self.library.samples} samples in {title} are damaged, more than "
            f"the {self.damage_limit} allowed{about}. Run "
            f"`gristmill verify {title}`, restore these shards or ingest again, or raise stream.damage_bound"
        )
