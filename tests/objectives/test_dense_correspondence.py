"""Matches of places: against loops, and against what the pipeline's own crops of a picture of coordinates show."""

import io
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gristmill.objectives.correspondence import (
    Counterparts,
    counterparts,
    match_features,
    match_geometry,
    side_of,
)
from gristmill.pipeline.augment.cpu import CpuExecutor
from gristmill.pipeline.draws import draw
from gristmill.pipeline.plan import Plan
from gristmill.pipeline.views import Augment, View
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from . import plain_dense as plain


def unit(*shape: int, seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=-1)


@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 9)),
    mutual=st.booleans(),
    least=st.none() | st.floats(-1, 1),
    seed=st.integers(0, 1000),
)
@settings(max_examples=80, deadline=None)
def test_by_features(shape: tuple[int, int, int], mutual: bool, least: float | None, seed: int) -> None:
    batch, asked, answers = shape
    query, key = unit(batch, asked, 3, seed=seed), unit(batch, answers, 3, seed=seed + 1)
    found = match_features(query, key, mutual=mutual, min_similarity=least)
    for image in range(batch):
        wanted = plain.by_features(query[image].numpy(), key[image].numpy(), mutual, least)
        kept = found.kept[image].nonzero().squeeze(1).tolist()
        assert kept == sorted(wanted)
        assert {i: int(found.index[image, i]) for i in kept} == wanted
    matched = key.gather(1, found.index.unsqueeze(2).expand(-1, -1, 3))
    torch.testing.assert_close(found.similarity, (query * matched).sum(2))


def test_the_first_of_equals_wins() -> None:
    query = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]])
    key = torch.tensor([[[0.0, 1.0], [1.0, 0.0], [1.0, 0.0]]])
    assert match_features(query, key).index.tolist() == [[1, 0, 1]]
    assert match_features(query, key, mutual=True).kept.tolist() == [[True, True, False]]


def test_no_gradient_reaches_the_features() -> None:
    query, key = unit(1, 4, 3, seed=0).requires_grad_(), unit(1, 4, 3, seed=1).requires_grad_()
    similarity = match_features(query, key).similarity
    assert similarity is not None
    assert not similarity.requires_grad


def random_maps(count: int, seed: int, sheared: bool) -> torch.Tensor:
    """Crops of an image, stretched apart, mirrored, with `sheared` turned as well."""
    draws = np.random.default_rng(seed)
    maps = np.zeros((count, 2, 3))
    maps[:, [0, 1], [0, 1]] = draws.uniform(0.5, 3, (count, 2)) * draws.choice([-1, 1], (count, 2))
    if sheared:
        maps[:, [0, 1], [1, 0]] = draws.uniform(-0.3, 0.3, (count, 2))
    maps[:, :, 2] = draws.uniform(40, 60, (count, 2))
    return torch.from_numpy(maps).float()


@given(
    sides=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    sizes=st.tuples(st.sampled_from([20, 32]), st.sampled_from([24, 40])),
    sheared=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None, derandomize=True)  # float32 decides near ties its own way
def test_by_geometry(sides: tuple[int, int], sizes: tuple[int, int], sheared: bool, seed: int) -> None:
    query, key = random_maps(3, seed, sheared), random_maps(3, seed + 1, sheared)
    where = counterparts(
        query,
        key,
        query_size=sizes[0],
        key_size=sizes[1],
        query_places=sides[0] ** 2,
        key_places=sides[1] ** 2,
    )
    found = match_geometry(where)
    assert found.similarity is None
    for image in range(3):
        wanted = plain.by_geometry(query[image].double().numpy(), key[image].double().numpy(), sizes, sides)
        kept = found.kept[image].nonzero().squeeze(1).tolist()
        assert kept == sorted(wanted)
        assert {i: int(found.index[image, i]) for i in kept} == wanted
    assert bool((where.correct(where.nearest) == where.inside).all()) or sheared


def test_one_crop_twice_matches_place_by_place_and_a_mirrored_one_by_columns() -> None:
    plainly = torch.tensor([[[2.0, 0, 10], [0, 1.5, 5]]])
    mirrored = torch.tensor([[[-2.0, 0, 10 + 2 * 223], [0, 1.5, 5]]])
    how: dict[str, Any] = {"query_size": 224, "key_size": 224, "query_places": 49, "key_places": 49}
    own = torch.arange(49).view(7, 7)
    same, other = counterparts(plainly, plainly, **how), counterparts(plainly, mirrored, **how)
    assert torch.equal(same.nearest[0], own.flatten())
    assert torch.equal(other.nearest[0], own.flip(1).flatten())
    assert same.inside.all()
    assert other.inside.all()
    far = torch.tensor([[[2.0, 0, 1000], [0, 1.5, 5]]])
    assert not counterparts(plainly, far, **how).inside.any()


def test_within_one_cell_and_by_chance() -> None:
    """Chance is the share of cells that count as correct, counted one by one."""
    place = torch.tensor([[[0.0, 0.0], [0.4, 0.6], [2.0, 1.0], [-0.5, 2.5], [1.5, 1.5], [9.0, 9.0]]])
    where = Counterparts(place, torch.ones(1, 6, dtype=torch.bool), torch.zeros(1, 6, dtype=torch.int64), 3)
    for within in (0.5, 1.0, 1.5):
        hits = torch.stack([where.correct(torch.full((1, 6), j), within) for j in range(9)]).float().mean(0)
        torch.testing.assert_close(where.chance(within), hits)
    assert where.correct(torch.tensor([[4, 4, 4, 4, 4, 4]])).tolist() == [[True, True, True, False, True, False]]


def test_grids_must_be_square_and_maps_pairs() -> None:
    assert side_of(196) == 14
    maps = random_maps(2, 0, False)
    with pytest.raises(ValueError, match="48 places make no square grid"):
        counterparts(maps, maps, query_size=8, key_size=8, query_places=48, key_places=49)
    with pytest.raises(ValueError, match="not two times"):
        counterparts(maps, maps[:1], query_size=8, key_size=8, query_places=49, key_places=49)


def coordinates(width: int, height: int) -> np.ndarray:
    """A picture whose red tells x and whose green tells y, as an encoded image."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    pixels = np.stack([x * 255 / (width - 1), y * 255 / (height - 1), np.full_like(x, 128)], -1)
    out = io.BytesIO()
    Image.fromarray(np.rint(pixels).astype(np.uint8)).save(out, "PNG")
    return np.frombuffer(out.getvalue(), np.uint8)


def test_crops_of_the_pipeline_show_what_the_geometry_says() -> None:
    """Real crops of real files: the colour under a place tells its source pixel, to a grey level; mirrored ones too."""
    width, height, size, side, batch = 256, 192, 56, 7, 12
    colourless = Augment(jitter_p=0, grey=0)
    plan = Plan([View(name="global", count=2, size=size, scale=(0.3, 1.0), augment=colourless)])
    sizes = np.tile([width, height], (batch, 1))
    draws = draw(plan, 3, np.arange(batch), sizes)
    flips = draws.column("flip").astype(bool)
    assert flips.any(0).all()
    assert not flips.all(0).any()
    crops = CpuExecutor(plan).run([coordinates(width, height)] * batch, draws)["global"].double()
    deviation = torch.tensor([0.229, 0.224], dtype=torch.float64)
    mean = torch.tensor([0.485, 0.456], dtype=torch.float64)
    shown = crops[:, :, :2].movedim(2, -1) * deviation + mean  # [B, 2, S, S, (x, y)], 0 to 1
    shown = shown * torch.tensor([width - 1.0, height - 1.0])
    cell = size // side
    seen = shown.unflatten(3, (side, cell)).unflatten(2, (side, cell)).mean((3, 5)).flatten(2, 3)  # [B, 2, S2, 2]

    maps = torch.from_numpy(draws.geometry)
    where = counterparts(
        maps[:, 0], maps[:, 1], query_size=size, key_size=size, query_places=side**2, key_places=side**2
    )
    # Where each place of the first crop lies on the other's grid, from what both show: colours are linear in it.
    asked, answers = seen[:, 0], seen[:, 1].unflatten(1, (side, side))
    step = torch.stack(
        [
            (answers[:, 3, 5, 0] - answers[:, 3, 1, 0]) / 4,
            (answers[:, 5, 3, 1] - answers[:, 1, 3, 1]) / 4,
        ],
        -1,
    )
    lies = 3 + (asked - answers[:, 3, 3].unsqueeze(1)) / step.unsqueeze(1)
    torch.testing.assert_close(where.place.double(), lies, rtol=0, atol=0.08)  # of a cell: it is some 20 pixels wide
    sure = ((lies + 0.5).abs() > 0.1).all(-1) & ((lies - (side - 0.5)).abs() > 0.1).all(-1)
    held = ((lies > -0.5) & (lies < side - 0.5)).all(-1)
    assert torch.equal(where.inside[sure], held[sure])
    assert 0.2 < float(held.float().mean()) < 0.98
    clear = held & ((lies - lies.floor() - 0.5).abs() > 0.1).all(-1)
    apart = (asked[:, :, None] - seen[:, 1][:, None]).square().sum(-1)
    assert int(clear.sum()) > 100
    assert torch.equal(where.nearest[clear], apart.argmin(2)[clear])
