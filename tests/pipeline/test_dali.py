"""DALI's pixels: those of the reference, the same bits in any company, and damage that is named."""

import io
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from gristmill.pipeline.augment import DecodeError
from gristmill.pipeline.augment.colour import MEAN, STD
from gristmill.pipeline.augment.dali import DaliExecutor
from gristmill.pipeline.augment.decode import Decoder
from gristmill.pipeline.augment.packed import SIGMA, pack
from gristmill.pipeline.augment.reference import ReferenceExecutor, blur, resize
from gristmill.pipeline.draws import Draws, Plan, draw
from gristmill.pipeline.views import View
from PIL import Image
from torchvision.transforms.v2 import functional

GLOBAL = View(name="global", count=2, size=48)
LOCAL = View.model_validate({"name": "local", "count": 4, "size": 24, "scale": (0.05, 0.25), "augment": "weak-local"})
PLAN = Plan([GLOBAL, LOCAL])
PLAIN = {"jitter_p": 0.0, "grey": 0.0}  # crops and flips alone
# Width, height, how it is stored: everyday sizes, slivers, subsampled and full chroma, all formats that are ingested.
KINDS: list[tuple[int, int, dict[str, Any]]] = [
    (64, 64, {"format": "JPEG", "quality": 92}),
    (200, 150, {"format": "JPEG", "quality": 90, "subsampling": 2}),
    (150, 200, {"format": "JPEG", "quality": 75, "subsampling": 0}),
    (97, 131, {"format": "JPEG", "quality": 85, "progressive": True}),
    (300, 17, {"format": "JPEG", "quality": 90}),
    (5, 3, {"format": "PNG"}),
    (1, 1, {"format": "PNG"}),
    (120, 90, {"format": "PNG"}),
    (120, 90, {"format": "WEBP", "quality": 90}),
]


def picture(width: int, height: int, seed: int) -> Image.Image:
    """Smooth colours with edges and some noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / max(width, height)
    waves = [
        np.sin(rng.uniform(2, 40, 2) @ np.stack([x, y]).reshape(2, -1) + i).reshape(height, width) for i in range(3)
    ]
    pixels = 128 + 80 * np.stack(waves, -1) + rng.normal(0, 8, (height, width, 3))
    pixels[(x - 0.4) ** 2 + (y - 0.3) ** 2 < 0.04] = rng.uniform(0, 255, 3)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def encode(image: Image.Image, **how: Any) -> np.ndarray:
    buffer = io.BytesIO()
    image.save(buffer, **how)
    return np.frombuffer(buffer.getvalue(), np.uint8)


def batch_of(count: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Encoded images of all kinds in turn, and their (width, height)."""
    chosen = [KINDS[i % len(KINDS)] for i in range(count)]
    data = [encode(picture(width, height, i), **how) for i, (width, height, how) in enumerate(chosen)]
    return data, np.array([(width, height) for width, height, _ in chosen], np.int32)


def some(draws: Draws, slots: list[int]) -> Draws:
    return Draws(draws.params[slots], draws.geometry[slots], draws.sizes[slots])


@pytest.fixture(scope="module")
def batch() -> tuple[list[np.ndarray], Draws]:
    data, sizes = batch_of(24)
    return data, draw(PLAN, 7, np.arange(24) + 1000, sizes)


@pytest.fixture(scope="module")
def executor() -> DaliExecutor:
    return DaliExecutor(PLAN, batch=24)


def in_levels(view: torch.Tensor) -> np.ndarray:
    """Normalised [B, n, 3, H, W] back to 0 ... 255, float64 [B, n, H, W, 3]."""
    return (view.double().movedim(2, -1).numpy() * STD + MEAN) * 255


def test_pixels_are_the_references(batch: tuple[list[np.ndarray], Draws], executor: DaliExecutor):
    """To 1/100 of a level of 255, where the reference computes in float64.

    Two exceptions: a value that is solarised on one side of the threshold and not on the other, and WebP, which two
    versions of libwebp may decode a level apart.
    """
    data, draws = batch
    ours, theirs = executor.run(data, draws), ReferenceExecutor(PLAN).run(data, draws)
    assert list(ours) == ["global", "local"]
    for view in PLAN.views:
        got = ours[view.name]
        assert got.shape == (24, view.count, 3, view.size, view.size)
        assert got.dtype == torch.float32
        assert got.is_contiguous()
        apart = np.abs(in_levels(got) - in_levels(theirs[view.name]))
        webp = np.array([KINDS[i % len(KINDS)][2]["format"] == "WEBP" for i in range(24)])
        near = np.abs(apart[~webp])
        assert (near > 0.01).mean() < 1e-5
        assert near.max() < 1.01
        assert apart[webp].mean() < 1.5
    assert (draws.column("solarize") < 256).any()
    assert (draws.column("sigma") > 0).any()


@pytest.mark.parametrize("view", ["global", "local"])
def test_what_ends_a_batch_ends_no_other(
    batch: tuple[list[np.ndarray], Draws], view: str, monkeypatch: pytest.MonkeyPatch
):
    """An error inside of one graph, while others were begun: the next batch is nobody else's."""
    data, draws = batch
    ours, wanted = (DaliExecutor(PLAN, batch=24) for _ in range(2))

    def broken(plan: Plan, given: Draws) -> np.ndarray:
        packed = pack(plan, given)
        packed[:, plan.columns[view], SIGMA] = 1e9
        return packed

    monkeypatch.setattr("gristmill.pipeline.augment.dali.pack", broken)
    with pytest.raises(ValueError, match=r"(?i)gaussian"):
        ours.run(data, draws)
    monkeypatch.undo()
    turned = list(range(23, -1, -1))
    found = ours.run([data[i] for i in turned], some(draws, turned))
    right = wanted.run([data[i] for i in turned], some(draws, turned))
    assert all(torch.equal(found[name], right[name]) for name in right)


def test_bits_do_not_depend_on_company(batch: tuple[list[np.ndarray], Draws], executor: DaliExecutor):
    data, draws = batch
    whole = executor.run(data, draws)
    rng = np.random.default_rng(0)
    for build, threads, count in [(24, 1, 24), (24, 3, 24), (24, 2, 7), (5, 1, 5), (1, 2, 1)]:
        other = DaliExecutor(PLAN, batch=build, threads=threads)
        for _ in range(2):
            slots = rng.choice(24, count, replace=False).tolist()
            part = other.run([data[i] for i in slots], some(draws, slots))
            for name, view in part.items():
                assert torch.equal(view, whole[name][slots]), (build, threads, count, name)


def test_tensors_outlive_later_runs(batch: tuple[list[np.ndarray], Draws], executor: DaliExecutor):
    data, draws = batch
    first = executor.run(data, draws)
    kept = {name: view.clone() for name, view in first.items()}
    for _ in range(4):
        executor.run(data[::-1], some(draws, list(range(23, -1, -1))))
    assert all(torch.equal(first[name], kept[name]) for name in first)


BROKEN: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "cut in half": lambda data: data[: len(data) // 2],
    "cut in the header": lambda data: data[:150],
    "empty": lambda data: data[:0],
    "a web page": lambda data: np.frombuffer(b"<html>404 not found</html>", np.uint8),
    "header overwritten": lambda data: np.concatenate([np.zeros(32, np.uint8), data[32:]]),
}


def assert_damage_is_named(executor, data: list[np.ndarray], draws: Draws, whole: dict[str, torch.Tensor], how: str):
    """Three images that do not decode are named by their slots; with sound ones in place the batch gives `whole`."""
    damaged = list(data)
    for slot in (0, 9, 23):
        damaged[slot] = BROKEN[how](data[1])
    for _ in range(2):
        with pytest.raises(DecodeError, match="slots 0, 9, 23") as caught:
            executor.run(damaged, draws)
        assert caught.value.bad == [0, 9, 23]
    for slot in (0, 9, 23):
        damaged[slot] = data[slot]
    again = executor.run(damaged, draws)
    assert all(torch.equal(again[name], whole[name]) for name in whole)


@pytest.mark.parametrize("how", BROKEN)
def test_images_that_do_not_decode_are_named_and_cost_the_others_nothing(
    batch: tuple[list[np.ndarray], Draws], executor: DaliExecutor, how: str
):
    data, draws = batch
    assert_damage_is_named(executor, data, draws, executor.run(data, draws), how)
    with pytest.raises(DecodeError) as caught:
        ReferenceExecutor(PLAN).run([BROKEN[how](data[1])], some(draws, [0]))
    assert caught.value.bad == [0]


def test_any_number_of_damaged_batches_can_follow_one_another():
    """DALI's own decoder corrupts memory here: with it the process dies within some five of these batches."""
    data = [encode(picture(64, 64, 0), format="JPEG")] * 64
    damaged = list(data)
    draws = draw(PLAN, 0, np.arange(64), np.full((64, 2), 64))
    executor = DaliExecutor(PLAN, batch=64, threads=2)
    whole = executor.run(data, draws)
    for time in range(30):
        damaged[time] = list(BROKEN.values())[time % len(BROKEN)](data[0])
        with pytest.raises(DecodeError) as caught:
            executor.run(damaged, draws)
        assert caught.value.bad == list(range(time + 1))
    again = executor.run(data, draws)
    assert all(torch.equal(again[name], whole[name]) for name in whole)


def test_a_size_that_was_noted_wrongly_is_damage_and_no_crash(batch: tuple[list[np.ndarray], Draws]):
    """A box outside of the image, in pixels, ends the process with a segmentation fault inside DALI 2.4."""
    data, _ = batch
    for executor in (DaliExecutor(PLAN, batch=2), ReferenceExecutor(PLAN)):
        for noted in [(4000, 4000), (150, 200), (1, 1), (200, 151)]:
            with pytest.raises(DecodeError) as caught:
                executor.run(data[:2], draw(PLAN, 0, np.arange(2), np.array([(64, 64), noted])))
            assert caught.value.bad == [1]


def test_a_batch_that_does_not_fit_is_refused(batch: tuple[list[np.ndarray], Draws]):
    data, draws = batch
    small = DaliExecutor(PLAN, batch=4)
    for images, some_draws in [(data[:5], some(draws, [0] * 5)), ([], some(draws, [])), (data[:2], some(draws, [0]))]:
        with pytest.raises(ValueError, match=r"the graph takes 1 \.\.\. 4"):
            small.run(images, some_draws)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_upright(orientation: int):
    image = picture(60, 40, 0)
    exif = Image.Exif()
    exif[0x0112] = orientation
    tagged = encode(image, format="JPEG", quality=95, subsampling=0, exif=exif)
    upright = (40, 60) if orientation > 4 else (60, 40)
    plan = Plan([View.model_validate({"name": "probe", "size": 40, "augment": "none"})])
    draws = draw(plan, 0, np.arange(1), np.array([upright]))
    ours = in_levels(DaliExecutor(plan, batch=1).run([tagged], draws)["probe"])
    theirs = in_levels(ReferenceExecutor(plan).run([tagged], draws)["probe"])
    assert np.abs(ours - theirs).max() < 0.01


def test_geometry_leads_from_crop_pixels_to_source_pixels():
    """Of an image whose red is x and whose green is y, a crop shows where each of its pixels comes from."""
    width, height = 210, 160
    y, x = np.mgrid[:height, :width]
    source = encode(Image.fromarray(np.stack([x, y, 0 * x], -1).astype(np.uint8)), format="PNG")
    views = [
        View.model_validate({"name": "global", "count": 4, "size": 50, "augment": PLAIN}),
        View.model_validate({"name": "local", "count": 8, "size": 31, "scale": (0.05, 0.2), "augment": PLAIN}),
    ]
    plan = Plan(views)
    draws = draw(plan, 3, np.arange(8), np.tile((width, height), (8, 1)))
    assert {0.0, 1.0} == set(draws.column("flip").ravel().tolist())
    crops = DaliExecutor(plan, batch=8).run([source] * 8, draws)
    for view in views:
        shown = in_levels(crops[view.name])[..., :2]
        grid = np.stack(np.meshgrid(np.arange(view.size), np.arange(view.size)), -1).astype(float)  # (x, y)
        maps = draws.geometry[:, plan.columns[view.name]].astype(float)
        told = np.einsum("bnij,yxj->bnyxi", maps[..., :2], grid) + maps[:, :, None, None, :, 2]
        # The filter repeats the outermost pixels: nearer to the image's edge than it is wide, a ramp ends. Everywhere,
        # a triangle that is sampled at whole pixels leans to one side, by less than a tenth of a pixel.
        inside = ((told > 5) & (told < (width - 6, height - 6))).all(-1)
        assert inside.mean() > 0.7
        assert np.abs(shown - told)[inside].max() < 0.1
        assert np.abs((shown - told)[inside].mean(0)).max() < 0.005


def test_the_references_steps_are_torchvisions():
    """Resizing away from the crop's edges, where torchvision sees no context, and blur everywhere."""
    image = np.asarray(picture(200, 150, 5), np.float64)
    planes = torch.from_numpy(image).movedim(-1, 0)
    for box, size in [((20, 10, 170, 140), 48), ((40, 50, 60, 75), 48), ((0, 0, 200, 150), 64)]:
        x0, y0, x1, y1 = box
        theirs = functional.resized_crop(planes, y0, x0, y1 - y0, x1 - x0, [size, size], antialias=True)
        edge = 2 if x1 - x0 > size else 4
        apart = (resize(image, box, size) - theirs.movedim(0, -1).numpy())[edge:-edge, edge:-edge]
        assert np.abs(apart).max() < 1e-3
    for sigma in (0.4, 1.0, 2.0):
        window = 2 * int(np.ceil(3 * sigma)) + 1
        theirs = functional.gaussian_blur(planes, [window, window], [sigma, sigma]).movedim(0, -1).numpy()
        assert np.abs(blur(image, sigma) - theirs).max() < 1e-3


def test_the_cpu_decoder_is_libjpegs():
    """The reference decodes with OpenCV, nvImageCodec with its own libjpeg-turbo: the same bits, upsampled chroma too."""
    data, _ = batch_of(len(KINDS))
    for (_, _, how), encoded, image in zip(KINDS, data, Decoder("cpu", None, 1).decode(data), strict=True):
        assert image is not None
        if how["format"] != "WEBP":
            libjpegs = cv2.imdecode(encoded, cv2.IMREAD_COLOR_RGB)
            assert libjpegs is not None
            assert np.array_equal(image, libjpegs)
