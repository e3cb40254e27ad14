"""The page and picture of a simulated cluster say what its rows say; target files and pages are as a run has them."""

import json
from pathlib import Path

import pytest
from gristmill.ops.bench import scale_monitor, scale_plot, scale_ranks, scale_table
from gristmill.ops.bench.scale_order import Cluster
from gristmill.ops.monitor.node import merged

DOCS = Path(__file__).parents[2] / "docs"


def rows() -> list[scale_table.Row]:
    return [json.loads(line) for line in (DOCS / "scale.jsonl").read_text().splitlines()]


def test_the_tables_of_the_page_are_those_of_its_rows(tmp_path: Path):
    page = tmp_path / "scale.md"
    page.write_text((DOCS / "scale.md").read_text())
    scale_table.fill(rows(), page)
    assert page.read_text() == (DOCS / "scale.md").read_text()
    page.write_text("nothing\n")
    with pytest.raises(scale_table.PageError, match="lacks"):
        scale_table.fill(rows(), page)


def test_what_was_simulated_is_what_the_page_promises():
    found = rows()
    batches = [row for row in found if row["what"] == "batches"]
    assert max(row["batches"] for row in batches) > 2000
    assert {row["ranks"] for row in batches} == {4096, 4088, 2048}
    assert all(row["rank_samples"]["least"] == row["rank_samples"]["most"] for row in batches)
    synthetic = {(row["samples"], row["shards"]): row["added_MB"] for row in found if row["what"] == "synthetic"}
    assert synthetic[10**10, 100_000] < synthetic[10**8, 100_000] + 5


def test_the_picture_is_drawn_of_what_is_there(tmp_path: Path):
    scale_plot.draw(rows(), tmp_path / "all.png")
    scale_plot.draw([row for row in rows() if row["part"] == "order"], tmp_path / "order.png")
    assert (tmp_path / "all.png").stat().st_size > (tmp_path / "order.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("mistake", "said"),
    [
        (["--samples=0"], "--samples 0 in 0 shards"),
        (["--ranks=100"], "--ranks 100: name a multiple of 8"),
        (["--ranks=8"], "--ranks 8: "),
        (["--ranks=16", "--samples=1e6", "--shards=2e6"], "--samples 1e+06 in 2000000 shards"),
        (["--ranks=4096", "--samples=1e6"], "the 1048576 of 32 batches of 4096 ranks"),
    ],
)
def test_sizes_that_make_no_sense_are_refused(mistake: list[str], said: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended:
        scale_ranks.main(mistake)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err.partition("error: ")[2]


def test_each_rank_has_a_target_of_its_own_and_a_node_one_page(tmp_path: Path):
    cluster = Cluster(32, 32)
    scale_monitor.write_targets(tmp_path / "targets", tmp_path / "run", cluster, 9464)
    found = [json.loads(path.read_text())[0] for path in sorted((tmp_path / "targets").iterdir())]
    assert len({one["targets"][0] for one in found}) == 32
    assert [one["labels"]["rank"] for one in found] == [str(rank) for rank in range(32)]
    assert sum(one["labels"]["__local_rank__"] == "0" for one in found) == cluster.nodes == 4
    page = scale_monitor.full_page()
    assert 300 < scale_monitor.series(page) <= 400
    node = merged(dict.fromkeys(range(8), page), 8)
    assert scale_monitor.series(node) == 8 * scale_monitor.series(page) + 9
