"""Ranks of a whole cluster in one process: exactly once over every position, and each check sees what it is for."""

import json
from pathlib import Path

import numpy as np
import pytest
from gristmill.ops.bench import scale, scale_cache, scale_order, scale_process, scale_ranks
from gristmill.ops.bench.scale_balance import Balance, image_sizes, over_a_stretch
from gristmill.ops.bench.scale_order import Cluster, NotOnceError
from gristmill.pipeline.loader import Loader
from gristmill.pipeline.order import Order
from gristmill.pipeline.source import Source
from gristmill.pipeline.stream import Stream

FIRST = Cluster(64, 512)
COUNTS = np.random.default_rng(1).integers(0, 2000, 1000)  # uneven, some of them empty: about 1e6 samples


def stream_of(lanes: int, counts: np.ndarray = COUNTS) -> Stream:
    return Stream([Source("small", counts, lambda n: f"{n:032x}")], 0, lanes, 4096)


@pytest.mark.parametrize("lanes", [64, 512])
def test_every_sample_of_a_million_once_whatever_the_ranks(lanes: int):
    stream = stream_of(lanes)
    order = stream.orders[0].latest
    for epoch in (0, 1):
        assert scale_order.prove(order, epoch, 5)["windows"] >= lanes
    assert scale_order.everything(stream, order, FIRST) == order.samples > 900_000
    halfway = order.samples // 2 // FIRST.batch * FIRST.batch
    for after in (Cluster(56, 448), Cluster(32, 512)):
        assert scale_order.everything(stream, order, after, halfway) == order.samples
        ranks = np.arange(after.ranks)
        end = order.samples // after.batch * after.batch
        assert scale_order.as_ranks_read(stream, after, end, 3, ranks) == 3 * after.batch


class Off(Order):
    """One position of an epoch reads what another one reads as well."""

    def locate(self, positions):
        return super().locate(np.where(np.asarray(positions) == 640, 704, positions))


def test_an_order_that_repeats_a_sample_is_seen():
    order = Off(COUNTS, 0, 64, 4096)
    with pytest.raises(NotOnceError, match="1 are read more than once and 1 never"):
        scale_order.everything(order, order, FIRST)
    with pytest.raises(NotOnceError, match="another position"):
        scale_order.batch(order, order, FIRST, 512)
    with pytest.raises(NotOnceError, match="is no permutation"):
        scale_order.prove(order, 0, 64)


@pytest.mark.parametrize(("shift", "problem"), [(1, "do not share"), (-3, "do not share")])
def test_ranks_that_overlap_are_seen(shift: int, problem: str, monkeypatch: pytest.MonkeyPatch):
    """The assignment itself changed: the sixth rank begins elsewhere."""
    plain = Loader._positions
    monkeypatch.setattr(Loader, "_positions", lambda self, position: plain(self, position) + shift * (self._rank == 5))
    stream = stream_of(64)
    order = stream.orders[0].latest
    with pytest.raises(NotOnceError, match=problem):
        scale_order.batch(stream, order, FIRST, 5120)
    with pytest.raises(NotOnceError, match="rank 5 reads something else"):
        scale_order.as_ranks_read(stream, FIRST, 5120, 2, np.arange(8))
    with pytest.raises(NotOnceError, match="more than once"):
        scale_order.everything(stream, order, FIRST)


def test_a_layout_that_leaves_gaps_is_seen(monkeypatch: pytest.MonkeyPatch):
    order = stream_of(64).orders[0].latest
    axis = order._axis(0)
    twice = axis._replace(shards=np.where(axis.shards == 3, 4, axis.shards))
    monkeypatch.setattr(order, "_axis", lambda epoch: twice)
    with pytest.raises(NotOnceError, match="laid out twice"):
        scale_order.prove(order, 0, 2)


def test_a_cluster_that_cannot_share_a_batch_is_refused():
    with pytest.raises(NotOnceError, match="do not divide"):
        Cluster(4088, 32768)


def test_balance_by_hand():
    cluster = Cluster(2, 4, per_node=1)
    balance = Balance(cluster, np.array([[1, 2, 3, 4]]))
    balance.add(np.array([0, 0, 5, 6]), np.array([0, 1, 2, 3]))
    balance.add(np.array([0, 1, 1, 1]), np.array([3, 3, 0, 0]))
    found = balance.found()
    assert found["rank_samples"] == {"least": 4, "mean": 4.0, "most": 4, "most_over_mean": 1.0}
    assert (found["rank_bytes"]["least"], found["rank_bytes"]["most"]) == (9, 11)
    assert found["node_worst_step"]["most"] == 8 / 5
    assert (found["node_shards_a_step"]["least"], found["node_shards_a_step"]["most"]) == (1, 2)
    stretch = over_a_stretch([np.array([0, 0, 5, 6]), np.array([0, 1, 1, 1])], cluster)
    assert (stretch["node_shards"]["least"], stretch["node_shards"]["most"]) == (2, 3)


def test_lanes_as_many_as_a_batch_has_samples_give_each_node_its_own_shards():
    counts, sizes = np.full(1000, 1000), np.full(1000, 10)
    few, many = (scale_cache.lined_up(counts, FIRST, lanes, 256, sizes, nodes=8) for lanes in (64, 512))
    assert few["times_fetched"] == FIRST.nodes == 8
    assert few["lanes_of_a_node"] == many["lanes_of_a_node"] == 64
    assert 1 <= many["times_fetched"] < 1.02


def test_a_nodes_cache_holds_what_its_windows_need_and_never_more_than_its_budget():
    stream, sizes = stream_of(512, np.full(1000, 1000)), np.full(1000, 10)
    need = scale_cache.lined_up(np.full(1000, 1000), FIRST, 512, 4096, sizes, nodes=1)["working_set"]["bytes"]
    pace = scale_cache.Pace(step=1.0, bandwidth=1e9)
    budgets = [need, need // 4, 9]
    rows = list(
        scale_cache.run(stream, FIRST, 2, sizes, budgets, pace, start=0, stretches=8, steps=stream.samples // 512 // 8)
    )
    shares = [
        sum(row["hits"] for row in rows if row["budget"] == budget)
        / sum(row["turns"] for row in rows if row["budget"] == budget)
        for budget in budgets
    ]
    assert shares[0] == 1.0
    assert 0.1 < shares[1] < 0.5
    assert shares[2] == 0
    assert all(row["used"] <= row["budget"] for row in rows)
    assert sum(row["fetched"] for row in rows if row["budget"] == need) <= 1.1 * need


def test_a_slow_network_leaves_the_cache_behind():
    stream, sizes = stream_of(512, np.full(1000, 1000)), np.full(1000, 10)
    slow = scale_cache.Pace(step=1.0, bandwidth=0.5)
    rows = list(scale_cache.run(stream, FIRST, 0, sizes, [10_000], slow, start=0, stretches=4, steps=100))
    assert [row["fetched"] for row in rows] == [50, 50, 50, 50]
    hits = [row["hits"] for row in rows]
    assert 0 < hits[0] < hits[-1] < rows[-1]["turns"]


def test_one_rank_plans_its_ranges_as_the_reader_would(tmp_path: Path):
    """From a whole manifest of shards behind a url, of which nothing is asked."""
    scale_ranks._make(scale_ranks.Scale(64, 600 * 50, 600), tmp_path)
    cluster = Cluster(64, 512)
    found = scale_process.measure(tmp_path, cluster, 7, 64, 64, batches=5)
    assert found["samples"] == 40
    assert found["requests"] <= 40
    sizes = image_sizes(50)
    assert sizes.min() <= found["range_bytes"]["least"] <= found["range_bytes"]["median"] <= sizes.max()
    assert found["peak_MB"] >= found["manifest_MB"] > 0


def test_members_lie_where_a_tar_has_them():
    starts, size = scale.places(np.array([1, 512, 513]))
    assert starts.tolist() == [512, 1536, 2560]
    assert size == 2560 + 1024 + 1024


def test_memory_follows_shards_and_not_samples():
    few, many = (scale.synthetic(samples, 1000) for samples in (10**6, 10**10))
    assert many["cursor_bytes"] < 250
    assert many["shards"] == few["shards"] == 1000
    assert many["added_MB"] < few["added_MB"] + 20


def test_parts_are_kept_when_another_is_made_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "found.jsonl"
    out.write_text(json.dumps({"part": "monitor", "what": "kept"}) + "\n")
    small = [
        "--ranks",
        "16",
        "--samples",
        "2e5",
        "--shards",
        "200",
        "--sampled",
        "16",
        "--only",
        "order",
        "--only",
        "elastic",
    ]
    scale.main([*small, "--out", str(out)])
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert rows[0]["what"] == "kept"
    batches = [row for row in rows if row["what"] == "batches"]
    assert [row["ranks"] for row in batches] == [16, 8, 8, 16]
    assert all(row["rank_samples"]["most_over_mean"] == 1.0 for row in batches)
    assert "ranks, batch" in capsys.readouterr().err
