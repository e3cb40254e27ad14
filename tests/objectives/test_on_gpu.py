"""On a GPU: objectives, the official step, draws, clustering and balance as on the CPU; no waits, and little memory."""

import copy
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from gristmill.models.heads import WeightNormLinear
from gristmill.models.student import Student
from gristmill.models.teacher import make_teacher
from gristmill.objectives import Dims, StepInfo, build_objectives, info_nce
from gristmill.objectives.bernoulli import keyed, uniform_block
from gristmill.objectives.contrast import info_nce_reference
from gristmill.objectives.kmeans import BLOCK, Share, kmeans, nearest
from gristmill.objectives.mixture import KINDS
from gristmill.objectives.prototypes import group_cross_entropy_reference, streamed_cross_entropy
from gristmill.objectives.sinkhorn import sinkhorn_offsets
from gristmill.ops.inputs import Inputs
from gristmill.ops.recipe import load_recipe
from gristmill.pipeline import philox
from torch import Tensor
from torch.nn.functional import normalize

from .on_gpu import (
    CASES,
    FORMS,
    GLOBALS,
    STEPS,
    Form,
    built,
    features,
    near,
    outputs,
    queue_scores,
    step_of,
    whole_products,
)
from .test_official_step import CONFIG, NAMES, OPTIMIZER, Ours, plain_of, same_state
from .test_official_step import near as close

DTYPES = [torch.float32, torch.float64]


@pytest.fixture
def device() -> Iterator[torch.device]:
    with whole_products():
        yield torch.device("cuda")


# Every objective of the registry.


def test_forms_are_of_the_registry() -> None:
    assert FORMS.keys() <= KINDS.keys()
    assert {name for name, _ in CASES} == KINDS.keys()


class Side:
    """An objective on one device, led through the same steps as the one on the other."""

    def __init__(self, name: str, form: Form, dtype: torch.dtype, device: torch.device) -> None:
        self.name, self.form, self.dtype, self.device = name, form, dtype, device
        self.mixture = built(name, form.config, 0, dtype, device)

    def reloaded(self) -> None:
        """Begin anew, and take over what was kept, as files give it: on the host."""
        kept = {key: tensor.cpu() for key, tensor in self.mixture.state().items()}
        self.mixture = built(self.name, self.form.config, 0, self.dtype, self.device)
        self.mixture.load(kept)

    def step(self, number: int, scores: dict[str, Tensor]) -> dict[str, Any]:
        """Everything that a step gives, by name."""
        info = step_of(number, self.form.step)
        student, teacher = (
            {key: rows.to(self.device) for key, rows in side.items()} for side in outputs(number, info, self.dtype)
        )
        leaves = {key: rows.requires_grad_() for key, rows in student.items()}
        student |= {key: rows.to(self.device) for key, rows in scores.items()}
        assert info.weak is not None
        info = step_of(number, {**self.form.step, "weak": info.weak.to(self.device)})
        for name in self.mixture.stale(info):
            self.mixture.refresh(name, features(self.dtype).to(self.device), info)
        if hasattr(self.mixture.objectives[self.name], "aims"):
            teacher |= self.mixture.aims(teacher, info)
        outcome = self.mixture.loss(student, teacher, info)
        outcome.loss.backward()
        finite = outcome.finite()
        assert finite.device.type == self.device.type
        self.mixture.commit(outcome)
        return {
            "loss": outcome.loss.detach(),
            "finite": finite,
            "gradient": {key: rows.grad for key, rows in leaves.items() if rows.grad is not None},
            "log": outcome.logs,
            "commit": outcome.commit,
            "refit": self.mixture.refit(step_of(number + 1, self.form.step)),
            "state": self.mixture.state(),
            "context": self.mixture.context() | self.mixture.teacher_context(),
        }


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "how"), CASES)
def test_an_objective_is_what_it_is_on_the_cpu(name: str, how: str, dtype: torch.dtype, device: torch.device) -> None:
    """Losses, every gradient, logs, what is committed, clustered and kept; also after a state was loaded."""
    here, there = (Side(name, CASES[name, how], dtype, torch.device(kind)) for kind in ("cpu", device))
    for key, wanted in here.mixture.state().items():
        # Drawn once for all devices.
        torch.testing.assert_close(there.mixture.state()[key].cpu(), wanted, rtol=0, atol=0, equal_nan=True, msg=key)
    moved = 0.0
    for number in range(STEPS):
        if number == STEPS - 2:
            there.reloaded()
        scores = queue_scores(here.mixture.context(), name)
        wanted, found = (side.step(number, scores) for side in (here, there))
        near(
            found["loss"], wanted["loss"], (number, "loss"), 0.01
        )  # a mean of terms of either sign may be as good as 0
        assert bool(found["finite"]) == bool(wanted["finite"]) is True
        for part in ("gradient", "log", "commit", "refit", "state", "context"):
            assert found[part].keys() == wanted[part].keys(), (number, part)
            least = 1.0 if part in ("log", "refit") else 0.0  # of small scalars rounding is no small share
            for key, value in wanted[part].items():
                near(found[part][key], value, (number, part, key), least, dtype)
        moved += sum(float(gradient.abs().sum()) for gradient in found["gradient"].values())
    assert moved > 0


# The official step.


@pytest.mark.gpu
@pytest.mark.parametrize("streams", [False, True])
def test_the_official_step_is_the_plain_one(streams: bool, device: torch.device) -> None:
    """Ours on the device, the plain one on the host, float64: losses, gradients, weights, memories, queues."""
    small = {"image_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "heads": 2, "linear_std": 0.1}
    mine = Ours(CONFIG.model_copy(update=small), torch.float64, streams)
    plain = plain_of(mine)
    mine.student.to(device)
    mine.teacher.to(device)
    parts: dict[str, Any] = mine.mixture.objectives
    kept, configs = mine.mixture.state(), {name: one.config for name, one in parts.items()}
    mine.mixture = build_objectives(configs, dims=Dims(24, 16, 16, 64), seed=1, dtype=torch.float64, device=device)
    mine.mixture.load(kept)
    generator = torch.Generator().manual_seed(0)
    for number in range(3):
        crops = [torch.randn(3, 3, s, s, generator=generator, dtype=torch.float64) for s in (32, 32, 32, 32, 16, 16)]
        weak, rates = torch.rand(3, generator=generator) < 0.5, mine.rates()
        wanted = plain.step(
            crops[:2], crops[2:], weak, lr=rates["lr"], wd=rates["wd"], m=rates["m"], temperature=0.04,
            clip=OPTIMIZER.clip, held=rates["held"],
        )  # fmt: skip
        crops = [crop.to(device) for crop in crops]
        found = mine.step(crops[:2], crops[2:], weak.to(device))
        for name in NAMES:
            close(found["losses"][name].cpu(), wanted["losses"][name], 1e-9, (number, name))
        for kind in ("raw", "clipped"):
            largest = max(float(g.abs().max()) for g in wanted[kind].values())
            for name, gradient in wanted[kind].items():
                gap = float((found[kind][name].cpu() - gradient).abs().max())
                assert gap <= 1e-9 * largest, (number, kind, name)
        kept = {key: tensor.cpu() for key, tensor in mine.mixture.state().items()}
        networks = {who: copy.deepcopy(getattr(mine, who)).cpu() for who in ("student", "teacher")}
        on_host: Any = SimpleNamespace(**networks, mixture=SimpleNamespace(state=lambda kept=kept: kept))
        same_state(on_host, plain, 1e-7)


# What is drawn, and what decides by the smallest difference.


@pytest.mark.gpu
def test_numbers_are_drawn_alike(device: torch.device) -> None:
    """Philox in tensor operations gives the host's numbers, bit for bit, at the ends of its words, too."""
    positions = torch.tensor([0, 1, 2**31, 2**32 - 1, 2**32, 2**40 + 7])
    for key in (0, keyed(3, "hierarchy/64"), 2**64 - 1):
        found = uniform_block(key, positions.to(device), [0, 5, 2**32 - 1], 8, 70).cpu()
        for place, stream in enumerate((0, 5, 2**32 - 1)):
            words = np.stack([philox.words(key, int(at), stream, 70) for at in positions])[:, 8:]
            assert torch.equal(found[place], torch.from_numpy((words >> 8).astype(np.float32)) * 2.0**-24)


@pytest.mark.gpu
def test_steps_are_fed_the_same_draws(device: torch.device) -> None:
    """Stochastic depth, masks, shuffles and weak flags hang on seed and position, not on the device."""
    small = ["batch=8", "student.patch_size=8", "student.image_size=32"]
    sizes = ["views.teacher.size=32", "views.global.size=32", "views.local.size=16"]
    mugs = load_recipe("demo", ["views=mugs", *small, *sizes])
    ibot = load_recipe("demo", [*small, "objectives.patch={}", "objectives.add=sum"])
    moco = load_recipe("moco-v2-r50-200", ["batch=64"])
    for recipe in (mugs, ibot, moco):
        here, there = (Inputs(recipe, 0, 1, kind) for kind in ("cpu", device))
        asked = [(made.info(64, 0.5), made) for made in (here, there)]
        drawn = [
            {"weak": info.weak, "masks": info.masks} | made.masked(info) | made.shuffled(64) | made.draws(64, 0, 4)
            for info, made in asked
        ]
        assert drawn[0].keys() == drawn[1].keys()
        for key, wanted in drawn[0].items():
            found = drawn[1][key]
            assert (found is None) == (wanted is None), key
            if wanted is not None and found is not None:
                assert torch.equal(found.cpu(), wanted), key
        assert any(value is not None for value in drawn[0].values())


@pytest.mark.gpu
@pytest.mark.parametrize("spherical", [False, True])
def test_clusters_are_the_cpus_and_the_same_bits_again(spherical: bool, device: torch.device) -> None:
    """Float64 against the CPU; float32 against itself, also where the rows are shared among ranks."""
    rows = normalize(torch.randn(3 * BLOCK + 100, 40, generator=torch.Generator().manual_seed(0)).double(), dim=1)
    how: dict[str, Any] = {"seed": 3, "niter": 8, "nredo": 2, "spherical": spherical}
    wanted, found = kmeans(rows, 50, **how), kmeans(rows.to(device), 50, **how)
    assert torch.equal(found.assignment.cpu(), wanted.assignment)
    near(found.centroids, wanted.centroids, "centroids")
    near(found.objective, wanted.objective, "objective", dtype=torch.float64)
    assert torch.equal(found.reseeded, wanted.reseeded)
    low = rows.float().to(device)
    first, second = (kmeans(low, 50, **how) for _ in range(2))
    assert first.objective == second.objective
    for one, other in ((first.centroids, second.centroids), (first.assignment, second.assignment)):
        assert torch.equal(one, other)
    for world in (2, 3):
        parts: list[Tensor] = []

        def taken(mine: Tensor, parts: list[Tensor] = parts) -> Tensor:
            parts.append(mine)
            return mine

        for rank in range(world):
            nearest(low, first.centroids, spherical=spherical, share=Share(taken, rank, world))
        assert torch.equal(torch.cat(parts)[: len(low)], first.assignment)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_balance_is_the_cpus(dtype: torch.dtype, device: torch.device) -> None:
    draws = torch.Generator().manual_seed(0)
    logits = torch.rand(2, 64, 1000, generator=draws, dtype=torch.float64).to(dtype) * 2 - 1
    for virtual in (None, 16):
        wanted, found = (sinkhorn_offsets(x, 0.05, virtual=virtual) for x in (logits, logits.to(device)))
        near(found, wanted, virtual)


# Waits and memory.


@contextmanager
def no_wait() -> Iterator[None]:
    """Inside, whatever makes the host wait for the device is an error."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.gpu
@pytest.mark.parametrize("low", [False, True], ids=["fp32", "autocast"])
@pytest.mark.parametrize("streams", [False, True], ids=["logits", "streamed"])
def test_a_step_never_waits_for_the_device(streams: bool, low: bool, device: torch.device) -> None:
    """Forwards, losses, backward and commit of a Mugs step; without weak flags, whose number is asked for."""
    small = {"image_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "heads": 2, "drop_path": 0.1}
    student = Student(CONFIG.model_copy(update=small)).to(device)
    teacher = make_teacher(student)
    configs = {name: CASES[name, how].config for name, how in zip(NAMES, ("mugs", "plain", "mugs"), strict=True)}
    mixture = build_objectives(configs, dims=Dims(24, 16, 16, 64), seed=0, device=device)
    draws = torch.Generator().manual_seed(0)
    crops = [torch.randn(n * 4, 3, side, side, generator=draws).to(device) for n, side in ((2, 32), (3, 16))]
    depth = {"drop_path.draws": torch.rand(5 * 4, 4, generator=draws).to(device)}
    info = StepInfo(batch=4, student_crops=5, student_globals=2, teacher_crops=2, progress=0.5, same_views=True)

    def step() -> tuple[Tensor, Tensor]:
        with torch.autocast(device.type, torch.bfloat16, enabled=low):
            with torch.no_grad():
                t = teacher(crops[:1], mixture.teacher_context())
            aims = mixture.aims(t, info) if streams else {}
            s = student(crops, mixture.context() | aims | depth)
        assert ("group" in s) != streams
        outcome = mixture.loss(s, t | aims, info)
        outcome.loss.backward()
        finite = outcome.finite()
        mixture.commit(outcome)
        return outcome.loss.detach(), finite

    step()
    with no_wait():
        loss, finite = step()
    assert float(loss) > 0
    assert bool(finite)


def peak_of(run: Callable[[], Any], device: torch.device) -> int:
    """Bytes of the device that a call needs at most, beyond what was there before it."""
    run()
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


@pytest.mark.gpu
@pytest.mark.parametrize("what", ["queue", "prototypes"])
def test_streamed_losses_take_less_than_half_the_memory(what: str, device: torch.device) -> None:
    """Forward and backward over 65,536 rows or prototypes, 12 crops of 128 images; and they are equal."""
    draws = torch.Generator(device).manual_seed(0)
    crops: dict[str, Any] = {"student_crops": 12, "student_globals": GLOBALS, "teacher_crops": 2}

    def unit(rows: int) -> Tensor:
        return normalize(torch.randn(rows, 256, generator=draws, device=device), dim=1)

    x = unit(12 * 128).requires_grad_()
    keys, queue = unit(2 * 128), unit(65536)
    layer = WeightNormLinear(256, 65536, train_norms=True).to(device)
    targets = torch.softmax(10 * torch.randn(2, 128, 65536, generator=draws, device=device), -1)

    def run(fast: bool) -> tuple[Tensor, list[Tensor]]:
        if what == "queue":
            form = info_nce if fast else info_nce_reference
            loss, given = form(x, keys, queue, temperature=0.2, **crops), [x]
        elif fast:
            loss, given = streamed_cross_entropy(*layer(x, targets, 0.1), **crops), [x, *layer.parameters()]
        else:
            loss = group_cross_entropy_reference(layer(x), targets.flatten(0, 1), temperature=0.1, **crops)
            given = [x, *layer.parameters()]
        return loss.detach(), list(torch.autograd.grad(loss, given))

    (loss, slopes), (wanted, plain) = run(True), run(False)
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=0)
    for slope, one in zip(slopes, plain, strict=True):
        assert float((slope - one).norm()) <= 1e-4 * float(one.norm())
    del slopes, plain
    fast, usual = (peak_of(lambda way=way: run(way), device) for way in (True, False))
    assert 0 < fast < usual / 2, (fast >> 20, usual >> 20)
