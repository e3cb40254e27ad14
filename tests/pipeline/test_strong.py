"""Draws of strong crops: coins, RandAugment and erasing distributed as timm's, maps and windows that tell the truth."""

import hashlib
import io
import math
import random
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from gristmill.pipeline.augment.noise import noise_tile
from gristmill.pipeline.augment.reference import ReferenceExecutor
from gristmill.pipeline.draws import COLUMNS, NOISE_SIDE, OPERATIONS, Draws, Plan, PlanError, draw
from gristmill.pipeline.groups import named_views
from gristmill.pipeline.strong import GEOMETRIC, NUMBER, arguments, strong_crops
from gristmill.pipeline.views import View
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import stats
from timm.data.auto_augment import LEVEL_TO_ARG, rand_augment_transform
from timm.data.random_erasing import RandomErasing

COUNT = 20_000
MUGS = Plan([View.model_validate(view) for view in named_views("mugs")])
TEACHER, GLOBAL, LOCAL = slice(0, 2), slice(2, 4), slice(4, 14)
Step = tuple[Any, ...]  # name of an operation, and its argument if it has one
UNLIKELY = 1e-6  # p-values below this mean that two distributions differ
NO_COLOUR = {"jitter_p": 0.0, "grey": 0.0}


def always(**strong: object) -> Plan:
    """One crop of 64 pixels that is always strong."""
    return Plan([View.model_validate({"name": "s", "size": 64, "weak_p": 0.0, "strong": strong})])


def drawn(plan: Plan, count: int = COUNT, size: tuple[int, int] = (500, 375), seed: int = 0) -> Draws:
    return draw(plan, seed, np.arange(count), np.tile(np.array(size), (count, 1)))


@pytest.fixture(scope="module")
def mugs() -> Draws:
    return drawn(MUGS, 4000)


def test_who_is_strong(mugs: Draws):
    strong = mugs.column("strong")
    assert MUGS.crops == 14
    assert not strong[:, TEACHER].any()
    assert np.array_equal(strong[:, 2], strong[:, 3])  # one coin an image
    bound = 5 * math.sqrt(0.25 / 4000)
    assert np.abs(strong.mean(0)[2:] - 0.5).max() < bound
    coins = np.corrcoef(strong[:, 3:].T)  # the global crops' coin and ten more
    assert np.abs(coins - np.eye(11)).max() < 6 / math.sqrt(4000)


def test_the_teacher_and_the_weak_form_are_dinos(mugs: Draws):
    """Weak crops are those that the same view without a strong form gets, number for number."""
    weak = Plan([view.model_copy(update={"strong": None}) for view in MUGS.views])
    plain = drawn(weak, 4000)
    is_weak = mugs.column("strong") == 0
    assert np.array_equal(mugs.params[is_weak], plain.params[is_weak])
    assert np.array_equal(mugs.geometry[is_weak], plain.geometry[is_weak])
    # The strong ones keep their box and flip, and lose colours and blur.
    assert np.array_equal(mugs.params[..., :5], plain.params[..., :5])
    neutral = [COLUMNS.index(name) for name in ("brightness", "contrast", "saturation", "hue", "grey", "sigma")]
    assert np.unique(mugs.params[~is_weak][:, neutral], axis=0).tolist() == [[1, 1, 1, 0, 0, 0]]
    assert (mugs.column("solarize")[~is_weak] == 256).all()


def test_a_strong_form_can_have_colours_of_its_own():
    params = drawn(always(jitter_p=1.0, blur=1.0, flip=0.0), 500)
    assert (params.column("sigma") > 0).all()
    assert (params.column("brightness") != 1).all()
    assert not params.column("flip").any()


def test_views_of_a_group_share_a_coin_and_need_one_chance():
    def view(name: str, **more: object) -> View:
        return View.model_validate({"name": name, "size": 8, "strong": "mugs", "coin": "image"} | more)

    plan = Plan([view("a", coin_group="x"), view("b"), view("c", coin_group="x", count=2), view("d")])
    strong = drawn(plan, 500).column("strong")
    assert np.array_equal(strong[:, 0], strong[:, 2])
    assert np.array_equal(strong[:, 0], strong[:, 3])
    assert len({tuple(column) for column in strong.T.tolist()}) == 3
    with pytest.raises(PlanError, match=r"views\.b: shares the coin 'x' with a and needs its weak_p 0\.5, not 0\.2"):
        Plan([view("a", coin_group="x"), view("b", coin_group="x", weak_p=0.2)])
    # A view whose name is that of a group has its own coin.
    other = drawn(Plan([view("x"), view("y", coin_group="x")]), 500).column("strong")
    assert not np.array_equal(other[:, 0], other[:, 1])


def test_what_cannot_be_carried_out_is_refused():
    with pytest.raises(PlanError, match=r"up to 512 pixels, not 640: make the crop smaller, or set strong\.erase to 0"):
        Plan([View.model_validate({"name": "s", "size": 640, "strong": "mugs"})])
    Plan([View.model_validate({"name": "s", "size": 640, "strong": {"erase": 0}})])


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**63), chosen=st.lists(st.integers(0, 59), min_size=1, max_size=20))
def test_draws_do_not_depend_on_the_batch(seed: int, chosen: list[int]):
    positions = np.arange(60) * 7_919_000_003
    sizes = np.stack([np.arange(60) * 13 % 500 + 1, np.arange(60) * 29 % 700 + 1], -1)
    whole, part = draw(MUGS, seed, positions, sizes), draw(MUGS, seed, positions[chosen], sizes[chosen])
    for name in ("params", "geometry", "warp", "window"):
        assert getattr(part, name).tobytes() == getattr(whole, name)[chosen].tobytes(), name
        assert getattr(whole.take(chosen), name).tobytes() == getattr(part, name).tobytes(), name


def test_a_view_added_behind_leaves_the_others_alone(mugs: Draws):
    more = Plan([*MUGS.views, View.model_validate({"name": "more", "size": 8, "strong": "mugs", "coin": "image"})])
    assert np.array_equal(drawn(more, 100).params[:, :14], mugs.params[:100])


def test_the_stream_is_frozen():
    """A change of these numbers changes the strong crops of every run ever started."""
    sizes = np.stack([np.arange(64) * 37 % 640 + 1, np.arange(64) * 53 % 480 + 1], -1)
    frozen = draw(MUGS, 20261122, np.arange(64) + 2**40, sizes)
    assert hashlib.blake2b(frozen.params.tobytes(), digest_size=8).hexdigest() == "471a1e6ca579ac96"
    assert hashlib.blake2b(frozen.geometry.tobytes(), digest_size=8).hexdigest() == "9f41d1e15320ece1"


def timms_randaugment(count: int) -> list[list[Step]]:
    """Operations and arguments that timm carries out, in order, for so many images."""
    pipeline = rand_augment_transform("rand-m9-mstd0.5-inc1", {"img_mean": (124, 116, 104)})
    happened: list[list[Step]] = []

    def spy(operation: str):
        return lambda image, *given, **_: happened[-1].append((operation, *map(float, given))) or image

    for op in pipeline.ops:
        op.aug_fn = spy(op.name.removesuffix("Increasing"))
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - timm's source of numbers
    for _ in range(count):
        happened.append([])
        pipeline(Image.new("RGB", (2, 2)))
    return happened


def operations_of(draws: Draws) -> list[list[Step]]:
    return [
        [(OPERATIONS[int(op) - 1], arg) for op, arg in ((op1, arg1), (op2, arg2)) if op]
        for op1, arg1, op2, arg2 in draws.params[:, 0, 13:17].tolist()
    ]


@pytest.fixture(scope="module")
def theirs() -> list[list[Step]]:
    return timms_randaugment(COUNT)


def test_operations_and_arguments_are_distributed_as_timms(theirs: list[list[Step]]):
    """20,000 images each: how many are carried out, which, in which pairs, and every one's argument."""
    ours = operations_of(drawn(always(replacement=True)))
    numbers = np.array([np.bincount([len(steps) for steps in some], minlength=3) for some in (ours, theirs)])
    assert stats.chi2_contingency(numbers).pvalue > UNLIKELY
    counts = [Counter(step[0] for steps in some for step in steps) for some in (ours, theirs)]
    assert stats.chi2_contingency([[count[name] for name in OPERATIONS] for count in counts]).pvalue > UNLIKELY
    pairs = [Counter((a[0], b[0]) for a, b in (s for s in some if len(s) == 2)) for some in (ours, theirs)]
    kinds = sorted(pairs[0] | pairs[1])
    assert len(kinds) == 225
    assert stats.chi2_contingency([[pair[kind] for kind in kinds] for pair in pairs]).pvalue > UNLIKELY
    for name in OPERATIONS:
        mine, other = (
            [step[1] for steps in some for step in steps if step[0] == name and step[1:]] for some in (ours, theirs)
        )
        if other:
            assert stats.ks_2samp(np.array(mine, np.float32), np.array(other, np.float32)).pvalue > UNLIKELY, name
        else:
            assert set(mine) == {0}, name


def test_mugs_draws_without_replacement(theirs: list[list[Step]]):
    ours = operations_of(drawn(always()))
    pairs = Counter((a[0], b[0]) for a, b in (steps for steps in ours if len(steps) == 2))
    assert not any(a == b for a, b in pairs)
    assert len(pairs) == 15 * 14
    assert stats.chisquare(list(pairs.values())).pvalue > UNLIKELY
    assert any(len(steps) == 2 and steps[0][0] == steps[1][0] for steps in theirs)
    first = Counter(steps[0][0] for steps in ours if len(steps) == 1)
    assert stats.chisquare([first[name] for name in OPERATIONS]).pvalue > UNLIKELY


def test_magnitudes_are_cut_at_ten_and_arguments_at_their_strongest():
    draws = drawn(always(magnitude=10, magnitude_std=2.0, operation_p=1.0))
    for name, ends in {
        "Rotate": (-30, 30),
        "Posterize": (0, 4),
        "Solarize": (0, 256),
        "SolarizeAdd": (0, 110),
        "Color": (0.1, 1.9),
        "ShearX": (-0.3, 0.3),
        "TranslateYRel": (-0.45, 0.45),
    }.items():
        seen = draws.column("arg1")[draws.column("op1") == NUMBER[name]]
        assert ends[0] - 1e-6 <= seen.min()
        assert seen.max() <= ends[1] + 1e-6
        strongest = ends[1] if name == "SolarizeAdd" else ends[0]
        assert (np.abs(seen - strongest) < 1e-6).mean() > 0.2
    # The table of arguments is timm's level functions, number for number.
    for name in ("Posterize", "Solarize", "SolarizeAdd"):
        operation = NUMBER[name]
        level_to_argument = LEVEL_TO_ARG[name if name == "SolarizeAdd" else f"{name}Increasing"]
        levels = np.linspace(0, 10, 1001)
        mine = arguments(np.full(1001, operation), levels, np.zeros(1001, bool))
        assert mine.tolist() == [level_to_argument(level, {})[0] for level in levels.tolist()]


def test_one_operation_or_none():
    one = drawn(always(operations=1, operation_p=1.0), 300)
    assert one.column("op1").all()
    assert not one.column("op2").any()
    none = drawn(always(operations=0, erase=0), 300)
    assert none.column("strong").all()
    assert not none.params[..., COLUMNS.index("op1") :].any()


@pytest.mark.parametrize("size", [64, 224])
def test_erased_boxes_are_distributed_as_timms(size: int):
    plan = Plan([View.model_validate({"name": "s", "size": size, "weak_p": 0, "strong": "mugs"})])
    draws = drawn(plan)
    box = np.stack([draws.column(f"erase_{end}")[:, 0] for end in ("x0", "y0", "x1", "y1")], -1).astype(int)
    erased = box.any(-1)
    eraser, other = RandomErasing(0.25, mode="pixel", max_count=1, device="cpu"), []
    random.seed(0)
    for _ in range(COUNT // 4):
        image = torch.full((1, size, size), math.nan)
        eraser(image)
        rows, columns = (torch.isfinite(image[0]).any(axis).nonzero().ravel() for axis in (1, 0))
        if len(rows):
            other.append((int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1))
    timms = np.array(other)
    share = [[erased.sum(), COUNT - erased.sum()], [len(timms), COUNT // 4 - len(timms)]]
    assert stats.chi2_contingency(share).pvalue > UNLIKELY
    ours = box[erased]
    assert (ours[:, :2] >= 0).all()
    assert (ours[:, 2:] <= size).all()

    def measures(boxes: np.ndarray) -> np.ndarray:
        x0, y0, x1, y1 = boxes.T.astype(float)
        return np.stack([x0, y0, x1, y1, x1 - x0, y1 - y0, (x1 - x0) * (y1 - y0), (y1 - y0) / (x1 - x0)])

    for mine, theirs in zip(measures(ours), measures(timms), strict=True):
        assert stats.ks_2samp(mine, theirs).pvalue > UNLIKELY
    noise = np.stack([draws.column("noise_x")[:, 0], draws.column("noise_y")[:, 0]], -1)[erased]
    assert (noise >= 0).all()
    assert (noise + ours[:, 2:] - ours[:, :2] <= NOISE_SIDE).all()
    assert not draws.params[~erased, 0, COLUMNS.index("erase_x0") :].any()


def test_the_noise_is_normal_and_the_same_everywhere():
    tile = noise_tile()
    assert tile.shape == (NOISE_SIDE, NOISE_SIDE, 3)
    assert tile.dtype == np.float32
    assert not tile.flags.writeable
    assert stats.kstest(tile.ravel()[::7], "norm").pvalue > UNLIKELY
    neighbours = [tile[1:], tile[:, 1:], tile[..., 1:]], [tile[:-1], tile[:, :-1], tile[..., :-1]]
    for a, b in zip(*neighbours, strict=True):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.01
    assert hashlib.blake2b(tile.tobytes(), digest_size=8).hexdigest() == "8f7a439aea1059cb"
    assert np.array_equal(tile * 2.0**16, np.rint(tile * 2.0**16))


def coordinates(width: int, height: int) -> np.ndarray:
    """An image whose red is x and whose green is y."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x, y, 0 * x], -1).astype(np.uint8)


def encoded(image: np.ndarray) -> np.ndarray:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return np.frombuffer(buffer.getvalue(), np.uint8)


PLACES = {"erase": 0.0, "operation_p": 1.0}


def told(draws: Draws, view: View, columns: slice) -> np.ndarray:
    """Where each pixel of the crops lies in the source by their geometry: [B, n, size, size, 2]."""
    grid = np.stack(np.meshgrid(np.arange(view.size), np.arange(view.size)), -1).astype(float)
    maps = draws.geometry[:, columns].astype(float)
    return np.einsum("bnij,yxj->bnyxi", maps[..., :2], grid) + maps[:, :, None, None, :, 2]


@pytest.mark.parametrize("filter", ["bilinear", "bicubic"])
def test_geometry_leads_from_crop_pixels_to_source_pixels(filter: str):
    """Of an image of coordinates a crop shows where each of its pixels comes from, warped ones too."""
    width, height = 210, 160
    view = View.model_validate(
        {"name": "s", "count": 6, "size": 40, "scale": (0.1, 0.6), "filter": filter, "weak_p": 0, "strong": PLACES}
    )
    plan = Plan([view])
    draws = drawn(plan, 120, (width, height), seed=5)
    geometric = np.isin(draws.column("op1"), list(GEOMETRIC)) & np.isin(draws.column("op2"), list(GEOMETRIC))
    chosen = np.flatnonzero(geometric.any(1))[:12]
    draws = draws.take(chosen)
    crops = ReferenceExecutor(plan).run([encoded(coordinates(width, height))] * len(chosen), draws)["s"]
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    shown = (crops.double().movedim(2, -1).numpy() * std + mean)[..., :2] * 255
    expected = told(draws, view, slice(0, 6))
    seen = 0
    for b, v in zip(*np.nonzero(geometric[chosen]), strict=True):
        inside = ((expected[b, v] > 6) & (expected[b, v] < (width - 7, height - 7))).all(-1)
        assert np.abs(shown[b, v] - expected[b, v])[inside].max(initial=0) < 0.5  # of which rounding has most
        x0, y0, x1, y1 = draws.window[b, v]
        source = expected[b, v][((expected[b, v] >= 0) & (expected[b, v] <= (width - 1, height - 1))).all(-1)]
        if len(source):
            assert ((source >= (x0, y0)) & (source <= (x1 - 1, y1 - 1))).all()
        seen += inside.sum() > 200
    assert seen >= 10
    assert {0.0, 1.0} == set(draws.column("flip").ravel().tolist())


@pytest.mark.parametrize("filter", ["bilinear", "bicubic"])
def test_nothing_outside_of_its_window_shows_in_a_crop(filter: str):
    view = View.model_validate(
        {"name": "s", "count": 4, "size": 24, "scale": (0.05, 0.6), "filter": filter, "weak_p": 0, "strong": PLACES}
    )
    plan = Plan([view])
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (90, 120, 3), dtype=np.uint8)
    statistics = [NUMBER[name] for name in ("AutoContrast", "Equalize", "Contrast")]
    draws = drawn(plan, 30, (120, 90), seed=2)
    executor, tight = ReferenceExecutor(plan), 0
    whole = executor.run([encoded(image)] * 30, draws)["s"]
    for b in range(30):
        for v in range(4):
            if np.isin(draws.params[b, v, [13, 15]], statistics).any():
                continue
            x0, y0, x1, y1 = draws.window[b, v]
            assert 0 <= x0 < x1 <= 120
            assert 0 <= y0 < y1 <= 90
            other = rng.integers(0, 256, (90, 120, 3), dtype=np.uint8)
            other[y0:y1, x0:x1] = image[y0:y1, x0:x1]
            part = executor.run([encoded(other)], draws.take([b]))["s"]
            assert torch.equal(part[0, v], whole[b, v])
            tight += (x1 - x0) * (y1 - y0) < 0.5 * 120 * 90
    assert tight > 20


def test_coins_alone_are_those_of_the_draws():
    """What training asks for, to know whose features may be remembered, is what the pixels were made by."""
    positions = np.arange(40, 40 + 300)
    sizes = np.full((300, 2), 64)
    for plan in (MUGS, always(), Plan([View(name="plain", size=32, count=2)])):
        strong = strong_crops(plan, 7, positions)
        assert strong.dtype == bool
        assert np.array_equal(strong, draw(plan, 7, positions, sizes).column("strong") > 0)
    strong = strong_crops(MUGS, 7, positions)
    assert not strong[:, TEACHER].any()
    assert np.array_equal(strong[:, 2], strong[:, 3])  # one coin an image
    assert 0.4 < strong[:, 2].mean() < 0.6
