"""`gristmill order`: it shows the stream that is trained on, proves by counting, and refuses what does not add up."""

import json
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from gristmill.ops import look
from gristmill.ops.look import show_order
from gristmill.pipeline.growth import Grown
from gristmill.pipeline.order import Order
from gristmill.shards.manifest import Manifest
from gristmill.shards.tombstones import Tombstones

from ..pipeline.rows import write_rows

PLAIN = {"step": 0, "batch": 12, "ranks": 3, "seed": 5, "lanes": 4, "window": 16, "prove": False}


def show(folders: Any, **options: Any) -> int:
    return show_order(folders, **PLAIN | options)


@pytest.fixture
def data(tmp_path: Path) -> Manifest:
    return write_rows(tmp_path / "a", [30, 1, 45, 8])


@pytest.fixture
def answer(capsys):
    """What the command prints as JSON, and its exit code."""

    def run(folders, **options):
        code = show(folders, **options, as_json=True)
        return json.loads(capsys.readouterr().out), code

    return run


def test_a_step_by_rank(data, answer, capsys):
    got, code = answer(data.root, step=9)
    assert code == 0
    shard, row = Order(data.counts, 5, 4, 16).locate(np.arange(108, 120))
    images = got["images"]
    assert [image["position"] for image in images] == list(range(108, 120))
    assert [image["rank"] for image in images] == [0] * 4 + [1] * 4 + [2] * 4
    assert [image["key"] for image in images] == [data.rows(s).keys[r] for s, r in zip(shard, row, strict=True)]
    assert got["epochs"] == [1]
    assert show(data.root, **{"step": 9}) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 14
    assert "84 images in 4 shards" in lines[0]
    assert lines[2].split() == ["108", "rank", "0", images[0]["shard"], images[0]["key"]]


def test_a_filter_a_mixture_and_removed_samples_show(data, tmp_path, answer, capsys):
    other = write_rows(tmp_path / "b", [40, 2])
    Tombstones.of(data).remove(data, ["a-00003", "a-02005"], "asked")
    got, _ = answer([data.root, other.root], where="width > 3", weights=[3, 1], batch=768)
    wide = [sum(int((part.rows(s).width > 3).sum()) for s in range(len(part.urls))) for part in (data, other)]
    assert [entry["selected"] for entry in got["sources"]] == wide
    assert got["sources"][0]["removed"] == 2
    images = got["images"]
    assert sum(image["source"] == str(other.root) for image in images) == 192
    removed = {image["key"] for image in images if image["removed"]}
    assert removed == {"a-00003", "a-02005"}
    for image in images:
        assert int(image["key"][2:]) % 7 + 1 > 3
    show([data.root, other.root], **{"where": "width > 3", "weights": [3, 1], "batch": 768})
    text = capsys.readouterr().out
    assert f"{wide[0]} selected; 2 removed, their slots filled by others; weight 3" in text
    assert text.count("(removed: a substitute takes its slot)") == sum(image["removed"] for image in images)


def test_the_proof_holds(data, tmp_path, answer, capsys):
    got, code = answer(data.root, prove=True)
    assert code == 0
    assert got["proof"][0] | {"name": ""} == {
        "name": "",
        "positions": 84,
        "once": 84,
        "never": 0,
        "more": 0,
        "filtered": 0,
        "filtered_but_seen": 0,
        "out_of_turn": 0,
    }
    other = write_rows(tmp_path / "b", [400, 20])
    got, code = answer([data.root, other.root], where="height != 2", weights=[0.25, 0.75], prove=True)
    assert code == 0
    for entry in got["proof"]:
        assert entry["once"] == entry["positions"] > 0
        assert entry["filtered"] > 0
    assert got["proof"][0]["share"] == pytest.approx(0.25, abs=0.03)  # of a stretch that ends inside a block
    show(data.root, **{"where": "height != 2", "prove": True})
    assert "filtered out, 0 of them seen" in capsys.readouterr().out


@pytest.mark.parametrize("fault", ["repeat", "skip", "filtered", "turn"])
def test_the_proof_fails_on_a_faulty_order(data, tmp_path, answer, monkeypatch, fault):
    """It counts for itself: an order that is made to err is found out."""
    right = Grown.locate

    def wrong(self, positions):
        shard, row = right(self, positions)
        first = np.asarray(positions) == 0
        if fault in ("repeat", "skip"):
            again = right(self, np.zeros(1, np.int64) + 1)
            shard[first], row[first] = again[0][0], again[1][0]
        return shard, row

    monkeypatch.setattr(Grown, "locate", wrong)
    if fault == "filtered":
        monkeypatch.setattr(look.Source, "rows", lambda self, shard, rank: rank)
    folders = [data.root]
    if fault == "turn":
        folders.append(write_rows(tmp_path / "b", [50]).root)
        at = look.Stream.__init__

        def twisted(self, *args, **kwargs):
            at(self, *args, **kwargs)
            straight = self.mixing.at
            self.mixing.at = lambda positions: tuple(part[::-1] for part in straight(positions))

        monkeypatch.setattr(look.Stream, "__init__", twisted)
    got, code = answer(folders, prove=True, where="width > 3" if fault == "filtered" else "")
    assert code == 1
    proof = got["proof"][0]
    counted = {"repeat": "more", "skip": "never", "filtered": "filtered_but_seen", "turn": "out_of_turn"}
    assert proof[counted[fault]] > 0


def test_the_quality_and_the_working_set(data, answer, capsys):
    got, code = answer(data.root, quality=True, cache=10**9, ranks_per_node=1, window=99)
    assert code == 0
    entry = got["quality"][0]
    assert [row["name"] for row in entry["measures"]][:2] == ["this order", "full permutation"]
    assert entry["working_set"] == {"shards": 4, "bytes": int(data.shard_bytes.sum()), "lanes": 4}
    assert entry["suggested"] == {"lanes": 1, "window": 1024}
    code = show(data.root, **{"quality": True, "cache": 1000, "window": 99})
    text = capsys.readouterr().out
    assert code == 1
    assert "refused: the order keeps 4 shards open at once" in text
    assert "webdataset buffer 1000" in text
    assert "suggested for this data set" in text


def test_a_mixture_shares_the_cache(data, tmp_path, answer):
    other = write_rows(tmp_path / "b", [40, 2])
    both = int(data.shard_bytes.sum() + other.shard_bytes.sum())
    assert answer([data.root, other.root], quality=True, cache=both, window=99)[1] == 0
    got, code = answer([data.root, other.root], quality=True, cache=both - 1, window=99)
    assert code == 1
    assert "together keep 6 shards" in got["quality"][0]["refused"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 10}, "cannot be shared equally"),
        ({"weights": [1.0, 2.0]}, "one --weight for each"),
        ({"ranks_per_node": 2}, "no multiple"),
    ],
)
def test_what_does_not_add_up_is_refused(data, options, message):
    with pytest.raises(click.UsageError, match=message):
        show(data.root, **options)
