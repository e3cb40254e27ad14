"""DALI's strong and bicubic crops against the reference: each operation alone, all pairs, erasing, any size of image.

Distances are in levels of 255. What only touches pixels is the reference's to rounding, but for Equalize; what turns or
bends the image is interpolated at the crop's scale instead of the source's (docs/views.md).
"""

import numpy as np
import pytest
import torch
from gristmill.pipeline.augment.dali import DaliExecutor
from gristmill.pipeline.augment.reference import ReferenceExecutor
from gristmill.pipeline.draws import COLUMNS, OPERATIONS, Draws, Plan, draw
from gristmill.pipeline.strong import GEOMETRIC, NUMBER, arguments
from gristmill.pipeline.views import View
from hypothesis import given, settings
from hypothesis import strategies as st

from .test_dali import encode, in_levels, picture, some
from .textures import jpegs, textures

PLAN = Plan(
    [
        View.model_validate({"name": "square", "count": 2, "size": 48, "strong": "mugs", "weak_p": 0.3}),
        View.model_validate(
            {"name": "cubic", "count": 2, "size": 33, "scale": (0.05, 1), "filter": "bicubic", "weak_p": 0.3}
            | {"strong": {"jitter_p": 0.5, "blur": 0.2, "solarize": 0.2, "erase_noise": "normalised"}}
        ),
    ]
)
BATCH = 60
AT = {name: COLUMNS.index(name) for name in ("op1", "arg1", "op2", "arg2", "erase_x0", "strong")}
STRETCHED = ("AutoContrast", "Contrast")
# Mean and largest distance of each operation alone; the rest is within 0.1 and 0.6.
APART = {"Color": (0.4, 1.6), "Sharpness": (0.7, 10), "Equalize": (5, 9)}
MOVED, TURNED = (1.5, 50), (5.5, 80)


@pytest.fixture(scope="module")
def executor() -> DaliExecutor:
    return DaliExecutor(PLAN, batch=BATCH)


@pytest.fixture(scope="module")
def batch() -> tuple[list[np.ndarray], Draws]:
    data = [np.frombuffer(jpeg, np.uint8) for jpeg in jpegs()] * (BATCH // 4)
    sizes = np.array([image.shape[1::-1] for image in textures()] * (BATCH // 4))
    return data, draw(PLAN, 3, np.arange(BATCH), sizes)


def plain(draws: Draws) -> Draws:
    """The same boxes and flips, nothing else."""
    params = draws.params.copy()
    params[..., 5:] = 0
    params[..., 5:8] = 1
    params[..., COLUMNS.index("solarize")] = 256
    return Draws(params, draws.geometry, draws.sizes)


def with_operations(draws: Draws, first: np.ndarray, second: np.ndarray, seed: int = 0) -> Draws:
    """Every crop does these operations [B, V], with arguments as they would be drawn."""
    draws, rng = plain(draws), np.random.default_rng(seed)
    draws.params[..., AT["strong"]] = 1
    for slot, operation in (("1", first), ("2", second)):
        magnitude, negative = rng.uniform(7, 10, operation.shape), rng.random(operation.shape) < 0.5
        draws.params[..., AT[f"op{slot}"]] = operation
        draws.params[..., AT[f"arg{slot}"]] = arguments(operation, magnitude, negative)
    return draws


def distances(executor: DaliExecutor, data: list[np.ndarray], draws: Draws) -> np.ndarray:
    """Mean and largest distance of each crop from the reference: [B, V, 2]."""
    ours, theirs = executor.run(data, draws), ReferenceExecutor(PLAN).run(data, draws)
    apart = [np.abs(in_levels(ours[name]) - in_levels(theirs[name])) for name in ours]
    return np.concatenate([np.stack([a.mean((2, 3, 4)), a.max((2, 3, 4))], -1) for a in apart], 1)


@pytest.mark.parametrize("name", OPERATIONS)
def test_each_operation_is_the_references(executor: DaliExecutor, batch: tuple[list[np.ndarray], Draws], name: str):
    data, draws = batch[0][:12], some(batch[1], list(range(12)))
    numbers, none = np.full((12, 4), NUMBER[name]), np.zeros((12, 4), int)
    for operations in ((numbers, none), (none, numbers)):
        apart = distances(executor, data, with_operations(draws, *operations))
        expected = APART.get(name, (0.1, 0.6))
        if name in ("TranslateXRel", "TranslateYRel"):
            expected = MOVED
        elif NUMBER[name] in GEOMETRIC:
            expected = TURNED
            assert apart[..., 0].mean() < 2.6
        assert apart[..., 0].max() < expected[0]
        assert apart[..., 1].max() < expected[1]


def test_all_pairs_are_the_references(executor: DaliExecutor, batch: tuple[list[np.ndarray], Draws]):
    """By kind: pixels alone; pixels, then places; places, then pixels; and what needs statistics of a warped image."""
    data, draws = batch
    pairs = np.array([(first, second) for first in range(1, 16) for second in range(1, 16)] + [(0, 0)] * 15)
    first, second = pairs.T.reshape(2, BATCH, 4)
    apart = distances(executor, data, with_operations(draws, first, second))[..., 0].reshape(-1)
    places = np.isin(pairs, list(GEOMETRIC))
    equalized = (pairs == NUMBER["Equalize"]).any(-1)
    of_warped = places[:, 0] & np.isin(pairs[:, 1], [NUMBER[name] for name in (*STRETCHED, "Equalize")])
    pixels = ~places.any(-1)
    assert apart[pairs[:, 0] == 0].max() < 0.01
    assert apart[pixels & ~equalized].max() < 5
    assert np.median(apart[pixels & ~equalized]) < 0.1
    assert np.median(apart[pixels & equalized]) < 5
    assert np.mean(apart[places.any(-1) & ~of_warped & ~equalized]) < 3
    assert np.median(apart[of_warped]) < 16


def test_all_that_is_drawn_together(executor: DaliExecutor, batch: tuple[list[np.ndarray], Draws]):
    """Colours, blur, solarising and noise after operations; weak crops and those that only got noise are exact."""
    data, draws = batch
    apart = distances(executor, data, draws)
    exact = (draws.column("op1") == 0) & (draws.column("op2") == 0)
    strong = draws.column("strong") > 0
    assert (strong & exact & (draws.column("erase_x1") > 0)).any()
    assert (~strong).any()
    assert apart[exact][:, 0].max() < 0.01
    assert (apart[exact][:, 1] > 0.1).mean() < 0.05  # solarised on one side of the threshold and not on the other
    assert apart[..., 0].mean() < 1.2


def test_bicubic_is_the_references(executor: DaliExecutor, batch: tuple[list[np.ndarray], Draws]):
    """To 1/20 of a level at the worst pixel: DALI tabulates nothing, but sums in float32."""
    data, draws = batch
    apart = distances(executor, data[:12], plain(some(draws, list(range(12)))))
    assert apart[:, 2:, 1].max() < 0.05
    assert apart[:, :2, 1].max() < 0.01


def test_noise_is_the_tiles_to_the_last_digits(executor: DaliExecutor, batch: tuple[list[np.ndarray], Draws]):
    data, draws = batch[0][:8], plain(some(batch[1], list(range(8))))
    draws.params[..., AT["strong"]] = 1
    draws.params[..., AT["erase_x0"] : AT["erase_x0"] + 6] = 3, 5, 21, 12, 100, 471
    ours, theirs = executor.run(data, draws), ReferenceExecutor(PLAN).run(data, draws)
    for name, view in ours.items():
        assert (view[..., 5:12, 3:21] - theirs[name][..., 5:12, 3:21]).abs().max() < 1e-5
        assert (view - theirs[name]).abs().max() < 1e-3
    assert ours["square"][..., 5:12, 3:21].std() > 4 * ours["cubic"][..., 5:12, 3:21].std()  # raw, and normalised


def test_bits_do_not_depend_on_company(executor: DaliExecutor, batch: tuple[list[np.ndarray], Draws]):
    data, draws = batch
    whole = executor.run(data, draws)
    other = DaliExecutor(PLAN, batch=17, threads=3)
    rng = np.random.default_rng(0)
    for slots in ([5], [59, 0, 7, 8], rng.choice(BATCH, 17, replace=False).tolist()):
        for one in (executor, other):
            part = one.run([data[i] for i in slots], some(draws, slots))
            assert all(torch.equal(part[name], whole[name][slots]) for name in whole)


def test_half_precision_is_rounding(batch: tuple[list[np.ndarray], Draws]):
    data, sizes = batch[0][:4], batch[1].sizes[:4]
    plan = Plan([View.model_validate({"name": "square", "count": 2, "size": 48})])
    draws, kinds = draw(plan, 0, np.arange(4), sizes), (torch.float16, torch.float32)
    views = [DaliExecutor(plan, batch=4, dtype=kind).run(data, draws)["square"] for kind in kinds]
    assert views[0].dtype == torch.float16
    apart = (views[0].double() - views[1].double()).abs()  # a unit in the last place: DALI rounds in its own way
    assert (apart <= 2.0**-10 * views[1].abs() + 2.0**-14).all()
    with pytest.raises(ValueError, match="bfloat16"):
        DaliExecutor(plan, batch=4, dtype=torch.bfloat16)


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_any_image_after_any_two_operations(executor: DaliExecutor, choice: st.DataObject):
    """Slivers and single pixels, all of the crop moved out of the image: nothing ends the process or is left undone."""
    count, seed = 8, choice.draw(st.integers(0, 10**6), "seed")
    rng = np.random.default_rng(seed)
    sizes = np.array([(choice.draw(st.integers(1, 40)), choice.draw(st.integers(1, 40))) for _ in range(count)])
    data = [encode(picture(w, h, int(rng.integers(99))), format="PNG") for w, h in sizes.tolist()]
    first, second = rng.integers(0, 16, (2, count, 4))
    draws = with_operations(draw(PLAN, seed, np.arange(count), sizes), first, second, seed)
    apart = distances(executor, data, draws)[..., 0]
    operations = draws.params[..., [AT["op1"], AT["op2"]]]
    calm = ~np.isin(operations, [*GEOMETRIC, NUMBER["Equalize"], NUMBER["Sharpness"]]).any(-1)
    assert np.isfinite(apart).all()
    assert not calm.any() or np.median(apart[calm]) < 1
    assert apart[(operations == 0).all(-1)].sum() < 0.1
