"""Which cached shards to give up for a new one: those that are needed last (Belady, IBM Systems Journal 5(2), 1966).

The order of the stream is known far ahead, so this is no guess as LRU is: for shards of one size it fetches the least
that any policy can. For shards of several sizes the best choice is intractable; then the ones needed last go first, and
what turns out to be spared because a bigger one went is kept.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Candidate:
    """Something that may be given up. `next_use` is in whatever unit the caller counts; infinity for never."""

    name: str
    bytes: int
    next_use: float


def choose_victims(candidates: Iterable[Candidate], needed: int, before: float) -> list[Candidate] | None:
    """The candidates to give up so that at least `needed` bytes become free; None if there is no such choice.

    Only what is used later than `before`, the next use of the newcomer, may go: otherwise fetching it would cost more
    than it spares.
    """
    if needed <= 0:
        return []
    chosen: list[Candidate] = []
    free = 0
    for candidate in sorted(candidates, key=lambda one: (-one.next_use, one.name)):
        if free >= needed or candidate.next_use <= before:
            break
        chosen.append(candidate)
        free += candidate.bytes
    if free < needed:
        return None
    for candidate in reversed(chosen[:-1]):  # the last one was necessary; of the others, spare what is used soonest
        if free - candidate.bytes >= needed:
            chosen.remove(candidate)
            free -= candidate.bytes
    return chosen
