"""How well an order shuffles, and what that costs: the shards that a node must hold at once.

Shuffling is measured on the ids alone, side by side with a full permutation (the ideal) and with webdataset's own
shuffle buffer behind shuffled shards (the usual thing). A buffer of 1,000 mixes one shard with itself and its
neighbour: a batch then shows a shard or two, and what lay together stays together. The working set is exact: from the
windows that are open in the lanes of a node, at every moment at which one opens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from math import gcd

import numpy as np
from numpy.typing import ArrayLike

from ..shards.errors import GristmillError
from .order import Ints, Order, permute

BUFFERS = (1000, 10000)  # of webdataset's shuffle: its default, and what recipes for large data take
FULL = 1 << 22  # samples up to which one permutation of all of them is suggested: 64 windows of 65,536
_LANES, _WINDOW, _LEAST_WINDOW = 64, 65536, 1024
_BINS = 256
_PAIRS = 20_000


class WorkingSetError(GristmillError):
    """An order that keeps more shards open than the cache may hold."""


@dataclass(frozen=True)
class Quality:
    """Shuffle quality of `samples` successive positions from an epoch's start, in batches of `batch`."""

    name: str
    samples: int
    batch: int
    shards: float  # distinct shards in a batch, mean
    shard_entropy: float  # of the shards of a batch, bits, mean
    displacement: float  # mean distance from the sample's place on disk, against a full permutation's: 1
    spread: float  # mean distance in the stream of two that are neighbours on disk, likewise
    lag_entropy: float  # of the distance on disk from one sample to the next, in 256 equal classes, bits


@dataclass(frozen=True)
class WorkingSet:
    """What must be at hand at once on one node, at the worst moment of an epoch."""

    shards: int
    bytes: int
    lanes: int  # that the node reads

    def __add__(self, other: WorkingSet) -> WorkingSet:
        """Of two data sets that are read together."""
        return WorkingSet(self.shards + other.shards, self.bytes + other.bytes, self.lanes + other.lanes)


def compare(order: Order, *, batch: int, limit: int = 200_000) -> list[Quality]:
    """The order beside a full permutation, webdataset's buffers, and no shuffling, over at most `limit` positions.

    Seconds for 200,000 positions, most of them webdataset's; memory is a few hundred bytes a position.
    """
    counts, n = order.counts, min(order.samples, limit)
    base = np.cumsum(counts) - counts

    def places(of: Order) -> Ints:
        shard, row = of.locate(np.arange(n))
        return base[shard] + row

    full = Order(counts, order.seed, lanes=1, window=order.samples)
    rows = [
        _measure("this order", places(order), counts, batch, _spread(order)),
        _measure("full permutation", places(full), counts, batch, _spread(full)),
    ]
    for size in BUFFERS:
        ids = np.fromiter(islice(_buffered(counts, size, order.seed), n), np.int64, n)
        rows.append(_measure(f"webdataset buffer {size}", ids, counts, batch))
    rows.append(_measure("as on disk", np.arange(n), counts, batch))
    return rows


def _buffered(counts: Ints, size: int, seed: int) -> Iterator[int]:
    """Places on disk in the order in which webdataset gives them: shards shuffled fully, samples through its buffer."""
    from webdataset.filters import shuffle  # only here: an import of its own length

    number = len(counts)
    keys = np.broadcast_to(np.array([seed, number], np.uint64), (number, 2))
    shards = permute(np.arange(number), np.full(number, number), keys, (number - 1).bit_length())
    base = np.cumsum(counts) - counts
    ids = (i for s in shards.tolist() for i in range(int(base[s]), int(base[s] + counts[s])))
    yield from shuffle(size, initial=size, seed=seed)(ids)


def _measure(name: str, places: Ints, counts: Ints, batch: int, spread: float | None = None) -> Quality:
    """Quality of the samples that lie at `places` int64 [n] on disk, read in this order from position 0."""
    n, total = len(places), int(counts.sum())
    shards = np.searchsorted(np.cumsum(counts), places, side="right")
    distinct, entropy = [], []
    for start in range(0, max(n - batch + 1, 1), batch):
        _, times = np.unique(shards[start : start + batch], return_counts=True)
        distinct.append(len(times))
        entropy.append(_entropy(times))
    x = np.arange(n) / total
    ideal = total * float(np.mean((x**2 + (1 - x) ** 2) / 2))  # the mean distance of x from a uniform place
    lags, _ = np.histogram(np.diff(places), bins=_BINS, range=(-total, total))
    return Quality(
        name,
        samples=n,
        batch=batch,
        shards=float(np.mean(distinct)),
        shard_entropy=float(np.mean(entropy)),
        displacement=float(np.abs(places - np.arange(n)).mean()) / ideal,
        spread=_neighbours(places, total) if spread is None else spread,
        lag_entropy=_entropy(lags),
    )


def _entropy(times: ArrayLike) -> float:
    """Entropy in bits of a distribution given by counts."""
    times = np.asarray(times, np.float64)
    p = times[times > 0] / max(times.sum(), 1)
    return float(-(p * np.log2(p)).sum()) + 0.0


def _neighbours(places: Ints, total: int) -> float:
    """Mean distance in the stream of samples that are neighbours on disk, where both were seen; 1 is a third of all."""
    by_place = np.argsort(places, kind="stable")
    beside = np.diff(places[by_place]) == 1
    return float(np.abs(np.diff(by_place))[beside].mean() * 3 / (total + 1)) if beside.any() else 0.0


def _spread(order: Order) -> float:
    """The same of evenly spread pairs of neighbours in one shard, wherever they are read."""
    ends = np.cumsum(order.counts)
    place = np.unique(np.linspace(0, order.samples - 1, _PAIRS).astype(np.int64))
    shard = np.searchsorted(ends, place, side="right")
    row = place - (ends - order.counts)[shard]
    pairs = row + 1 < order.counts[shard]
    if not pairs.any():
        return 1.0
    shard, row = shard[pairs], row[pairs]
    return float(np.abs(order.find(shard, row + 1, 0) - order.find(shard, row, 0)).mean() * 3 / (order.samples + 1))


def working_set(
    order: Order,
    shard_bytes: ArrayLike,
    *,
    batch: int | None = None,
    ranks: int = 1,
    ranks_per_node: int | None = None,
    epoch: int = 0,
) -> WorkingSet:
    """The most that any node holds open at once in an epoch; shard_bytes int64 [S].

    A node reads `ranks_per_node` slices of every batch of `batch` positions; where lanes and slices line up it needs
    some of the lanes only. Without `batch` (a mixture, whose data sets' own positions do not line up) it needs all.
    """
    sizes = np.asarray(shard_bytes, np.int64)
    worst = WorkingSet(0, 0, 0)
    _, _, shards = order.open_windows(epoch, np.zeros(1, np.int64), most=1)  # the same whatever the lanes
    full = order.counts[shards] > 0
    number = np.concatenate([[0], np.cumsum(full)])
    length = np.concatenate([[0], np.cumsum(np.where(full, sizes[shards], 0))])
    nodes = node_lanes(order.lanes, batch, ranks, ranks_per_node or ranks)
    for lanes in {lanes.tobytes(): lanes for lanes in nodes}.values():  # nodes with the same ones once
        lanes = lanes[lanes < order.samples]
        if not len(lanes):
            continue
        first, last, _ = order.open_windows(epoch, lanes)
        # Lanes ascend along the axis: only what lies behind the lanes before it is new.
        seen = np.maximum.accumulate(last, axis=1)
        begin = first.copy()
        begin[:, 1:] = np.maximum(first[:, 1:], seen[:, :-1] + 1)
        begin = np.minimum(begin, last + 1)
        held = (number[last + 1] - number[begin]).sum(axis=1)
        weight = (length[last + 1] - length[begin]).sum(axis=1)
        worst = WorkingSet(
            max(worst.shards, int(held.max())), max(worst.bytes, int(weight.max())), max(worst.lanes, len(lanes))
        )
    return worst


def node_lanes(lanes: int, batch: int | None, ranks: int, ranks_per_node: int) -> list[Ints]:
    """The lanes that each node reads, ascending: a slice of every batch; without `batch`, or in doubt, all of them."""
    nodes = range(-(-ranks // ranks_per_node))
    step, share = (1, 1) if batch is None else (gcd(batch, lanes), batch // ranks * ranks_per_node)
    if share >= step:
        return [np.arange(lanes)] * len(nodes)
    inside, turns = np.arange(share), np.arange(0, lanes, step)[:, None]
    return [np.unique((turns + node * share + inside) % lanes) for node in nodes]


def check_working_set(
    order: Order,
    shard_bytes: ArrayLike,
    budget: int,
    *,
    batch: int | None = None,
    ranks: int = 1,
    ranks_per_node: int | None = None,
) -> WorkingSet:
    """The working set, if the cache's `budget` in bytes holds it; else WorkingSetError with what would help.

    A cache below it would fetch the same shards again and again within an epoch.
    """
    need = working_set(order, shard_bytes, batch=batch, ranks=ranks, ranks_per_node=ranks_per_node)
    if need.bytes <= budget:
        return need
    lanes, window = suggest(
        order.counts, shard_bytes=shard_bytes, budget=budget, lanes=order.lanes, window=order.window
    )
    smaller = Order(order.counts, order.seed, lanes, window)
    then = working_set(smaller, shard_bytes, batch=batch, ranks=ranks, ranks_per_node=ranks_per_node)
    fits = f"set stream.lanes={lanes} stream.window={window} ({size(then.bytes)}), or " if then.bytes <= budget else ""
    raise WorkingSetError(
        f"the order keeps {need.shards} shards open at once on a node ({size(need.bytes)}: {need.lanes} lanes with windows "
        f"of {order.window} samples), but the cache may hold {size(budget)}: {fits}give the cache {size(need.bytes)}"
    )


def check_together(
    orders: Sequence[Order],
    shard_bytes: Sequence[ArrayLike],
    budget: int,
    *,
    batch: int,
    ranks: int = 1,
    ranks_per_node: int | None = None,
) -> WorkingSet:
    """`check_working_set` of one data set, or of those of a mixture together; each with the sizes of its shards."""
    if len(orders) == 1:
        how = {"batch": batch, "ranks": ranks, "ranks_per_node": ranks_per_node}
        return check_working_set(orders[0], shard_bytes[0], budget, **how)
    need = WorkingSet(0, 0, 0)
    for order, sizes in zip(orders, shard_bytes, strict=True):
        need += working_set(order, sizes)
    if need.bytes > budget:
        raise WorkingSetError(
            f"the data sets together keep {need.shards} shards open at once on a node ({size(need.bytes)}), but the cache "
            f"may hold {size(budget)}: lower stream.window or stream.lanes, or give the cache as much"
        )
    return need


def suggest(
    counts: ArrayLike,
    *,
    shard_bytes: ArrayLike | None = None,
    budget: int | None = None,
    lanes: int = 0,
    window: int = 0,
) -> tuple[int, int]:
    """(lanes, window) for shards of `counts` samples. The rule, in this order:

    Up to 4,194,304 samples one lane and one window over all of them, which is a full permutation. Above, 64 lanes with
    windows of 65,536, which keeps as many samples open. With a cache of `budget` bytes the windows are halved until
    all that is open fits, but not below 1,024, then the lanes; one lane of 1,024 is the least that is suggested.
    Given `lanes` and `window` it starts from these. Both are part of a run's identity: decide before it begins.
    """
    counts = np.asarray(counts, np.int64)
    samples = int(counts.sum())
    given = lanes > 0 and window > 0
    if not given and samples <= FULL:
        lanes, window = 1, max(_LEAST_WINDOW, 1 << (samples - 1).bit_length())
    elif not given:
        lanes, window = _LANES, _WINDOW
    if budget is None or shard_bytes is None:
        return lanes, window

    def fits() -> bool:
        return working_set(Order(counts, 0, lanes, window), shard_bytes).bytes <= budget

    if fits():
        return lanes, window
    if not given:
        lanes, window = min(_LANES, max(1, samples // _LEAST_WINDOW)), _WINDOW
    while window > _LEAST_WINDOW and not fits():
        window = max(_LEAST_WINDOW, window // 2)
    while lanes > 1 and not fits():
        lanes //= 2
    return lanes, window


def size(number: int) -> str:
    """Bytes for people, in binary units."""
    value, unit = float(number), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
