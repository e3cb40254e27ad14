"""InfoMin's augmentation: RandAugment whose operations do not grow with the magnitude, colours and blur beside it."""

import hashlib
import random
from collections import Counter
from typing import Any

import numpy as np
import pytest
from gristmill.pipeline.augment.cpu import CpuExecutor
from gristmill.pipeline.augment.reference import ReferenceExecutor
from gristmill.pipeline.draws import OPERATIONS, Draws, Plan, draw
from gristmill.pipeline.groups import GROUPS, named_views
from gristmill.pipeline.strong import NUMBER, arguments
from gristmill.pipeline.views import View
from PIL import Image
from scipy import stats
from timm.data.auto_augment import LEVEL_TO_ARG, rand_augment_transform

from .test_dali import batch_of, in_levels

COUNT = 12_000
UNLIKELY = 1e-6  # p-values below this mean that two distributions differ


def plan(size: int = 224) -> Plan:
    return Plan([View.model_validate({**view, "size": size}) for view in named_views("infomin")])


@pytest.fixture(scope="module")
def drawn() -> Draws:
    return draw(plan(), 1, np.arange(COUNT), np.tile(np.array((500, 375)), (COUNT, 1)))


@pytest.mark.parametrize(
    "name", ["Posterize", "Solarize", "SolarizeAdd", "Color", "Contrast", "Brightness", "Sharpness"]
)
def test_arguments_are_timms_without_inc(name: str):
    levels = np.linspace(0, 10, 1001)
    for negative in (False, True):
        mine = arguments(np.full(1001, NUMBER[name]), levels, np.full(1001, negative), False)
        assert mine.tolist() == pytest.approx(
            [LEVEL_TO_ARG[name](level, {})[0] for level in levels.tolist()], abs=1e-12
        )


def test_one_array_can_mix_both_kinds():
    operation, magnitude = np.full(4, NUMBER["Posterize"]), np.array([10.0, 10.0, 0.0, 0.0])
    kinds = np.array([True, False, True, False])
    assert arguments(operation, magnitude, np.zeros(4, bool), kinds).tolist() == [0, 4, 4, 0]
    factors = arguments(np.full(2, NUMBER["Color"]), np.array([10.0, 10.0]), np.ones(2, bool), kinds[:2])
    assert factors.tolist() == pytest.approx([0.1, 1.9])


def test_operations_and_arguments_are_distributed_as_timms(drawn: Draws):
    """rand-m10-mstd0.5-n2, timm's own, which PyContrast's is a copy of."""
    theirs: list[tuple[Any, ...]] = []
    augment = rand_augment_transform("rand-m10-mstd0.5-n2", {"img_mean": (124, 116, 104)})
    for op in augment.ops:
        op.aug_fn = lambda image, *given, name=op.name, **_: theirs.append((name, *map(float, given[:1]))) or image
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - timm's source of numbers
    for _ in range(COUNT):
        augment(Image.new("RGB", (2, 2)))
    pairs = [(drawn.column(f"op{slot}")[:, 0], drawn.column(f"arg{slot}")[:, 0]) for slot in (1, 2)]
    ours = [(OPERATIONS[int(op) - 1], arg) for ops, args in pairs for op, arg in zip(ops, args, strict=True) if op]
    counts = [Counter(step[0] for step in some) for some in (ours, theirs)]
    assert counts[0].keys() == counts[1].keys() == set(OPERATIONS)
    assert stats.chi2_contingency([[count[name] for name in OPERATIONS] for count in counts]).pvalue > UNLIKELY
    for name in OPERATIONS:
        mine, other = ([step[1] for step in some if step[0] == name and step[1:]] for some in (ours, theirs))
        if other:
            assert stats.ks_2samp(np.array(mine, np.float32), np.array(other, np.float32)).pvalue > UNLIKELY, name
    # At this magnitude nothing becomes black, as it would with operations that grow.
    assert min(arg for name, arg in ours if name == "Posterize") >= 3


def test_every_crop_is_strong_and_has_simclrs_colours(drawn: Draws):
    assert (drawn.column("strong") == 1).all()
    assert not drawn.column("erase_x1").any()
    assert (drawn.column("solarize") == 256).all()
    bound = 5 * np.sqrt(0.25 / COUNT / 2)
    for name, chance, off in (
        ("brightness", 0.8, 1),
        ("hue", 0.8, 0),
        ("grey", 0.2, 0),
        ("sigma", 0.5, 0),
        ("flip", 0.5, 0),
    ):
        assert abs((drawn.column(name) != off).mean() - chance) < bound, name
    assert np.abs(drawn.column("hue")).max() == pytest.approx(0.2, abs=1e-3)
    for name in ("brightness", "contrast", "saturation"):
        assert (drawn.column(name).min(), drawn.column(name).max()) == pytest.approx((0.2, 1.8), abs=1e-2)
    sigma = drawn.column("sigma")
    assert (sigma[sigma > 0].min(), sigma.max()) == pytest.approx((0.1, 2.0), abs=1e-2)


def test_the_stream_is_frozen(drawn: Draws):
    """A change of these numbers changes the crops of every run ever started with these views."""
    assert hashlib.blake2b(drawn.params[:64].tobytes(), digest_size=8).hexdigest() == "d2010d547973fa74"


def test_the_cpu_executor_carries_it_out_as_the_reference_does():
    """RandAugment with colours and blur behind it: what no other set of views asks for."""
    small, (data, sizes) = plan(48), batch_of(24)
    draws = draw(small, 5, np.arange(24), sizes)
    assert ((draws.column("op1") > 0) & (draws.column("sigma") > 0) & (draws.column("brightness") != 1)).any()
    ours, theirs = CpuExecutor(small).run(data, draws), ReferenceExecutor(small).run(data, draws)
    for name, view in ours.items():
        apart = np.abs(in_levels(view) - in_levels(theirs[name]))
        assert apart.max() < 0.01, name


@pytest.mark.parametrize("name", GROUPS)
def test_every_set_of_views_can_be_drawn(name: str):
    views = [View.model_validate(view) for view in named_views(name)]
    draws = draw(Plan(views), 0, np.arange(8), np.tile(np.array((640, 480)), (8, 1)))
    assert draws.params.shape[1] == sum(view.count for view in views)
    assert any(view.role != "student" for view in views)
    assert any(view.role != "teacher" for view in views)
