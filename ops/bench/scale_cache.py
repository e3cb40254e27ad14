"""The cache of one node of many, run through an order at the pace of training, with the code that places and evicts.

What is to be held comes from the fetcher's own list of shards to come, what goes from the rule of eviction, and when a
shard is needed from the foresight that the node's ranks have. Time, the network's width and the disk are modelled: so
many seconds a step, so many bytes a second, whole shards one after the other. A turn is one look for a sample's
shard: a hit if the node holds it whole, else a range over the network.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from types import SimpleNamespace
from typing import Any

import numpy as np

from ...pipeline.fetch import Fetcher
from ...pipeline.foresight import Foresight
from ...pipeline.order import Ints, Order
from ...pipeline.quality import node_lanes, working_set
from ...pipeline.stream import Stream
from ...shards.eviction import Candidate, choose_victims
from .scale_order import Cluster

FAR = 4096  # shards that the prefetcher looks ahead
LOOKED = 4  # batches of each stretch of steps that are looked at


@dataclass(frozen=True)
class Pace:
    """How fast training goes on, and what a node gets from the storage meanwhile."""

    step: float = 0.16  # seconds
    bandwidth: float = 1e9  # bytes a second and node


class Held:
    """A cache of `budget` bytes that fills itself as the prefetcher would. Counts bytes and turns."""

    def __init__(self, budget: int, upcoming: _Upcoming, shard_bytes: Ints) -> None:
        self.budget, self._upcoming, self._bytes = budget, upcoming, shard_bytes
        self.shards: dict[int, int] = {}
        self.used = self.fetched = self.evicted = self.hits = self.turns = 0
        self._credit = 0.0

    def go_on(self, credit: float) -> None:
        """Fetch so many bytes more, soonest first; what is left of them counts while a shard is on its way."""
        self._credit += credit
        for key in islice(self._upcoming._upcoming(self.budget), FAR):
            shard = int(key)
            if shard in self.shards:
                continue
            size = int(self._bytes[shard])
            if self._credit < size:
                return
            if not self._room(size, self._upcoming.needed(shard)):
                break
            self.shards[shard] = size
            self.used += size
            self.fetched += size
            self._credit -= size
        self._credit = 0.0

    def _room(self, size: int, needed: float) -> bool:
        short = self.used + size - self.budget
        if short <= 0:
            return True
        candidates = [Candidate(str(s), held, self._upcoming.needed(s)) for s, held in self.shards.items()]
        victims = choose_victims(candidates, short, needed)
        for victim in victims or ():
            self.used -= self.shards.pop(int(victim.name))
            self.evicted += victim.bytes
        return victims is not None

    def look(self, shards: Ints) -> None:
        """A batch's turns to these shards."""
        self.turns += len(shards)
        self.hits += sum(shard in self.shards for shard in shards.tolist())


class _Upcoming(Fetcher):
    """A fetcher that only says what its cache should hold."""

    def __init__(self, foresight: Foresight, shard_bytes: Ints) -> None:
        self._foresight = foresight
        self.library = SimpleNamespace(bytes=shard_bytes)  # pyright: ignore[reportAttributeAccessIssue]
        self._keys = [str(shard) for shard in range(len(shard_bytes))]

    def needed(self, shard: int) -> float:
        return self._foresight.next_use(shard)


def mine(cluster: Cluster, node: int, lanes: int) -> Ints | None:
    """The lanes that a node's caches go by, as a run's feed tells them (ops/feed.py)."""
    own = node_lanes(lanes, cluster.batch, cluster.ranks, cluster.per_node)[node]
    return own if len(own) < lanes else None


def run(
    stream: Stream,
    cluster: Cluster,
    node: int,
    shard_bytes: Ints,
    budgets: Sequence[int],
    pace: Pace,
    *,
    start: int,
    stretches: int,
    steps: int,
) -> Iterator[dict[str, Any]]:
    """A node's caches of several sizes, for `stretches` of `steps` each from position `start` on; a row a stretch.

    Rows tell hits and turns of the stretch, and bytes fetched and evicted in it, by budget.
    """
    order = stream.orders[0].latest
    foresight = Foresight(stream, len(shard_bytes), mine(cluster, node, order.lanes))
    upcoming = _Upcoming(foresight, shard_bytes)
    caches = [Held(budget, upcoming, shard_bytes) for budget in budgets]
    share = cluster.batch // cluster.nodes
    inside = np.arange(node * share, (node + 1) * share)
    picked = np.random.default_rng(0)
    for number in range(stretches):
        position = start + number * steps * cluster.batch
        foresight.go(position)
        batches = np.sort(picked.integers(0, steps, LOOKED)) * cluster.batch + position
        shard, _ = stream.locate((batches[:, None] + inside).ravel())
        for cache in caches:
            before = [cache.hits, cache.turns, cache.fetched, cache.evicted]
            cache.go_on(pace.step * pace.bandwidth * steps)
            cache.look(shard)
            after = [cache.hits, cache.turns, cache.fetched, cache.evicted]
            told = dict(zip(("hits", "turns", "fetched", "evicted"), np.subtract(after, before).tolist(), strict=True))
            yield {"position": position, "budget": cache.budget, "used": cache.used, **told}


def lined_up(counts: Ints, cluster: Cluster, lanes: int, window: int, shard_bytes: Ints, nodes: int) -> dict[str, Any]:
    """What a node needs open at most, and how often the data set is fetched in an epoch if every node caches.

    Over `nodes` of the nodes, evenly spread, for the second figure; from the windows' spans themselves.
    """
    order = Order(counts, 0, lanes, window)
    most = working_set(order, shard_bytes, batch=cluster.batch, ranks=cluster.ranks, ranks_per_node=cluster.per_node)
    shard, lane, _, _ = order.open_spans(0)
    fetched = []
    for node in np.unique(np.linspace(0, cluster.nodes - 1, nodes).astype(int)).tolist():
        own = mine(cluster, node, lanes)
        needed = shard if own is None else shard[np.isin(lane, own) | (lane < 0)]
        fetched.append(float(shard_bytes[np.unique(needed)].sum()))
        if own is None:  # then all nodes are alike
            break
    return {
        "lanes": lanes,
        "window": window,
        "lanes_of_a_node": most.lanes,
        "working_set": asdict(most),
        "epoch_bytes_of_a_node": {"mean": float(np.mean(fetched)), "most": max(fetched)},
        "times_fetched": float(np.mean(fetched)) * cluster.nodes / float(shard_bytes.sum()),
    }
