"""The experiment in small: what is asked is what is meant, pieces resume, ranks and tables add up. Whether arms learn is the benchmark's."""

from __future__ import annotations

import gzip
import itertools
import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from gristmill.ops.bench import learning_sets
from gristmill.ops.bench.endings import TINY
from gristmill.ops.bench.granularities import pixel_eyes
from gristmill.ops.bench.learning import ARMS, LearningError, read_results, run_pieces, settings
from gristmill.ops.bench.learning_exam import GRANULARITIES, PictureExam, cut, ranks, spread
from gristmill.ops.bench.learning_sets import CLASSES, LearningSetError, make_set
from gristmill.ops.bench.learning_table import summary, tables
from gristmill.ops.evaluate.online import Probing
from gristmill.ops.recipe import load_recipe
from gristmill.shards.manifest import Manifest
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ..command import in_forks
from ..workers import Workers


def test_crops_know_where_they_lie():
    """Pixels that say their own place: what a crop shows at a patch's centre is where `points` says it is."""
    side = 64
    grid = (torch.arange(side) + 0.5) / side
    y, x = torch.meshgrid(grid, grid, indexing="ij")
    images = torch.stack([x, y, x + y]).expand(20, 3, side, side)
    crops = cut(images, 32, np.random.Generator(np.random.Philox(key=1)))
    seen = torch.nn.functional.avg_pool2d(crops.pixels, 8)[:, :2].flatten(2).mT  # of 4 x 4 patches
    assert (seen - crops.points(4)).abs().max() < 0.02
    assert crops.flips.any()
    assert not crops.flips.all()
    assert torch.equal(crops.cells(crops.points(4), 4), torch.arange(16).expand(20, 16))
    other = cut(images, 32, np.random.Generator(np.random.Philox(key=2)))
    cells = other.cells(crops.points(4), 4)
    inside = cells >= 0
    there = other.points(4).gather(1, cells.clamp(min=0)[:, :, None].expand(-1, -1, 2))
    reach = other.boxes[:, None, 2:] / 8
    assert ((there - crops.points(4)).abs() <= reach + 1e-5).all(2)[inside].all()
    assert 0.2 < float(inside.double().mean()) < 0.95


@given(st.dictionaries(st.sampled_from("abcdef"), st.lists(st.integers(0, 3), min_size=4, max_size=4), min_size=2))
def test_ranks_are_those_of_sorting(table):
    scores = {arm: dict(zip(map(str, GRANULARITIES), map(float, row), strict=True)) for arm, row in table.items()}
    found = ranks(scores)
    for probe, arm in itertools.product(GRANULARITIES, scores):
        values = sorted((row[probe] for row in scores.values()), reverse=True)
        places = [i + 1 for i, value in enumerate(values) if value == scores[arm][probe]]
        found[arm] -= sum(places) / len(places) / len(GRANULARITIES)
    assert all(abs(rest) < 1e-9 for rest in found.values())


def test_a_table_ranks_within_seeds_and_names_what_is_missing():
    def piece(seed: int, arm: str, value: float) -> dict:
        return {"set": "procedural", "seed": seed, "arm": arm, "scores": {arm: dict.fromkeys(GRANULARITIES, value)}}

    pieces = [
        piece(3, "one", 0.5),
        piece(3, "two", 0.6),
        piece(4, "one", 0.7),
        piece(4, "two", 0.6),
        piece(5, "one", 0.9),
    ]
    found = summary(pieces)
    assert found["missing"] == ["procedural, seed 5: two"]
    rows = found["sets"]["procedural"]["arms"]
    assert rows["one"]["rank"] == pytest.approx((1.5, 0.5**0.5))
    assert rows["one"]["group"] == pytest.approx(spread([0.5, 0.7, 0.9]))
    assert found["all"]["two"] == pytest.approx((1.5, 0.5**0.5))
    assert [len(table.rows) for table in tables(found)] == [2]


@pytest.fixture(scope="module")
def small() -> list[str]:
    return [override for override in TINY if not override.startswith(("objectives.", "probes."))]


def test_pieces_resume_and_do_not_mix(
    tmp_path: Path, small: list[str], workers: Workers, monkeypatch: pytest.MonkeyPatch
):
    """One arm by the command line; the second start makes nothing; other settings are refused by name."""
    monkeypatch.setattr(subprocess, "run", in_forks(workers))
    said: list[str] = []
    more = ["probes.size=16", *small]

    def start(images: int = 64) -> list[Path]:
        return run_pieces(
            tmp_path, ["procedural"], ["instance"], [0], images=images, pictures=384, more=more, progress=said.append
        )

    files = start()
    assert [file.name for file in files] == ["procedural-baselines-0.json", "procedural-instance-0.json"]
    assert len(said) == 2
    stamps = [file.stat().st_mtime_ns for file in files]
    start()
    assert [file.stat().st_mtime_ns for file in files] == stamps
    assert len(said) == 2
    found = summary(read_results(tmp_path))["sets"]["procedural"]["arms"]
    assert set(found) == {"chance", "pixels", "random", "instance"}
    assert all(0 < value <= 1 for row in found.values() for value, _ in (row[probe] for probe in GRANULARITIES))
    assert not list(tmp_path.glob("*.run"))
    with pytest.raises(LearningError, match=r"baselines-0\.json was made with other images"):
        start(images=128)


def test_all_arms_see_the_same_crops_and_samples(tmp_path: Path):
    """Only objectives, their heads and weights differ."""
    recipes = {arm: load_recipe("demo", [*settings(tmp_path, 3, 640), *change]) for arm, change in ARMS.items()}
    first = next(iter(recipes.values()))
    for recipe in recipes.values():
        one, other = (
            each.model_dump(exclude={"objectives": True, "student": {"projections", "objectives"}})
            for each in (first, recipe)
        )
        assert one == other
    assert set(recipes["multigrain"].objectives.names()) >= {
        name for recipe in recipes.values() for name in recipe.objectives.names()
    }


def test_sets_of_labelled_pictures_are_asked_without_more_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Fashion-MNIST's files, in small: official parts, one code a class, pixels above chance in all that they can know."""
    generator = np.random.Generator(np.random.Philox(key=4))
    shapes = generator.integers(0, 255, (10, 28, 28))
    for file, count in (("train", 120), ("t10k", 40)):
        labels = np.arange(count) % 10
        pixels = (shapes[labels] * 0.7 + generator.integers(0, 76, (count, 28, 28))).astype(np.uint8)
        for kind, values in (("images-idx3", pixels), ("labels-idx1", labels.astype(np.uint8))):
            head = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">u4").tobytes()
            (tmp_path / f"{file}-{kind}-ubyte.gz").write_bytes(gzip.compress(head + values.tobytes()))
    monkeypatch.setattr(learning_sets, "PACKAGE", tmp_path)
    place = make_set("fashion", tmp_path / "sets", 0)
    assert (Manifest.open(place / "train").samples, Manifest.open(place / "probe").samples) == (120, 40)
    recipe = load_recipe("demo", settings(place, 0, 64))
    probing = Probing(recipe.probes, place / "train")
    assert probing.labels is not None
    assert probing.labels.classes("class") == sorted(CLASSES)
    exam = PictureExam(recipe, place, seed=0)
    pixels, chance = exam.scores(pixel_eyes(8)), exam.chance()
    assert pixels["group"] == 1.0
    assert pixels["local group"] > 0.9
    assert chance["group"] == pytest.approx(0.1)
    assert chance["places"] == 1 / 16
    assert pixels["places"] > chance["places"]
    assert exam.scores(pixel_eyes(8)) == pixels

    dice = torch.Generator().manual_seed(5)

    def blind(images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        drawn = torch.randn(len(images), 8 + 8 + 16 * 8, generator=dice)
        return drawn[:, :8], drawn[:, 8:16], drawn[:, 16:]

    nothing = exam.scores(blind)
    assert nothing["instance"] < 0.2
    assert abs(nothing["places"] - 1 / 16) < 0.06
    assert json.dumps(nothing)


def test_broken_files_of_the_package_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(learning_sets, "PACKAGE", tmp_path)
    with pytest.raises(LearningSetError, match="apt-get install dataset-fashion-mnist"):
        make_set("fashion", tmp_path / "sets", 0)
    file = tmp_path / "train-images-idx3-ubyte.gz"
    for wrong, why in (
        (b"\0\0\x0b\x03", "no IDX file"),
        (bytes([0, 0, 8, 3]) + b"\0\0\0\x02" * 3 + b"abc", "cut short"),
    ):
        file.write_bytes(gzip.compress(wrong.ljust(19, b"\0")))
        with pytest.raises(LearningSetError, match=why):
            make_set("fashion", tmp_path / "sets", 0)
    assert not (tmp_path / "sets" / "fashion").exists()
