"""Draws: a pure function of (seed, position, crop, size), distributed as torchvision's, with the right geometry."""

import hashlib
import math

import numpy as np
import pytest
import torch
from gristmill.pipeline import philox
from gristmill.pipeline.boxes import exp
from gristmill.pipeline.draws import COLUMNS, NEVER, Draws, Plan, PlanError, draw
from gristmill.pipeline.views import View
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms import ColorJitter, RandomResizedCrop

GLOBAL = View(name="global", count=2, size=48)
LOCAL = View.model_validate({"name": "local", "count": 4, "size": 24, "scale": (0.05, 0.25), "augment": "weak-local"})
PLAN = Plan([GLOBAL, LOCAL])


def same_size(plan: Plan, count: int, size: tuple[int, int], seed: int = 0) -> Draws:
    return draw(plan, seed, np.arange(count), np.tile(np.array(size, np.int32), (count, 1)))


def kolmogorov_smirnov(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Largest gap of the two samples' distributions, in units of the gap that one in a million equal ones shows."""
    grid = np.concatenate([ours, theirs])
    gap = np.abs(
        np.searchsorted(np.sort(ours), grid, "right") / len(ours)
        - np.searchsorted(np.sort(theirs), grid, "right") / len(theirs)
    ).max()
    return gap / math.sqrt(-math.log(1e-6 / 2) / 2 * (1 / len(ours) + 1 / len(theirs)))


def test_the_plan_lays_views_out_in_recipe_order():
    assert PLAN.crops == 6
    assert PLAN.columns == {"global": slice(0, 2), "local": slice(2, 6)}
    assert PLAN.blur.tolist() == [1.0, 0.1, 0.5, 0.5, 0.5, 0.5]
    assert PLAN.solarize.tolist() == [0.0, 0.2, 0, 0, 0, 0]


def test_impossible_plans_are_refused():
    for views, said in [([], "no views"), ([GLOBAL, GLOBAL], "different names")]:
        with pytest.raises(PlanError, match=said):
            Plan(views)
    with pytest.raises(PlanError, match="1001 crops"):
        Plan([View(name="many", count=1001, size=8)])


def test_sizes_must_fit_the_positions():
    with pytest.raises(ValueError, match="width, height"):
        draw(PLAN, 0, np.arange(3), np.ones((2, 2), int))
    with pytest.raises(ValueError, match="width, height"):
        draw(PLAN, 0, np.arange(1), np.zeros((1, 2), int))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**63), chosen=st.lists(st.integers(0, 99), min_size=1, max_size=30))
def test_draws_do_not_depend_on_the_batch(seed: int, chosen: list[int]):
    positions = np.arange(100) * 7_919_000_003
    sizes = np.stack([np.arange(100) * 13 % 500 + 1, np.arange(100) * 29 % 700 + 1], -1)
    whole, part = draw(PLAN, seed, positions, sizes), draw(PLAN, seed, positions[chosen], sizes[chosen])
    assert part.params.tobytes() == whole.params[chosen].tobytes()
    assert part.geometry.tobytes() == whole.geometry[chosen].tobytes()


def test_a_view_added_behind_leaves_the_others_alone():
    more = Plan([GLOBAL, LOCAL, View(name="more", count=3, size=8)])
    assert np.array_equal(same_size(more, 50, (80, 60)).params[:, :6], same_size(PLAN, 50, (80, 60)).params)


def test_crops_positions_and_seeds_differ():
    params = same_size(Plan([View(name="crop", count=8, size=8)]), 64, (4000, 3000)).params
    assert len(np.unique(params[..., :4].reshape(-1, 4), axis=0)) > 500
    assert (same_size(PLAN, 64, (400, 300), seed=1).params != same_size(PLAN, 64, (400, 300)).params).any((1, 2)).all()


def test_the_stream_is_frozen():
    """A change of these numbers changes the crops of every run ever started: bump the cursor's version if meant."""
    sizes = np.stack([np.arange(64) * 37 % 640 + 1, np.arange(64) * 53 % 480 + 1], -1)
    drawn = draw(PLAN, 20261122, np.arange(64) + 2**40, sizes)
    assert hashlib.blake2b(drawn.params[..., :12].tobytes(), digest_size=8).hexdigest() == "463a5fd5cb6c01c6"
    assert hashlib.blake2b(drawn.geometry.tobytes(), digest_size=8).hexdigest() == "1905f34c034d5fa1"


def torchvision_box(view: View, u: np.ndarray, width: int, height: int) -> tuple[int, int, int, int]:
    """RandomResizedCrop.get_params line by line, its random numbers taken from `u`."""
    area, log_ratio = height * width, [math.log(end) for end in view.ratio]
    for t in range(10):
        target_area = area * (view.scale[0] + (view.scale[1] - view.scale[0]) * u[t])
        aspect_ratio = math.exp(log_ratio[0] + (log_ratio[1] - log_ratio[0]) * u[10 + t])
        w = round(math.sqrt(target_area * aspect_ratio))
        h = round(math.sqrt(target_area / aspect_ratio))
        if 0 < w <= width and 0 < h <= height:
            i, j = int(u[20] * (height - h + 1)), int(u[21] * (width - w + 1))
            return j, i, j + w, i + h
    in_ratio = width / height
    if in_ratio < view.ratio[0]:
        w, h = width, round(width / view.ratio[0])
    elif in_ratio > view.ratio[1]:
        w, h = round(height * view.ratio[1]), height
    else:
        w, h = width, height
    i, j = (height - h) // 2, (width - w) // 2
    return j, i, j + w, i + h


@settings(max_examples=60, deadline=None)
@given(
    width=st.integers(2, 2000),
    height=st.integers(2, 2000),
    low=st.floats(0.01, 1),
    high=st.floats(0.01, 1),
    seed=st.integers(0, 2**32),
)
def test_boxes_are_torchvisions_number_for_number(width: int, height: int, low: float, high: float, seed: int):
    view = View(name="crop", count=3, size=8, scale=(min(low, high), max(low, high)))
    boxes = same_size(Plan([view]), 20, (width, height), seed).params[..., :4]
    u = philox.uniform(seed, np.arange(20)[:, None], np.arange(3), 32)
    expected = [[torchvision_box(view, u[b, v], width, height) for v in range(3)] for b in range(20)]
    assert boxes.tolist() == np.array(expected, float).tolist()


@pytest.mark.parametrize("size", [(64, 64), (500, 375), (333, 500), (900, 60)])
@pytest.mark.parametrize("scale", [(0.25, 1.0), (0.05, 0.25)])
def test_boxes_are_distributed_as_torchvisions(size: tuple[int, int], scale: tuple[float, float]):
    width, height = size
    ours = same_size(Plan([View(name="crop", count=4, size=8, scale=scale)]), 2000, size).params[..., :4].reshape(-1, 4)
    image = torch.empty(1, height, width)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        drawn = [RandomResizedCrop.get_params(image, list(scale), [3 / 4, 4 / 3]) for _ in range(3000)]
    top, left, h, w = np.array(drawn, float).T
    theirs = np.stack([left, top, left + w, top + h], -1)
    for mine, other in [
        *zip(ours.T, theirs.T, strict=True),
        (ours[:, 2] - ours[:, 0], w),
        (ours[:, 3] - ours[:, 1], h),
    ]:
        assert kolmogorov_smirnov(mine, other) < 1


def test_images_in_which_no_try_fits_get_the_middle():
    drawn = same_size(Plan([View(name="crop", count=2, size=8, scale=(1.0, 1.0))]), 5, (1000, 100))
    assert np.unique(drawn.params[..., :4].reshape(-1, 4), axis=0).tolist() == [[433, 0, 566, 100]]


@settings(max_examples=60, deadline=None)
@given(width=st.integers(1, 30), height=st.integers(1, 30), ratio=st.sampled_from([(3 / 4, 4 / 3), (3, 4), (0.1, 0.2)]))
def test_boxes_lie_in_the_image_and_are_never_empty(width: int, height: int, ratio: tuple[float, float]):
    box = same_size(Plan([View(name="c", count=4, size=8, scale=(0.01, 1), ratio=ratio)]), 8, (width, height)).params
    assert (box[..., 0:2] >= 0).all()
    assert (box[..., 2] <= width).all()
    assert (box[..., 3] <= height).all()
    assert (box[..., 2:4] > box[..., 0:2]).all()
    assert np.array_equal(box[..., :4], np.rint(box[..., :4]))


def test_the_none_preset_takes_the_middle_square_and_nothing_else():
    plan = Plan([View.model_validate({"name": "probe", "size": 16, "augment": "none"})])
    drawn = same_size(plan, 3, (50, 21))
    neutral = dict(zip(COLUMNS, [14, 0, 35, 21, 0, 1, 1, 1, 0, 0, 0, NEVER, *[0] * 11], strict=True))
    assert [dict(zip(COLUMNS, row.tolist(), strict=True)) for row in drawn.params[:, 0]] == [neutral] * 3


def test_colours_are_distributed_as_torchvisions():
    view = View.model_validate({"name": "c", "count": 4, "size": 8, "augment": {"preset": "weak", "jitter_p": 1.0}})
    drawn = same_size(Plan([view]), 3000, (64, 64))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        jitter = ColorJitter(0.4, 0.4, 0.2, 0.1)
        ranges = (jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)
        theirs = np.array([ColorJitter.get_params(*ranges)[1:] for _ in range(5000)], float)  # pyright: ignore
    for index, name in enumerate(("brightness", "contrast", "saturation", "hue")):
        assert kolmogorov_smirnov(drawn.column(name).ravel(), theirs[:, index]) < 1
    # One of the four says nothing about another.
    columns = np.stack([drawn.column(n).ravel() for n in ("brightness", "contrast", "saturation", "hue", "flip")])
    assert np.abs(np.corrcoef(columns) - np.eye(5)).max() < 6 / math.sqrt(columns.shape[1])


def test_a_factor_range_does_not_go_below_zero():
    view = View.model_validate({"name": "c", "size": 8, "augment": {"brightness": 2.0, "jitter_p": 1.0}})
    brightness = same_size(Plan([view]), 2000, (8, 8)).column("brightness")
    assert 0 <= brightness.min() < 0.01
    assert 2.99 < brightness.max() <= 3


@pytest.mark.parametrize("crop", range(6))
def test_chances_are_the_recipes(crop: int):
    count = 4000
    drawn = same_size(PLAN, count, (64, 64))
    jittered = (drawn.column("brightness") != 1) | (drawn.column("hue") != 0)
    happened = {
        "flip": (drawn.column("flip") == 1, PLAN.flip[crop]),
        "jitter": (jittered, PLAN.jitter[crop]),
        "grey": (drawn.column("grey") == 1, PLAN.grey[crop]),
        "blur": (drawn.column("sigma") > 0, PLAN.blur[crop]),
        "solarize": (drawn.column("solarize") == 128, PLAN.solarize[crop]),
    }
    for name, (seen, chance) in happened.items():
        bound = 5 * math.sqrt(chance * (1 - chance) / count)
        assert abs(seen[:, crop].mean() - chance) <= bound, name
    sigma = drawn.column("sigma")[:, crop]
    sigma = sigma[sigma > 0]
    assert PLAN.sigma[crop, 0] <= sigma.min()
    assert sigma.max() <= PLAN.sigma[crop, 1] * (1 + 1e-6)
    assert abs(sigma.mean() - PLAN.sigma[crop].mean()) < 0.05 * PLAN.sigma[crop, 1] * math.sqrt(400 / len(sigma))


def test_geometry_takes_the_crops_edges_to_the_boxs():
    drawn = same_size(PLAN, 200, (640, 480))
    edges = np.stack([np.full_like(PLAN.size, -0.5), PLAN.size - 0.5], -1)  # [V, 2]: outer edges of the crop's pixels
    corners = np.stack([edges, edges, np.ones_like(edges)], -1)  # [V, 2 corners, 3]
    mapped = np.einsum("bvij,vcj->bvci", drawn.geometry.astype(float), corners) + 0.5
    box, flip = drawn.params[..., :4].astype(float), drawn.column("flip") > 0
    left, right = np.where(flip, box[..., 2], box[..., 0]), np.where(flip, box[..., 0], box[..., 2])
    expected = np.stack([np.stack([left, box[..., 1]], -1), np.stack([right, box[..., 3]], -1)], -2)
    assert np.abs(mapped - expected).max() < 2e-3


def test_the_exponential_is_the_exponential():
    x = np.linspace(-5, 5, 10_001)
    assert np.abs(exp(x) / np.exp(x) - 1).max() < 1e-13
