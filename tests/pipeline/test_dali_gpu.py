"""What can be known of the graph on a GPU without one, and tests for whoever has one (docs/views.md has the command)."""

from typing import Any

import numpy as np
import pytest
import torch
from gristmill.pipeline.augment import DecodeError
from gristmill.pipeline.augment.dali import DaliExecutor
from gristmill.pipeline.augment.graph import crops_of
from gristmill.pipeline.draws import Draws, Plan, draw
from gristmill.pipeline.groups import named_views
from gristmill.pipeline.views import View
from nvidia.dali import backend, fn, types
from nvidia.dali.pipeline import pipeline_def

from .test_dali import BROKEN, GLOBAL, KINDS, LOCAL, batch_of, in_levels, some

STRONG = {"count": 3, "weak_p": 0.2}
PLAN = Plan(
    [
        GLOBAL,
        LOCAL,
        View.model_validate({"name": "strong", "size": 48, "strong": "mugs", **STRONG}),
        View.model_validate({"name": "cubic", "size": 33, "filter": "bicubic", "strong": "mugs-normalised", **STRONG}),
    ]
)


def gpu_problems(pipeline: Any) -> list[str]:
    """What would keep a drawn graph from running on a GPU, found without one.

    Every operator must exist for the device that it was put on and may be given the arguments of its schema alone. That
    no operator on the GPU takes data from the CPU, DALI asserts while the graph is drawn; with the outputs on the GPU,
    operators on the CPU can thus only make arguments and predicates.
    """
    pipeline._build_graph()
    registered = {
        "cpu": set(backend.RegisteredCPUOps()),
        "gpu": set(backend.RegisteredGPUOps()),
        "mixed": set(backend.RegisteredMixedOps()),
    }
    problems = []
    made_by = {output.name: made for made in pipeline._ops for output in made.outputs}
    for made in pipeline._ops:
        if not made.inputs:  # fed from outside, or a constant
            continue
        name, device = made._op.schema_name, made._op.device
        if name not in registered[device]:
            problems.append(f"{name} has no {device} form")
        backend.GetSchema(name).CheckArgs(made.spec)
    return problems + [
        f"the output of {made_by[output.name]._op.schema_name} stays on the CPU"
        for output in pipeline._graph_outputs
        if output.device != "gpu"
    ]


RECIPES = {
    "mugs": [View.model_validate(entry) for entry in named_views("mugs")],
    "weak": [GLOBAL, LOCAL],
    "probe": [View.model_validate({"name": "probe", "size": 32, "augment": "none"})],
    "everything": [
        View.model_validate({"name": "a", "count": 3, "size": 32, "augment": {"solarize": 0.5, "blur": [1, 0, 0.5]}})
    ],
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_operator_of_the_graph_has_a_gpu_form(recipe: str):
    plan = Plan(RECIPES[recipe])
    for view in plan.views:
        graph: Any = crops_of(plan, view, "gpu", **{"batch_size": 4, "num_threads": 1, "device_id": None})
        assert gpu_problems(graph) == []
        placed = [made._op.device for made in graph._ops]
        assert placed.count("gpu") > 1


def test_a_graph_does_not_grow_with_crops():
    """An operator costs tens of microseconds on a GPU, whatever it does."""

    def operators(count: int) -> int:
        plan = Plan([View.model_validate({"name": "local", "size": 32, "strong": "mugs", "count": count})])
        graph: Any = crops_of(plan, plan.views[0], "cpu", batch_size=4, num_threads=1, device_id=None)
        graph.build()
        return len(graph._ops)

    assert operators(10) == operators(3) < 400


def test_the_lint_sees_what_a_gpu_cannot_do():
    @pipeline_def
    def left_behind() -> Any:
        image = fn.external_source(name="image", dtype=types.UINT8, ndim=3, layout="HWC")  # pyright: ignore
        return fn.resize(image, size=[8, 8])  # pyright: ignore

    @pipeline_def
    def no_such_form() -> Any:
        return fn.random.choice([3, 5], device="gpu")

    how: Any = {"batch_size": 2, "num_threads": 1, "device_id": None}
    assert gpu_problems(left_behind(**how)) == ["the output of Resize stays on the CPU"]
    assert gpu_problems(no_such_form(**how)) == ["random__Choice has no gpu form"]


@pytest.fixture(scope="module")
def batch() -> tuple[list[np.ndarray], Draws]:
    data, sizes = batch_of(24)
    return data, draw(PLAN, 7, np.arange(24) + 1000, sizes)


@pytest.fixture(scope="module")
def gpu() -> DaliExecutor:
    return DaliExecutor(PLAN, device="gpu", batch=24)


@pytest.mark.gpu
def test_gpu_pixels_are_the_cpus(batch: tuple[list[np.ndarray], Draws], gpu: DaliExecutor):
    """Weak, strong and bicubic crops. What is stored without loss comes out alike; JPEGs may be a level apart."""
    data, draws = batch
    ours, theirs = gpu.run(data, draws), DaliExecutor(PLAN, batch=24).run(data, draws)
    lossless = np.array([KINDS[i % len(KINDS)][2]["format"] == "PNG" for i in range(24)])
    for name, view in ours.items():
        assert view.is_cuda
        apart = np.abs(in_levels(view.cpu()) - in_levels(theirs[name]))
        # A table of whole levels turns a difference in the last bit into a level.
        assert (apart[lossless] > 0.05).mean() < (1e-4 if name in ("global", "local") else 0.02)
        assert apart.mean() < 1


@pytest.mark.gpu
def test_gpu_bits_do_not_depend_on_company(batch: tuple[list[np.ndarray], Draws], gpu: DaliExecutor):
    data, draws = batch
    whole = gpu.run(data, draws)
    slots = [5, 17, 2]
    part = DaliExecutor(PLAN, device="gpu", batch=3).run([data[i] for i in slots], some(draws, slots))
    assert all(torch.equal(part[name], whole[name][slots]) for name in whole)


@pytest.mark.gpu
@pytest.mark.parametrize("how", BROKEN)
def test_damaged_images_are_named_on_a_gpu_too(batch: tuple[list[np.ndarray], Draws], gpu: DaliExecutor, how: str):
    data, draws = batch
    whole = {name: view.clone() for name, view in gpu.run(data, draws).items()}
    damaged = [BROKEN[how](data[1]) if slot in (0, 9, 23) else image for slot, image in enumerate(data)]
    for _ in range(4):
        with pytest.raises(DecodeError) as caught:
            gpu.run(damaged, draws)
        assert caught.value.bad == [0, 9, 23]
    again = gpu.run(data, draws)
    assert all(torch.equal(again[name], whole[name]) for name in whole)


@pytest.mark.gpu
def test_batches_on_a_stream_of_ones_own(batch: tuple[list[np.ndarray], Draws], gpu: DaliExecutor):
    """Several in a row, each read on that stream alone, while another stream is busy; none waits for the device."""
    data, draws = batch
    expected = [
        {name: view.clone() for name, view in gpu.run([data[i] for i in slots], some(draws, slots)).items()}
        for slots in ([0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11])
    ]
    torch.cuda.synchronize()
    busy = torch.ones(4096, 4096, device="cuda")
    own = torch.cuda.Stream()
    found = []
    with torch.cuda.stream(own):
        for first in (0, 4, 8):
            slots = list(range(first, first + 4))
            views = gpu.run([data[i] for i in slots], some(draws, slots))
            found.append({name: view * 1.0 for name, view in views.items()})
            with torch.cuda.stream(torch.cuda.default_stream()):
                busy = busy @ busy
    own.synchronize()
    for views, right in zip(found, expected, strict=True):
        assert all(torch.equal(views[name], right[name]) for name in views)
