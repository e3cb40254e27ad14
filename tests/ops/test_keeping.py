"""`remove`, `stats` and `verify` as people call them: one data set on its way through all three."""

import hashlib
import json
import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from gristmill.ops.cli import main
from gristmill.ops.specimens import collect
from gristmill.ops.stats import spread_over
from gristmill.shards.collection import open_collection
from gristmill.shards.ingest.config import IngestConfig
from gristmill.shards.ingest.run import ingest
from gristmill.shards.manifest import Manifest
from gristmill.shards.tombstones import Tombstones
from PIL import Image

from ..pipeline.textures import jpegs


def gristmill(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gristmill.ops.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def run(*arguments: object) -> tuple[int, str]:
    answer = CliRunner().invoke(main, list(map(str, arguments)))
    assert answer.exception is None or isinstance(answer.exception, SystemExit), answer.exception
    return answer.exit_code, answer.output


def test_from_an_ingest_to_a_repair(tmp_path: Path) -> None:
    """The commands as processes, on photographs."""
    (tmp_path / "in" / "<b>").mkdir(parents=True)
    for number, data in enumerate(jpegs()):
        (tmp_path / "in" / f"{number}.jpg").write_bytes(data)
        (tmp_path / "in" / "<b>" / f"{number}.png").write_bytes(b"none")
        Image.fromarray(np.full((40, 60 + number, 3), 40 * number, np.uint8)).save(
            tmp_path / "in" / "<b>" / f"{number}.png"
        )
    out, photo = tmp_path / "out", jpegs()[0]
    ingest([str(tmp_path / "in")], out, IngestConfig(shard_samples=3))

    answer = gristmill("stats", out, "--sheet", tmp_path / "look.html", "--json")
    assert answer.returncode == 0, answer.stderr
    about = json.loads(answer.stdout)
    assert about["samples"] == 2 * len(jpegs()) == about["ledger"]["inputs"] == about["sheet"]["images"]
    assert about["ledger"]["sums"] is True
    places = {str(tmp_path / "in" / "<b>"), str(tmp_path / "in")}
    assert {one["source"] for one in about["ledger"]["sources"]} == places
    page = (tmp_path / "look.html").read_text()
    HTMLParser().feed(page)
    assert page.count("<img ") == about["samples"]
    assert "<b>" not in page
    assert "&lt;b&gt;" in page
    assert "<script" not in page

    digest = hashlib.sha256(photo).hexdigest()
    answer = gristmill(
        "remove", out, "--hash", digest, "--url", tmp_path / "in" / "1.jpg", "--reason", "ticket 1", "--rewrite"
    )
    assert answer.returncode == 0, answer.stderr
    assert "2 samples erased" in answer.stdout
    assert "another one now" in answer.stdout
    piece = photo[len(photo) // 2 :][:64]
    assert not [path for path in out.rglob("*") if path.is_file() and piece in path.read_bytes()]
    code, text = run("verify", out, "--deep", "--json")
    assert (code, json.loads(text)["findings"]) == (0, [])

    manifest = Manifest.open(out / "train")
    os.truncate(manifest.path(0), manifest.shard_bytes[0] // 2)
    answer = gristmill("verify", out / "train", "--repair", tmp_path / "new")
    assert answer.returncode == 1
    assert "samples saved" in answer.stdout
    assert run("verify", tmp_path / "new", "--deep")[0] == 0


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`train` and `probe` of twenty small pictures."""
    root = tmp_path_factory.mktemp("keeping")
    (root / "in").mkdir()
    rng = np.random.default_rng(1)
    for number in range(20):
        Image.fromarray(rng.integers(0, 255, (20 + number, 30, 3)).astype(np.uint8)).save(root / "in" / f"{number}.png")
    ingest([str(root / "in")], root / "out", IngestConfig(shard_samples=4, holdout=0.3))
    return root / "out"


def test_one_command_reaches_both_halves(data: Path) -> None:
    code, text = run("verify", data, "--json", "--workers", 2)
    assert (code, json.loads(text)["samples"]) == (0, 20)
    code, text = run("stats", data)
    assert code == 0
    assert "20 images in" in text
    assert "every input has its row" in text
    assert set(json.loads(run("stats", data, "--json")[1])["data"]) == {"train", "probe"}
    assert list(json.loads(run("stats", data / "probe", "--json")[1])["data"]) == ["probe"]
    whole = (data / "probe" / "000000.tar").read_bytes()
    os.truncate(data / "probe" / "000000.tar", 700)
    try:
        code, text = run("verify", data)
        assert code == 1
        assert "\nprobe/000000.tar  -  700 bytes long" in text
        assert "--repair OUT" in text
    finally:
        (data / "probe" / "000000.tar").write_bytes(whole)


def test_help_has_examples_and_mistakes_are_said(data: Path, tmp_path: Path) -> None:
    for command in ("remove", "stats", "verify"):
        code, text = run(command, "--help")
        assert code == 0
        assert "Examples:" in text
        assert "--json" in text
    assert run("remove", data, "--reason", "x")[0] == 2
    for arguments, said in (
        (["remove", data, "--hash", "12", "--reason", "x"], "is no hash"),
        (["remove", data, "--url", "https://nowhere.example", "--reason", "x"], "came from https://nowhere"),
        (["stats", data, "--sheet", tmp_path / "x.gif"], r".html or .png"),
        (["stats", data, "--sheet", tmp_path / "none" / "x.png"], "there is no folder"),
        (["verify", tmp_path], "is no data set"),
        (["verify", data / "train", "--repair", data / "train" / "in"], "lies in it"),
    ):
        code, text = run(*arguments)
        assert code == 2, text
        assert said in text
        assert not (tmp_path / "x.gif").exists()


def test_the_sheet_is_the_same_every_time_and_shows_nothing_removed(data: Path, tmp_path: Path) -> None:
    found = open_collection(data / "train")
    first = collect(found, 6)
    assert [one.key for one in first] == [one.key for one in collect(found, 6)]
    manifest = Manifest.open(data / "train")
    Tombstones.of(manifest).remove(manifest, [first[2].key], "asked")
    after = [one.key for one in collect(found, 6)]
    assert first[2].key not in after
    assert after[:2] + after[3:] == [one.key for one in first if one is not first[2]]
    run("stats", data / "train", "--sheet", tmp_path / "a.png", "--images", 6)
    run("stats", data / "train", "--sheet", tmp_path / "b.png", "--images", 6)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size[0] > 1000
        assert len(picture.convert("RGB").getcolors(1 << 24) or ()) > 1000


def test_samples_at_equal_distances() -> None:
    counts = np.array([3, 1, 5, 1])
    assert spread_over(counts, 10) == [(0, 0), (0, 1), (0, 2), (1, 0), (2, 0), (2, 1), (2, 2), (2, 3), (2, 4), (3, 0)]
    assert spread_over(counts, 2) == [(0, 2), (2, 3)]
    assert spread_over(counts, 99) == spread_over(counts, 10)
    assert len(spread_over(np.array([10**9]), 60)) == 60
