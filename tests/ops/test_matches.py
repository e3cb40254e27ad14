"""Matches drawn and counted: of made-up crops, of real crops with features that tell the place, and of a run."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from gristmill.ops.bench import dense_forms
from gristmill.ops.launch import join
from gristmill.ops.matches import MatchesError, Pairs, draw_matches, draw_pairs, map_of, matches_of, pair_of_views, see
from gristmill.ops.matches_page import GAP, RIGHT, TILE, UNKNOWN, WRONG
from gristmill.ops.recipe import RecipeError
from gristmill.ops.train import train
from gristmill.pipeline.views import View
from torch import nn

from ..distributed.guard_cases import BATCH, make_data, recipe_of


def painted(picture, colour: tuple[int, int, int]) -> np.ndarray:
    """Where a picture has exactly this colour: (y, x) [n, 2]."""
    return np.argwhere((np.asarray(picture) == colour).all(-1))


def test_lines_go_from_centre_to_centre_in_colours_for_right_and_wrong() -> None:
    grey = torch.zeros(3, 32, 32)
    match = torch.tensor([3, 1, 2, 0])
    correct = torch.tensor([True, False, True, False])
    picture = draw_matches(grey, grey, match, correct, kept=torch.tensor([True, False, False, True]))
    assert picture.size == (2 * TILE + GAP, TILE)
    quarter = TILE // 4
    ends = {RIGHT: ((quarter, quarter), (TILE + GAP + 3 * quarter, 3 * quarter))}
    ends[WRONG] = ((3 * quarter, 3 * quarter), (TILE + GAP + quarter, quarter))
    for colour, points in ends.items():
        found = painted(picture, colour)
        assert len(found)
        for x, y in points:
            assert np.abs(found - (y, x)).max(1).min() <= 1
        assert found[:, 1].min() >= points[0][0] - 5
        assert found[:, 1].max() <= points[1][0] + 5
    # Dashed: of the wrong line much less is painted than of the right one, which is as long.
    assert len(painted(picture, WRONG)) < 0.85 * len(painted(picture, RIGHT))
    assert not len(painted(picture, UNKNOWN))


def test_the_best_are_drawn_and_without_geometry_nothing_is_called_right() -> None:
    grey, match = torch.zeros(3, 32, 32), torch.arange(4)
    similarity = torch.tensor([0.1, 0.9, 0.5, 0.2])
    picture = draw_matches(grey, grey, match, similarity=similarity, best=1)
    found = painted(picture, UNKNOWN)
    assert np.abs(found[:, 0] - TILE // 4).max() <= 5  # the upper right place alone
    assert np.abs(found[:, 1] - 3 * TILE // 4).min() <= 1
    assert not len(painted(picture, RIGHT))
    with pytest.raises(ValueError, match="want their similarity"):
        draw_matches(grey, grey, match, best=2)
    with pytest.raises(ValueError, match="no square grid"):
        draw_matches(grey, grey, torch.arange(5))


def test_grids_of_two_sizes() -> None:
    grey = torch.zeros(3, 32, 32)
    picture = draw_matches(grey, grey, torch.tensor([8, 0, 0, 0]), torch.ones(4, dtype=torch.bool), key_places=9)
    found = painted(picture, RIGHT)
    assert np.abs(found - (TILE * 5 // 6, TILE + GAP + TILE * 5 // 6)).max(1).min() <= 1


class Mean(nn.Module):
    """A network whose feature of a patch of `size` is its mean colour, as angles, so that likeness is nearness."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.backbone, self.heads = MeanColour(size), nn.ModuleDict()


class MeanColour(nn.Module):
    norm = nn.Identity()

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, crops: torch.Tensor) -> torch.Tensor:
        rows = nn.functional.avg_pool2d(crops[:, :2], self.size).flatten(2).mT * 0.6
        rows = torch.cat([rows.sin(), rows.cos()], -1)
        return torch.cat([rows.mean(1, keepdim=True), rows], 1)


def test_a_network_that_tells_places_apart_is_found_right() -> None:
    """Crops of a picture whose colours are coordinates: the nearest colour is the right place, and mutual ones are surer."""
    size, batch = 56, 6
    generator = np.random.default_rng(0)
    maps = np.zeros((2, batch, 2, 3), np.float32)
    maps[..., [0, 1], [0, 1]] = generator.uniform(0.8, 1.5, (2, batch, 2))
    maps[1, :, 0, 0] *= -1
    maps[..., 2] = generator.uniform(0, 20, (2, batch, 2))
    maps[1, :, 0, 2] += 80
    grid = np.stack([*np.meshgrid(np.arange(size), np.arange(size)), np.ones((size, size))], 0)
    source = np.einsum("vbij,jyx->vbiyx", maps, grid) / 50 - 1
    crops = torch.from_numpy(np.concatenate([source, source[:, :, :1]], 2)).float()
    pairs = Pairs(["k"] * batch, *crops, *torch.from_numpy(maps))
    seen = see(Mean(8), Mean(8), pairs)
    scores = seen.scores()
    assert 0.3 < scores["overlap"] < 1
    assert scores["features_correct"] > 0.99
    assert scores["mutual_correct"] > 0.99
    assert scores["mutual_matched"] < scores["features_matched"] == 1
    assert scores["features_chance"] < 0.2
    inside = seen.where.inside
    assert float((seen.one_way.index == seen.where.nearest)[inside].double().mean()) > 0.9
    coarse = map_of(Mean(8), pairs.query, grid=3)
    assert coarse.shape == (batch, 9, 4)
    torch.testing.assert_close(coarse.norm(dim=-1), torch.ones(batch, 9))


def test_which_crops_are_compared() -> None:
    large = View(name="large", count=2, size=16)
    small = View(name="small", count=3, size=8, role="student")
    assert pair_of_views([large, small]) == (("large", 1), ("large", 0))
    apart = [View(name="q", size=16, role="student"), View(name="k", size=16, role="teacher")]
    assert pair_of_views(apart) == (("q", 0), ("k", 0))
    for views in ([View(name="one", size=16), small], [View(name="q", size=16, role="student")]):
        with pytest.raises(MatchesError, match="no two large crops"):
            pair_of_views(views)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps; training leaves the group, which other tests of this process use, too."""
    folder = tmp_path_factory.mktemp("matches")
    make_data(folder, 40)
    join()
    try:
        train(recipe_of(folder, 2), folder / "run", quiet=True)
    finally:
        join()
    return folder


@pytest.mark.parametrize("kind", ["html", "png"])
def test_matches_of_a_run(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    out = tmp_path / f"matches.{kind}"
    assert matches_of(run / "run", out, images=2, measured=8) == 0
    said = capsys.readouterr().out
    assert f"2 images of {run / 'run'} after {2 * BATCH} images" in said
    assert re.search(r"mutual matches within a cell: random [\d.]+ %, trained [\d.]+ %, chance [\d.]+ %", said)
    assert [path.name for path in tmp_path.iterdir()] == [out.name]
    if kind == "png":
        assert out.read_bytes().startswith(b"\x89PNG")
    else:
        page = out.read_text()
        assert page.count("<img") == 2
        assert "<script" not in page
        assert "http://" not in page
    assert matches_of(run / "run", out, images=1, measured=4, position=5, grid=1, as_json=True) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["position"], answer["measured"]) == (2 * BATCH, 4)
    # On a grid of one place every match is right, and so is every guess.
    row = answer["matches"]["trained"]
    assert row["features_matched"] == row["mutual_matched"] == row["features_same_place"] == 1
    if row["overlap"]:
        assert row["features_correct"] == row["features_chance"] == 1


def test_crops_are_those_of_the_stream(run: Path) -> None:
    recipe = recipe_of(run, 2)
    first, later = draw_pairs(recipe, 4), draw_pairs(recipe, 2, position=2)
    assert later.keys == first.keys[2:]
    assert torch.equal(later.query, first.query[2:])
    assert torch.equal(later.answer_geometry, first.answer_geometry[2:])
    assert not torch.equal(first.query, first.answer)


def test_mistakes_are_answered(run: Path, tmp_path: Path) -> None:
    with pytest.raises(MatchesError, match=r"ends in .html or .png"):
        matches_of(run / "run", tmp_path / "matches.pdf")
    with pytest.raises(MatchesError, match="no folder"):
        matches_of(run / "run", tmp_path / "nowhere" / "matches.png")
    with pytest.raises(RecipeError, match="holds no run"):
        matches_of(tmp_path, tmp_path / "matches.png")
    (tmp_path / "young").mkdir()
    (tmp_path / "young" / "recipe.yaml").write_text((run / "run" / "recipe.yaml").read_text())
    with pytest.raises(RecipeError, match="no checkpoint yet"):
        matches_of(tmp_path / "young", tmp_path / "matches.png")


def test_the_benchmark_compares_like_with_like() -> None:
    sizes = {"images": 2, "places": [4, 9], "features": 8, "dim": 4, "queue": 32}
    torch.manual_seed(0)
    losses = []
    for fast in (True, False):
        torch.manual_seed(1)
        losses.append(dense_forms.dense(fast, sizes, 9)())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    found = dense_forms.both("fast", {**sizes, "seconds": 0.0})
    assert found.keys() == {"4", "9"}
    for row in found.values():
        assert row["seconds"] > 0
        assert row.keys() == {"seconds", "cpu_seconds", "memory_MB"}
