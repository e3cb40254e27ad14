"""The benchmark compares like with like: all three find the same members and samples in every layout."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from gristmill.ops.bench import index as bench


@pytest.mark.parametrize("layout", bench.LAYOUTS)
def test_all_three_do_the_same_job(tmp_path: Path, layout: str) -> None:
    members = bench.make_shard(tmp_path / "shard.tar", layout, 30)
    assert bench._ours(tmp_path / "shard.tar") == bench._listing(tmp_path / "shard.tar") == members
    assert bench._grouping(tmp_path / "shard.tar") == 30


def test_the_figures_as_json() -> None:
    answer = CliRunner().invoke(bench.main, ["--samples", "20", "--rounds", "1", "--json"], catch_exceptions=False)
    timings = json.loads(answer.output)
    assert [timing["layout"] for timing in timings] == list(bench.LAYOUTS)
    for timing in timings:
        assert timing["ratio"] == timing["grouping_cpu"] / timing["ours_cpu"]
