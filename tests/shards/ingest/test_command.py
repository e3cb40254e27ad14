"""`gristmill ingest` as typed: help with examples, errors that say what to do, a table whose rows sum to the inputs, JSON."""

import json
import re
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner
from gristmill.ops.cli import main
from gristmill.ops.monitor.intake import IngestCollector
from gristmill.shards.ingest import IngestStats
from gristmill.shards.ingest.unit import UnitDone
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import generate_latest

from .sets import scenes


def gristmill(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, [str(one) for one in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    source = tmp_path / "in"
    scenes(source, 9)
    first = sorted(source.rglob("*.*"))[0]
    (source / "copy.jpg").write_bytes(first.read_bytes())
    for number in range(3):
        (source / f"page{number}.jpg").write_bytes(b"<html>" + bytes([number]))
    return source


def test_help_shows_examples() -> None:
    code, text, _ = gristmill("ingest", "--help")
    assert code == 0
    for example in ("gristmill ingest ~/Pictures --out shards", "--retry-failed", "--engine ray", "--append"):
        assert example in text
    assert all(len(line) <= 110 for line in text.splitlines())


def test_the_table_sums_to_the_inputs(mixed: Path, tmp_path: Path) -> None:
    code, text, _ = gristmill("ingest", mixed, "--out", tmp_path / "out", "--workers", 1, "--holdout", 0.3)
    assert code == 0
    rows = re.findall(r"^(\w+) +([\d,]+) +(\d+\.\d)% +\S", text, re.MULTILINE)
    counts = {name: int(count.replace(",", "")) for name, count, _ in rows}
    assert counts == {"kept": 9, "not_an_image": 3, "duplicate": 1, "sum": 13}
    assert "every input is in the ledger" in text
    assert "largest reasons: not_an_image" in text
    assert re.search(r"9 new images \(\d to train, \d to probe\) in 2 shards", text)
    code, text, _ = gristmill("ingest", mixed, "--out", tmp_path / "out", "--workers", 1, "--holdout", 0.3, "--append")
    assert code == 0
    assert "0 new images (0 to train) in 0 shards of 0.0 MB; 9 in all" in text


def test_json_is_the_report_and_nothing_else(mixed: Path, tmp_path: Path) -> None:
    code, text, _ = gristmill("ingest", mixed, "--out", tmp_path / "out", "--workers", 1, "--json")
    assert code == 0
    report = json.loads(text)
    assert sum(report["outcomes"].values()) == report["inputs"] == 13
    assert (report["kind"], report["train"], report["probe"], report["samples"], report["shards"]) == (
        "new",
        9,
        0,
        9,
        1,
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{in}"], ["--out"]),
        (["--out", "{out}"], ["name at least one source"]),
        (["{in}", "--out", "{out}", "--shard-bytes", "12x"], ["'12x' is no size", "256MiB"]),
        (["{in}", "--out", "{out}", "--shard-bytes", "9G"], ["shard_bytes", "3000000000"]),
        (["{in}", "--out", "{out}", "--filter", "nonsense"], ["nonsense", "module:function"]),
        (
            ["{in}", "--out", "{out}", "--filter", "no.such:thing"],
            ["no.such:thing cannot be loaded", "importable from"],
        ),
        (["{in}", "--out", "{out}", "--near", "40"], ["--near", "0 to 31 bits"]),
        (["{in}", "--out", "{out}", "--engine", "spark"], ["'spark'", "local", "ray"]),
        (["{in}", "--out", "{out}", "--holdout", "0.99"], ["--holdout"]),
        (["{in}", "--out", "{out}", "--min-sides", "3"], ["--min-sides", "--min-side"]),
        (["{in}/none", "--out", "{out}"], ["none"]),
        (["ftp://a.example/b", "--out", "{out}"], ["ftp"]),
        (["{in}", "--out", "s3://bucket/x"], ["--work"]),
        (["{in}", "--out", "{out}", "--append", "--retry-failed"], ["--append", "--retry-failed"]),
        (["--out", "{out}", "--retry-failed"], ["holds no data set"]),
        (["{in}", "--out", "{out}", "--dedup-against", "{in}/none"], ["none"]),
    ],
)
def test_errors_say_what_to_do(tmp_path: Path, arguments: list[str], words: list[str]) -> None:
    scenes(tmp_path / "in", 2)
    given = [one.format(**{"in": tmp_path / "in", "out": tmp_path / "out"}) for one in arguments]
    code, out, err = gristmill("ingest", *given, "--workers", 1)
    assert code == 2
    assert out == ""
    for word in words:
        assert word in " ".join(err.split()), err
    assert "Traceback" not in err
    assert not (tmp_path / "out" / "train").exists()


@pytest.mark.program("promtool")
def test_promtool_finds_nothing_wrong_with_the_metrics(tmp_path: Path) -> None:
    stats, registry = IngestStats(inputs=10), CollectorRegistry()
    registry.register(IngestCollector(lambda: stats))
    fetched = {"retries": {"timed_out": 3}, "hosts": [["a.example", 4, 0]]}
    stats.take(UnitDone(0, 4, {"kept": 4}, received=1000, stored=900, fetched=fetched))
    stats.outcomes.update({"kept": 3, "duplicate": 1})
    page = generate_latest(registry)
    assert b'gristmill_ingest_items_total{outcome="kept"} 3.0' in page
    assert b'gristmill_ingest_retries_total{reason="timed_out"} 3.0' in page
    check = subprocess.run(["promtool", "check", "metrics"], input=page, capture_output=True, check=False)
    assert (check.returncode, check.stdout, check.stderr) == (0, b"", b"")
