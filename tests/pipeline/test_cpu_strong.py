"""The strong form on the CPU: RandAugment's operations to the bit on any rectangle, and whole crops as the reference's."""

import numpy as np
import pytest
import torch
from gristmill.pipeline.augment import operations
from gristmill.pipeline.augment.cpu import CpuExecutor
from gristmill.pipeline.augment.reference import ReferenceExecutor
from gristmill.pipeline.augment.strengthen import Strengthened
from gristmill.pipeline.draws import COLUMNS, OPERATIONS, Draws, Plan, draw
from gristmill.pipeline.views import View
from hypothesis import given, settings
from hypothesis import strategies as st

from .test_dali import batch_of, encode, in_levels, picture, some

STRONG = {"strong": "mugs", "weak_p": 0.3}
PLAN = Plan(
    [
        View.model_validate({"name": "global", "count": 2, "size": 48, "coin": "image", **STRONG}),
        View.model_validate({"name": "local", "count": 4, "size": 24, "scale": (0.05, 0.25), **STRONG}),
        View.model_validate({"name": "cubic", "count": 3, "size": 31, "filter": "bicubic", **STRONG}),
    ]
)


@pytest.fixture(scope="module")
def batch() -> tuple[list[np.ndarray], Draws]:
    data, sizes = batch_of(36)
    return data, draw(PLAN, 11, np.arange(36) + 500, sizes)


def test_pixels_are_the_references(batch: tuple[list[np.ndarray], Draws]):
    """To 1/1000 of a level, but where solarising falls on the other side; every operation occurs."""
    data, draws = batch
    used = {int(op) for name in ("op1", "op2") for op in draws.column(name).ravel()}
    assert used == set(range(len(OPERATIONS) + 1))
    assert (draws.column("erase_x1") > draws.column("erase_x0")).any()
    mine, theirs = CpuExecutor(PLAN).run(data, draws), ReferenceExecutor(PLAN).run(data, draws)
    for view in PLAN.views:
        apart = np.abs(in_levels(mine[view.name]) - in_levels(theirs[view.name]))
        assert (apart > 1e-3).mean() < 1e-4, view.name
        assert apart.max() < 1.01, view.name


def test_bits_do_not_depend_on_company(batch: tuple[list[np.ndarray], Draws]):
    data, draws = batch
    whole = CpuExecutor(PLAN).run(data, draws)
    executor = CpuExecutor(PLAN, threads=2)
    for slots in ([5], [35, 0, 7, 8], list(range(36))[::-1]):
        views = executor.run([data[i] for i in slots], some(draws, slots))
        assert all(torch.equal(views[name], whole[name][slots]) for name in whole)
    executor.close()


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_rectangle_after_any_two_operations(choice: st.DataObject):
    width, height = choice.draw(st.integers(1, 40), "width"), choice.draw(st.integers(1, 40), "height")
    image = np.array(picture(width, height, choice.draw(st.integers(0, 9), "image")))
    plan = Plan([View.model_validate({"name": "v", "size": 8, "strong": {"magnitude": 9, "erase": 0}, "weak_p": 0.0})])
    draws = draw(plan, choice.draw(st.integers(0, 10**6), "seed"), np.arange(1), np.array([(width, height)]))
    p = dict(zip(COLUMNS, draws.params[0, 0].tolist(), strict=True))
    chain = [(int(p["op1"]), p["arg1"]), (int(p["op2"]), p["arg2"])]
    warp = draws.warp[0, 0]
    whole = operations.strengthened(image, (chain[0][0], chain[1][0]), (chain[0][1], chain[1][1]), warp)
    x0, y0 = choice.draw(st.integers(0, width - 1), "x0"), choice.draw(st.integers(0, height - 1), "y0")
    x1, y1 = choice.draw(st.integers(x0 + 1, width), "x1"), choice.draw(st.integers(y0 + 1, height), "y1")
    assert np.array_equal(Strengthened(image).part(chain, warp, (x0, y0, x1, y1)).image(), whole[y0:y1, x0:x1])


def test_noise_is_not_for_bytes():
    with pytest.raises(ValueError, match="uint8"):
        CpuExecutor(PLAN, dtype=torch.uint8)
    half = CpuExecutor(PLAN, dtype=torch.float16)
    data = [encode(picture(64, 64, 0), format="JPEG")]
    draws = draw(PLAN, 1, np.arange(1), np.array([(64, 64)]))
    wide = CpuExecutor(PLAN).run(data, draws)
    assert all(torch.equal(view, wide[name].half()) for name, view in half.run(data, draws).items())
