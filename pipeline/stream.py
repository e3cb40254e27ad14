"""The order of everything that a recipe reads: data sets filtered, mixed and growing, behind one `locate`.

A position first finds its data set (mixing.py), whose own position finds a place in its order (growth.py, order.py),
which counts selected samples only and so finds the row through the filter's bits (selection.py). Of one plain data set
this is `Order`, bit for bit. What happened on the way (weights changed, shards taken up, samples removed) is a list of
positions in the cursor: `Stream(..., cursor=...)` checks that it fits, says by the field's name what does not, and
leaves in `stream.cursor` the one to go on with. Shards of several data sets are numbered one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .cursor import Cursor, CursorError
from .growth import Grown, Taken
from .mixing import Mixing, proportions
from .order import Ints, OrderError, derived
from .source import Places, Pool, Source, honoured

_SOURCES = 1  # purpose of the seeds of all data sets but the first
_SHORT = 16  # hex digits of a data set's digest where there are several

TakeUp = Literal["epoch", "never"] | int


class Stream:
    """What all ranks read, position by position. `locate` is pure: two streams with equal cursors are equal.

    With `cursor` it goes on from there, or CursorError names the field that does not fit. New shards of a data set are
    taken up at its next epoch, at a named position, or "never" (`take_up`); `mixture_from` is the position from which
    weights hold that differ from those of the cursor, or with which a further data set joins.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        seed: int,
        lanes: int = 64,
        window: int = 65536,
        *,
        cursor: Cursor | None = None,
        take_up: TakeUp = "epoch",
        mixture_from: int | None = None,
    ) -> None:
        if not sources:
            raise OrderError("a stream needs at least one data set")
        self.sources = list(sources)
        self.first = np.concatenate([[0], np.cumsum([len(source.counts) for source in sources])]).astype(np.int64)
        self.counts = np.concatenate([source.counts for source in sources])
        self._removed = Places(_removed(sources, self.first))
        weights = tuple(float(source.weight) for source in sources)
        if cursor is None:
            shards = [len(source.counts) for source in sources]
            cursor = Cursor("", int(seed), int(lanes), int(window), mixture=((0, weights),) if len(sources) > 1 else ())
            cursor = replace(cursor, grown=tuple((0, number, count) for number, count in enumerate(shards)))
            cursor = self._identified(cursor).fitting("data")
        else:
            cursor.check(cursor.data, seed, lanes, window, cursor.where)
            cursor = self._fitting_data(cursor)
            cursor = self._reweighed(cursor, weights, mixture_from)
        self._set_up(cursor)
        if cursor.position or take_up != "epoch":
            self._take_up(take_up)
        elif any(self.waiting.values()):
            self._take_up(0)  # nothing was read yet

    @property
    def waiting(self) -> dict[str, int]:
        """Shards that lie there but that no position reads: number by data set."""
        return {
            source.name: len(source.counts) - order.taken[-1][1]
            for source, order in zip(self.sources, self.orders, strict=True)
        }

    def locate(self, positions: ArrayLike) -> tuple[Ints, Ints]:
        """(shard int64 [n], row int64 [n]) of each position int64 [n]; shards count through all data sets."""
        source, own = self.mixing.at(positions)
        shard, row = np.empty_like(own), np.empty_like(own)
        for number, (data, order) in enumerate(zip(self.sources, self.orders, strict=True)):
            here = source == number
            if here.any():
                shard[here], rank = order.locate(own[here])
                row[here] = data.rows(shard[here], rank)
                shard[here] += self.first[number]
        return shard, row

    def split(self, shard: ArrayLike) -> tuple[Ints, Ints]:
        """(data set int64 [n], shard in it int64 [n]) of shards as `locate` numbers them."""
        shard = np.asarray(shard, np.int64)
        source = np.searchsorted(self.first, shard, side="right") - 1
        return source, shard - self.first[source]

    def removed(self, shard: ArrayLike, row: ArrayLike) -> NDArray[np.bool_]:
        """Whether each sample is removed, so that a substitute takes its slot: bool [n]."""
        return self._removed.hold(shard, row)

    def pool(self, position: int) -> Pool:
        """What a substitute at this position is drawn from: its data set's selected samples, as far as taken up.

        Removed samples are among them, so that a removal moves no other substitute: pass over them as over damage.
        """
        source, own = (int(array[0]) for array in self.mixing.at(np.array([position])))
        return Pool(self.orders[source].pool(own), self.sources[source], int(self.first[source]))

    def epochs(self, position: int) -> list[int]:
        """How often each data set was read from end to end before this position."""
        counts = self.mixing.counts(position).tolist()
        return [order.epoch(own) for order, own in zip(self.orders, counts, strict=True)]

    def epoch(self, position: int) -> int:
        """How often everything was read before this position: the epoch of the data set that is furthest behind."""
        return min(self.epochs(position))

    def _set_up(self, cursor: Cursor) -> None:
        self.cursor = cursor
        number = len(self.sources)
        self.mixing = Mixing(cursor.seed, number, cursor.mixture or ((0, (1.0,)),))
        self.orders = [
            Grown(
                source.selected,
                cursor.seed if i == 0 else derived(cursor.seed, i, _SOURCES),
                cursor.lanes,
                cursor.window,
                self._taken(i),
            )
            for i, source in enumerate(self.sources)
        ]
        self.samples = sum(order.samples for order in self.orders)

    def _taken(self, source: int) -> Taken:
        """When a data set took up shards, in its own positions."""
        entries = [(start, shards) for start, which, shards in self.cursor.grown if which == source]
        own = [0, *(int(self.mixing.counts(start)[source]) for start, _ in entries[1:])]
        return tuple((at, shards) for at, (_, shards) in zip(own, entries, strict=True))

    def _shards(self, cursor: Cursor) -> list[int]:
        """How many shards of each data set the cursor knows."""
        known = {source: shards for _, source, shards in cursor.grown}
        return [known.get(i, len(source.counts)) for i, source in enumerate(self.sources)]

    def _identities(self, shards: Sequence[int]) -> tuple[list[str], list[str]]:
        """Digest of each data set, and of what its filter selects, over its first shards."""
        cut = _SHORT if len(self.sources) > 1 else None
        data = [source.digest(n)[:cut] for source, n in zip(self.sources, shards, strict=True)]
        where = [
            "" if source.selection is None else source.selection.digest(n)
            for source, n in zip(self.sources, shards, strict=True)
        ]
        return data, where

    def _identified(self, cursor: Cursor) -> Cursor:
        """The cursor with the present identity of the data on record."""
        data, where = self._identities(self._shards(cursor))
        removed = [honoured(source) for source in self.sources]
        return replace(
            cursor,
            data="+".join(data),
            where="+".join(where) if any(where) else "",
            removed=tuple(removed) if any(count for count, _ in removed) else (),
        )

    def _fitting_data(self, cursor: Cursor) -> Cursor:
        """The cursor, if these data sets are its own; every shard, filter and tombstone that it knows must be there."""
        known = len(cursor.data.split("+"))
        if known > len(self.sources):
            raise CursorError(
                f"data: the checkpoint mixes {known} data sets, this run has {len(self.sources)}: name all of them, in the "
                "same order; give those that are not wanted any more weight 0"
            )
        if not cursor.grown:  # written without a stream: all shards there were
            whole = tuple((0, i, len(source.counts)) for i, source in enumerate(self.sources[:known]))
            cursor = replace(cursor, grown=whole)
        if {source for _, source, _ in cursor.grown} != set(range(known)):
            raise CursorError(
                "grown: does not tell of each data set: take the cursor from another checkpoint, unchanged"
            )
        shards = self._shards(cursor)
        for source, n in zip(self.sources, shards, strict=True):
            if n > len(source.counts):
                raise CursorError(
                    f"grown: the checkpoint reads {n} shards of {source.name}, which has {len(source.counts)}: shards were "
                    "taken away; restore them, or begin a new run folder"
                )
        data, where = self._identities(shards)
        theirs = cursor.where.split("+") if cursor.where else [""] * known
        gone = cursor.removed or ((0, ""),) * known
        if len(theirs) != known or len(gone) != known:
            raise CursorError("where: not one entry a data set: take the cursor from another checkpoint, unchanged")
        for i, (source, was) in enumerate(zip(self.sources, cursor.data.split("+"), strict=False)):
            about = f" ({source.name})" if len(self.sources) > 1 else ""
            if was[: len(data[i])] != data[i]:
                raise CursorError(
                    f"data: the checkpoint was written with {was!r}, but this run has {data[i]!r}{about}, which is another "
                    "stream. To resume, point the recipe at the data set that the run was started on, with all its "
                    "shards; to begin anew, use a new run folder"
                )
            if theirs[i] != where[i]:
                raise CursorError(
                    f"where: the filter selects other samples than it did when the checkpoint was written{about}. Give the "
                    "filter of the run's recipe.yaml; if it is the same, the manifest's columns were changed "
                    "(`gristmill index --deep` fills sizes): restore them, or begin a new run folder"
                )
            count, digest = gone[i]
            if count and (source.removed is None or source.removed.digest(count) != digest):
                raise CursorError(
                    f"removed: {count} removed samples that the run honoured are no longer the first ones in the tombstones "
                    f"of the data set{about}: restore its tombstones.jsonl; samples can be removed, not put back"
                )
        return self._identified(cursor) if known == len(self.sources) else cursor

    def _reweighed(self, cursor: Cursor, weights: tuple[float, ...], at: int | None) -> Cursor:
        """The cursor with weights that changed, or data sets that joined, from position `at` on."""
        known, number = len(cursor.data.split("+")), len(self.sources)
        history = cursor.mixture or ((0, (1.0,)),)
        if known == number and (number == 1 or proportions(history[-1][1], number) == proportions(weights, number)):
            return cursor
        what = f"{self.sources[known].name} is new" if number > known else f"the weights were {list(history[-1][1])}"
        if at is None or at < cursor.position:
            raise CursorError(
                f"mixture: {what}, and this run has {list(weights)}. Say from which position on that holds (mixture_from, "
                f"{cursor.position} or later), or restore the old weights"
            )
        joined = tuple((0, i, len(self.sources[i].counts)) for i in range(known, number))
        kept = tuple(entry for entry in history if entry[0] < at)
        cursor = replace(cursor, mixture=(*kept, (at, weights)), grown=(*cursor.grown, *joined))
        return self._identified(cursor).fitting("mixture")

    def _take_up(self, when: TakeUp) -> None:
        if when == "never":
            return
        cursor = self.cursor
        for i, (source, order) in enumerate(zip(self.sources, self.orders, strict=True)):
            if len(source.counts) == order.taken[-1][1]:
                continue
            last = max(start for start, which, _ in cursor.grown if which == i)
            at = max(self._next_epoch(i), last) if when == "epoch" else when
            if at < max(cursor.position, last):
                raise CursorError(
                    f"grown: new shards of {source.name} cannot be taken up at position {at}: the run is at "
                    f"{cursor.position} and took up the last ones at {last}; name a position from there on, or `epoch`"
                )
            grown = (*cursor.grown, (at, i, len(source.counts)))
            if at == last:  # one that took effect nowhere is replaced
                grown = tuple(entry for entry in grown if entry[:2] != (at, i) or entry[2] == len(source.counts))
            cursor = replace(cursor, grown=grown)
        if cursor is not self.cursor:
            self._set_up(self._identified(cursor).fitting("grown"))

    def _next_epoch(self, source: int) -> int:
        """The position at which a data set's next epoch begins; the cursor's own where its weight is zero."""
        position = self.cursor.position
        own = int(self.mixing.counts(position)[source])
        boundary = self.orders[source].next_epoch(own)
        if len(self.sources) == 1 or boundary == own:
            return position + boundary - own
        if not proportions(self.cursor.mixture[-1][1], len(self.sources))[source]:
            return position
        return self.mixing.reach(source, boundary)


def _removed(sources: Sequence[Source], first: Ints) -> Ints:
    """Removed places of all data sets, shards counted through: int64 [n, 2]."""
    places = [
        source.removed.places + np.array([start, 0])
        for source, start in zip(sources, first[:-1], strict=True)
        if source.removed is not None
    ]
    return np.concatenate([np.zeros((0, 2), np.int64), *places])
