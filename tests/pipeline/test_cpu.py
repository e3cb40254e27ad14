"""The CPU executor: the reference's pixels, DALI's pixels, the same bits in any company, damage that is named."""

import sys
import threading

import numpy as np
import pytest
import torch
from gristmill.pipeline.augment import DecodeError, chosen
from gristmill.pipeline.augment.colour import MEAN, STD
from gristmill.pipeline.augment.cpu import CpuExecutor
from gristmill.pipeline.augment.dali import DaliExecutor
from gristmill.pipeline.augment.reference import ReferenceExecutor
from gristmill.pipeline.draws import Draws, Plan, draw
from gristmill.pipeline.loader import LoaderError
from gristmill.pipeline.views import StreamConfig, View
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from .pictures import CONFIG, N, assert_equal, collect, load, ours, part
from .test_dali import BROKEN, KINDS, assert_damage_is_named, batch_of, encode, in_levels, picture, some

GLOBAL = View(name="global", count=2, size=48)
LOCAL = View.model_validate({"name": "local", "count": 4, "size": 24, "scale": (0.05, 0.25), "augment": "weak-local"})
CUBIC = View.model_validate({"name": "cubic", "count": 2, "size": 37, "scale": (0.05, 1.0), "filter": "bicubic"})
PLAN = Plan([GLOBAL, LOCAL, CUBIC])


def drawn(plan: Plan, count: int = 24) -> tuple[list[np.ndarray], Draws]:
    data, sizes = batch_of(count)
    return data, draw(plan, 7, np.arange(count) + 1000, sizes)


@pytest.fixture(scope="module")
def batch() -> tuple[list[np.ndarray], Draws]:
    return drawn(PLAN)


@pytest.fixture(scope="module")
def executor() -> CpuExecutor:
    return CpuExecutor(PLAN)


@pytest.fixture(scope="module")
def whole(batch: tuple[list[np.ndarray], Draws], executor: CpuExecutor) -> dict[str, torch.Tensor]:
    return executor.run(*batch)


def test_pixels_are_the_references(
    batch: tuple[list[np.ndarray], Draws], whole: dict[str, torch.Tensor], executor: CpuExecutor
):
    """To 1/1000 of a level of 255, edges of box and image included: nothing is rounded but the result.

    One exception: a value that is solarised on one side of the threshold and not on the other, at most a level apart.
    """
    data, draws = batch
    theirs = ReferenceExecutor(PLAN).run(data, draws)
    assert list(whole) == ["global", "local", "cubic"]
    for view in PLAN.views:
        got = whole[view.name]
        assert got.shape == (24, view.count, 3, view.size, view.size)
        assert got.dtype == torch.float32
        assert got.is_contiguous()
        apart = np.abs(in_levels(got) - in_levels(theirs[view.name]))
        assert (apart > 1e-3).mean() < 1e-5
        assert apart.max() < 1.01
    for name, least in [("solarize", 256), ("flip", 1), ("grey", 1)]:
        assert (draws.column(name) < least).any()
    assert (draws.column("sigma") > 0).any()
    assert (draws.column("sigma") == 0).any()


def test_pixels_are_dalis():
    """To 1/100 of a level, DALI's own distance from the reference; WebP's decoders are two versions of libwebp."""
    plan = Plan([GLOBAL, LOCAL])
    data, draws = drawn(plan)
    ours, theirs = CpuExecutor(plan).run(data, draws), DaliExecutor(plan, batch=24).run(data, draws)
    webp = np.array([KINDS[i % len(KINDS)][2]["format"] == "WEBP" for i in range(24)])
    for name, view in ours.items():
        apart = np.abs(in_levels(view) - in_levels(theirs[name]))[~webp]
        assert (apart > 0.01).mean() < 1e-5
        assert apart.max() < 1.01


def test_bits_do_not_depend_on_company(batch: tuple[list[np.ndarray], Draws], whole: dict[str, torch.Tensor]):
    data, draws = batch
    executors = {threads: CpuExecutor(PLAN, threads=threads) for threads in (1, 2, 3)}

    @settings(max_examples=25, deadline=None)
    @given(st.lists(st.integers(0, 23), min_size=1, max_size=24), st.sampled_from([1, 2, 3]))
    def alike(slots: list[int], threads: int):
        views = executors[threads].run([data[i] for i in slots], some(draws, slots))
        for name, view in views.items():
            assert torch.equal(view, whole[name][slots]), (slots, threads, name)

    alike()
    for other in executors.values():
        other.close()


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_any_box_of_any_image_is_the_references(choice: st.DataObject):
    """Single pixels, slivers, boxes far smaller and far larger than the crop, both filters, wide blurs."""
    width, height = choice.draw(st.integers(1, 70), "width"), choice.draw(st.integers(1, 70), "height")
    size, filter = choice.draw(st.integers(1, 40), "size"), choice.draw(st.sampled_from(["bilinear", "bicubic"]))
    plan = Plan([View.model_validate({"name": "one", "size": size, "filter": filter})])
    draws = draw(plan, choice.draw(st.integers(0, 99), "seed"), np.arange(1), np.array([(width, height)]))
    x0, y0 = choice.draw(st.integers(0, width - 1), "x0"), choice.draw(st.integers(0, height - 1), "y0")
    x1, y1 = choice.draw(st.integers(x0 + 1, width), "x1"), choice.draw(st.integers(y0 + 1, height), "y1")
    draws.params[0, 0, :4] = x0, y0, x1, y1
    draws.params[0, 0, 10] = choice.draw(st.sampled_from([0.0, 0.1, 0.7, 2.0, 9.0]), "sigma")
    data = [encode(picture(width, height, 1), format="PNG")]
    mine, theirs = CpuExecutor(plan).run(data, draws)["one"], ReferenceExecutor(plan).run(data, draws)["one"]
    apart = np.abs(in_levels(mine) - in_levels(theirs))
    assert (apart > 2e-3).mean() < 1e-2
    assert apart.max() < 1.01


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_torchs_rounding(
    batch: tuple[list[np.ndarray], Draws], whole: dict[str, torch.Tensor], dtype: torch.dtype
):
    for name, view in CpuExecutor(PLAN, dtype=dtype, threads=2).run(*batch).items():
        assert view.dtype == dtype
        assert torch.equal(view.view(torch.int16), whole[name].to(dtype).view(torch.int16))


def test_small_numbers_round_to_halves_too():
    from gristmill.pipeline.augment.kernels import to_bfloat, to_half

    values = np.float32(2.0) ** np.linspace(-28, 15, 4001, dtype=np.float32)
    values = np.concatenate([values, -values, [0.0, 2**-24, 2**-25, 3 * 2**-26, 65504]]).astype(np.float32)
    for convert, dtype in [(to_half, torch.float16), (to_bfloat, torch.bfloat16)]:
        bits = np.empty(len(values), np.uint16)
        convert(values, bits)
        assert torch.equal(torch.from_numpy(bits.view(np.int16)), torch.from_numpy(values).to(dtype).view(torch.int16))


def test_bytes_are_the_levels(batch: tuple[list[np.ndarray], Draws], whole: dict[str, torch.Tensor]):
    for name, view in CpuExecutor(PLAN, dtype=torch.uint8).run(*batch).items():
        levels = view.double().movedim(2, -1).numpy()
        assert view.dtype == torch.uint8
        assert np.abs(levels - in_levels(whole[name])).max() < 0.501


@pytest.mark.parametrize("how", BROKEN)
@pytest.mark.parametrize("threads", [1, 3])
def test_images_that_do_not_decode_are_named_and_cost_the_others_nothing(
    batch: tuple[list[np.ndarray], Draws], whole: dict[str, torch.Tensor], how: str, threads: int
):
    data, draws = batch
    executor = CpuExecutor(PLAN, threads=threads)
    assert_damage_is_named(executor, data, draws, whole, how)
    executor.close()  # what was raised still leads to it


@pytest.mark.parametrize("noted", [(4000, 4000), (150, 200), (1, 1), (200, 151)])
def test_a_size_that_was_noted_wrongly_is_damage(executor: CpuExecutor, noted: tuple[int, int]):
    data, _ = batch_of(9)
    pair = [data[1], data[8]]  # a JPEG, and a WebP that the general decoder reads
    for slot, right in enumerate([(200, 150), (120, 90)]):
        sizes = np.array([(200, 150), (120, 90)])
        sizes[slot] = noted
        with pytest.raises(DecodeError) as caught:
            executor.run(pair, draw(PLAN, 0, np.arange(2), sizes))
        assert caught.value.bad == [slot], right


def test_a_batch_and_its_draws_belong_together(batch: tuple[list[np.ndarray], Draws], executor: CpuExecutor):
    data, draws = batch
    for images, some_draws in [([], some(draws, [])), (data[:2], some(draws, [0]))]:
        with pytest.raises(ValueError, match="give one for each"):
            executor.run(images, some_draws)
    with pytest.raises(ValueError, match="threads"):
        CpuExecutor(PLAN, threads=0)
    with pytest.raises(ValueError, match="dtype"):
        CpuExecutor(PLAN, dtype=torch.int32)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_upright(orientation: int):
    image = picture(60, 40, 0)
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif[0x010F] = "somebody's camera"
    upright = (40, 60) if orientation > 4 else (60, 40)
    plan = Plan([View.model_validate({"name": "probe", "size": 40, "augment": "none"})])
    draws = draw(plan, 0, np.arange(2), np.array([upright] * 2))
    data = [encode(image, format="JPEG", quality=95, exif=exif), encode(image, format="PNG", exif=exif)]
    mine, theirs = (kind(plan).run(data, draws)["probe"] for kind in (CpuExecutor, ReferenceExecutor))
    assert np.abs(in_levels(mine) - in_levels(theirs)).max() < 1e-3


def test_rare_kinds_of_jpeg_are_read_too():
    plan = Plan([View.model_validate({"name": "probe", "size": 40, "augment": "none"})])
    rgb = picture(60, 60, 3)
    plain = encode(rgb, format="JPEG", quality=90)
    data = [
        encode(rgb.convert("CMYK"), format="JPEG", quality=90),
        encode(rgb.convert("L"), format="JPEG", quality=90),
        np.concatenate([plain, np.full(300, 7, np.uint8)]),  # something behind its end
        encode(rgb.convert("L"), format="PNG"),
        encode(rgb.convert("P"), format="PNG"),
    ]
    draws = draw(plan, 0, np.arange(len(data)), np.array([(60, 60)] * len(data)))
    mine, theirs = (kind(plan).run(data, draws)["probe"] for kind in (CpuExecutor, ReferenceExecutor))
    assert np.abs(in_levels(mine) - in_levels(theirs)).max() < 1e-3


def test_views_outlive_later_batches_and_their_memory_comes_back(batch: tuple[list[np.ndarray], Draws]):
    data, draws = batch
    executor = CpuExecutor(PLAN, threads=2)
    first = executor.run(data, draws)
    kept = {name: view.clone() for name, view in first.items()}
    slices = {name: view[3] for name, view in first.items()}
    for _ in range(4):
        executor.run(data[::-1], some(draws, list(range(23, -1, -1))))
    assert all(torch.equal(first[name], kept[name]) for name in first)
    place = first["global"].data_ptr()
    del first
    seen = {executor.run(data[::-1], some(draws, list(range(23, -1, -1))))["global"].data_ptr() for _ in range(12)}
    assert place not in seen  # a slice of it is still alive
    assert all(torch.equal(slices[name], kept[name][3]) for name in kept)
    del slices
    seen |= {executor.run(data, draws)["global"].data_ptr() for _ in range(12)}
    assert place in seen
    assert len(seen) <= 3


def test_threads_end_with_the_executor(batch: tuple[list[np.ndarray], Draws]):
    executor = CpuExecutor(PLAN, threads=3)
    executor.run(*batch)
    assert any(thread.name.startswith("gristmill-cpu") for thread in threading.enumerate())
    del executor
    assert not any(thread.name.startswith("gristmill-cpu") for thread in threading.enumerate())


def test_the_loader_takes_it_where_there_is_no_gpu(manifest, quarantine):
    assert [chosen("auto", "gpu"), chosen("auto", "cpu"), chosen("dali", "cpu")] == ["dali", "cpu", "dali"]
    config = StreamConfig.model_validate(CONFIG.model_dump() | {"augment_threads": 2})
    whole = collect(load(manifest, quarantine, executor=None, batch=6, config=config), N // 6)
    again = collect(load(manifest, quarantine, executor=None, batch=8, start=8), 2)
    assert_equal(again, part(whole, 8, 24))
    assert not ours()
    dali = config.model_copy(update={"augment": "dali"})
    theirs = collect(load(manifest, quarantine, executor=None, batch=6, config=dali), 1)[2]["views.global"]
    assert (theirs - whole[2]["views.global"][:6]).abs().max() < 0.05


def test_a_gpu_that_is_not_there_is_named(manifest, quarantine, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(LoaderError, match="torch sees no GPU"):
        load(manifest, quarantine, executor=None, device="gpu")


@pytest.mark.gpu
def test_its_views_come_to_a_gpu_bit_for_bit(manifest, quarantine):
    own = CONFIG.model_copy(update={"augment": "cpu"})
    here = collect(load(manifest, quarantine, executor=None, batch=6, config=own), N // 6)
    there = load(manifest, quarantine, executor=None, batch=6, config=own, device="gpu")
    busy = torch.zeros(4096, 4096, device="cuda")
    found = []
    with there:
        for _ in range(N // 6):
            batch = next(there)
            assert all(view.is_cuda for view in batch.views.values())
            busy = busy @ busy  # what reads the views waits behind this, while the next batches are made
            found.append({name: view + busy[0, 0] for name, view in batch.views.items()})
            del batch
    for name in found[0]:
        assert torch.equal(torch.cat([views[name] for views in found]).cpu(), here[2][f"views.{name}"])


def test_importing_it_loads_no_dali():
    code = "import sys, gristmill.pipeline.augment.cpu; sys.exit(any(n.startswith('nvidia.dali') for n in sys.modules))"
    import subprocess

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_normalisation_is_imagenets():
    plan = Plan([View.model_validate({"name": "probe", "size": 4, "augment": "none"})])
    flat = encode(Image.new("RGB", (9, 9), (10, 128, 250)), format="PNG")
    view = CpuExecutor(plan).run([flat], draw(plan, 0, np.arange(1), np.array([(9, 9)])))["probe"]
    expected = (np.array([10, 128, 250]) / 255 - MEAN) / STD
    assert np.allclose(view[0, 0].numpy(), expected[:, None, None], atol=1e-6)
