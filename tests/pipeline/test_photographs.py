"""Operations and executors on real photographs, 500 x 375 tiles of Debian's wallpapers: docs/views.md has the distances.

Tests beside this one use drawn pictures, which every machine has; photographs have other histograms, noise and edges.
"""

import io
from functools import cache

import numpy as np
import pytest
from gristmill.ops.bench.photographs import SOURCES, PhotographsError, find_pictures, load_upright
from gristmill.pipeline.augment.cpu import CpuExecutor
from gristmill.pipeline.augment.dali import DaliExecutor
from gristmill.pipeline.augment.operations import apply
from gristmill.pipeline.augment.reference import ReferenceExecutor
from gristmill.pipeline.draws import OPERATIONS, Draws, Plan, draw
from gristmill.pipeline.strong import GEOMETRIC, NUMBER
from gristmill.pipeline.views import View
from PIL import Image

from .test_dali import in_levels
from .test_dali_strong import with_operations
from .test_operations import CASES, ours, timms

# Boats, leaves, a plant, a pier, a wood, planks; most of the other wallpapers are artwork.
NAMES = ("EveningGlow", "FallenLeaf", "OneStandsOut", "ColdRipple", "Path", "BytheWater")
SIZE = (500, 375)
PLAN = Plan(
    [
        View.model_validate({"name": "global", "size": 96, "scale": (0.25, 1), "strong": "mugs", "weak_p": 0.5}),
        View.model_validate(
            {"name": "cubic", "size": 96, "scale": (0.05, 0.25), "filter": "bicubic", "strong": "mugs"}
        ),
    ]
)
# Mean distance of DALI's crops from the reference's over all photographs, levels of 255: at most so much.
APART = {"Color": 0.3, "Sharpness": 0.6, "Equalize": 8.0}
PIXELS, MOVED, TURNED = 0.1, 1.0, 2.6
TURNS = 5  # each photograph so often: two crops each are 60, four for each operation


@cache
def photographs() -> tuple[bytes, ...]:
    """One JPEG of each photograph; skips the test where they are not installed."""
    try:
        found = find_pictures([path for path in SOURCES if path.is_dir()])
    except PhotographsError:
        found = {}
    if not set(NAMES) <= set(found):
        pytest.skip("needs wallpapers: `make system` installs it")
    encoded = []
    for name in NAMES:
        picture = load_upright(found[name])
        small = picture.resize((1000, round(1000 * picture.height / picture.width)), Image.Resampling.LANCZOS)
        left, top = (small.width - SIZE[0]) // 2, (small.height - SIZE[1]) // 2
        buffer = io.BytesIO()
        small.crop((left, top, left + SIZE[0], top + SIZE[1])).save(buffer, "JPEG", quality=90)
        encoded.append(buffer.getvalue())
    return tuple(encoded)


def decoded() -> list[np.ndarray]:
    return [np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for data in photographs()]


@pytest.fixture(scope="module")
def batch() -> tuple[list[np.ndarray], Draws]:
    data = [np.frombuffer(jpeg, np.uint8) for jpeg in photographs()] * TURNS
    return data, draw(PLAN, 11, np.arange(len(data)), np.full((len(data), 2), SIZE))


def every(draws: Draws) -> np.ndarray:
    """An operation for each crop, [B, V], all of them equally often, on all photographs."""
    images, crops = draws.params.shape[:2]
    return np.arange(images * crops).reshape(images, crops) % len(OPERATIONS) + 1


def distances(executor: CpuExecutor | DaliExecutor, data: list[np.ndarray], draws: Draws) -> np.ndarray:
    """Mean distance of each crop from the reference, levels of 255: [B, V]."""
    ours, theirs = executor.run(data, draws), ReferenceExecutor(PLAN).run(data, draws)
    apart = [np.abs(in_levels(ours[name]) - in_levels(theirs[name])).mean((2, 3, 4)) for name in ours]
    return np.concatenate(apart, 1)


def test_operations_are_pils():
    """On pixels bit for bit; on places within a level of PIL's bilinear, which truncates."""
    for image in decoded()[::2]:
        for name, argument in CASES:
            expected = timms(image, name, argument, Image.Resampling.BILINEAR)
            if NUMBER[name] in GEOMETRIC:
                assert set(np.unique(ours(image, (name, argument)) - expected.astype(float))) <= {0.0, 1.0}, name
            else:
                assert np.array_equal(apply(NUMBER[name], argument, image), expected), name


def test_the_cpu_executor_is_the_reference(batch: tuple[list[np.ndarray], Draws]):
    """Weak and strong crops as they are drawn, both filters; and every operation first or second."""
    data, draws = batch
    executor = CpuExecutor(PLAN)
    assert 0 < (draws.column("strong") > 0).mean() < 1
    assert distances(executor, data, draws).max() < 1e-3
    first = every(draws)
    assert distances(executor, data, with_operations(draws, first, np.roll(first, 7))).max() < 1e-3


def test_dali_is_as_near_as_the_docs_say(batch: tuple[list[np.ndarray], Draws]):
    data, draws = batch
    executor = DaliExecutor(PLAN, batch=len(data))
    weak = draws.column("strong") == 0
    assert distances(executor, data, draws)[weak].max() < 0.02
    numbers = every(draws)
    apart = distances(executor, data, with_operations(draws, numbers, np.zeros_like(numbers)))
    for name in OPERATIONS:
        own = apart[numbers == NUMBER[name]]
        kind = MOVED if name.startswith("Translate") else TURNED if NUMBER[name] in GEOMETRIC else PIXELS
        print(f"{name}: mean {own.mean():.3f}, worst crop {own.max():.3f}")
        assert own.mean() < APART.get(name, kind), name
