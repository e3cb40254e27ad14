"""What a step needs, found on tensors without memory, against torch: its counters, its parameters, a GPU's code path."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from gristmill.models.flops import forward_flops
from gristmill.models.products import COUNTED
from gristmill.models.student import Student, StudentConfig
from gristmill.models.teacher import make_teacher
from gristmill.ops.bench.steps import IMAGES
from gristmill.ops.inputs import Inputs, Origin
from gristmill.ops.networks import build_mixture, build_student
from gristmill.ops.planning.hollow import networks
from gristmill.ops.planning.ledger import ALIKE
from gristmill.ops.planning.parameters import by_part, gathered, weights
from gristmill.ops.planning.trace import run, traced
from gristmill.ops.recipe import Recipe, load_recipe
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode, flop_registry

TINY = ("probes.at=[]", "student.drop_path=0", "batch=8")


def tiny(name: str, *overrides: str) -> Recipe:
    return load_recipe(name, [*TINY, *overrides], tiny=True)


def as_it_is(formula: Any) -> Any:
    """A registered formula, for FlopCounterMode to call with tensors, as it calls its own."""

    def call(*args: Any, **kwargs: Any) -> int:
        return formula(*args, **kwargs)

    call._get_raw = True  # pyright: ignore[reportFunctionMemberAccess]
    return call


def counted(recipe: Recipe) -> dict[str, int]:
    """FLOPs of a real micro-batch, by torch's counter; what it has no formula for goes by that of the like operator."""
    mapping = {packet: as_it_is(flop_registry[like]) for packet, like in ALIKE.items()} | COUNTED
    student = build_student(recipe)
    teacher, mixture = make_teacher(student), build_mixture(recipe, student, images=IMAGES)
    inputs = Inputs(recipe, 0, 1, "cpu")
    views = {v.name: torch.randn(recipe.batch, v.count, 3, v.size, v.size) for v in recipe.views}
    cut = {v.name: torch.eye(3)[:2].expand(recipe.batch, v.count, 2, 3) for v in recipe.views}
    info = inputs.info(0, 0.5, 0, Origin(torch.arange(recipe.batch), cut), IMAGES)
    found = {}

    def count(phase: str, what: Any) -> Any:
        with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
            out = what()
        found[phase] = counter.get_total_flops()
        return out

    with torch.no_grad():
        aims = inputs.crops(views, inputs.teacher, 0)
        context = mixture.teacher_context() | inputs.shuffled(0)
        targets = count("teacher", lambda: teacher(aims, context) if mixture.needs_teacher else {})
    targets = targets | mixture.aims(targets, info)
    context = mixture.context() | targets
    seen = inputs.crops(views, inputs.student, 0)
    outputs = count("student", lambda: student(seen, context))
    outcome = count("losses", lambda: mixture.loss(outputs, targets, info))
    count("backward", outcome.loss.backward)
    return found


@pytest.mark.parametrize("name", ["mugs-vits16-100", "moco-v3-r50-300"])
def test_flops_are_those_of_torchs_counter(name: str):
    recipe = tiny(name)
    assert run(recipe, recipe.batch, "cpu", IMAGES).flops == {k: float(v) for k, v in counted(recipe).items()}


@pytest.mark.parametrize(("name", "size"), [("vit_tiny_patch16_224", 96), ("resnet18", 96)])
def test_a_backbones_flops_and_weights_are_torchs(name: str, size: int):
    config = StudentConfig(backbone=name, objectives=("bootstrap",), drop_path=0.0)
    with torch.device("meta"):
        hollow = Student(config)
    real = Student(config).eval()
    assert sum(by_part(hollow).values()) == sum(p.numel() for p in real.parameters())
    assert by_part(hollow)["backbone"] == sum(p.numel() for p in real.backbone.parameters())
    with (
        FlopCounterMode(display=False, custom_mapping=COUNTED) as counter,
        torch.no_grad(),
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
    ):
        real.backbone(torch.randn(1, 3, size, size))
    assert counter.get_total_flops() == forward_flops(hollow.backbone, size, size)


def test_parts_are_told_apart():
    nets = networks(tiny("mugs-vits16-100"))
    found = weights(nets.student, nets.teacher)
    assert set(found.student) == {"backbone", "heads", "predictors", "local-group transformer", "prototypes"}
    assert found.student.keys() - found.teacher.keys() == {"predictors"}
    assert found.trained - found.averaged == found.student["predictors"]
    assert found.student["prototypes"] == 256 * (64 + 1)  # directions and lengths
    assert nets.kept["instance"] >= 1024 * 64 * 4


def test_a_billion_weights_take_no_memory():
    def resident() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) * 1024

    before = resident()
    nets = networks(load_recipe("multigrain-vitg16"))
    assert sum(p.numel() for p in nets.student.parameters()) > 1e9
    assert {p.device.type for p in [*nets.student.parameters(), *nets.teacher.parameters()]} == {"meta"}
    assert resident() - before < 300e6  # its weights are 4.3 GB


@pytest.mark.parametrize("recompute", [False, True])
def test_deep_networks_and_other_batches_lie_on_a_line(recompute: bool):
    sizes = ("student.depth=6", "student.embed_dim=192")
    recipe = tiny("mugs-vits16-100", *sizes, f"engine.recompute={str(recompute).lower()}", "precision=bf16")
    whole, judged = run(recipe, 13), traced(recipe, 13)
    for name in ("peak", "peak_with", "kept", "gradients", "traffic", "kernels"):
        assert getattr(judged, name) == pytest.approx(getattr(whole, name), rel=0.02), name
    assert judged.flops == pytest.approx(whole.flops)
    assert judged.sizes == pytest.approx(whole.sizes, rel=0.02)


def test_recomputing_keeps_less_and_works_more():
    plain, again = (
        run(tiny("mugs-vits16-100", "student.depth=4", f"engine.recompute={word}"), 8) for word in ("false", "true")
    )
    assert again.kept < 0.7 * plain.kept
    assert again.flops["backward"] > plain.flops["backward"]
    assert again.flops["student"] == plain.flops["student"]


def test_zero_3s_linear_layers_are_counted_and_given_back():
    linear = nn.functional.linear
    recipe = tiny("mugs-vits16-100", "precision=autocast")
    plain, cut = (run(recipe, 8, cut=cut) for cut in (False, True))
    assert nn.functional.linear is linear
    assert cut.flops == plain.flops
    assert cut.traffic > 1.05 * plain.traffic  # biases are added apart
    assert cut.kept < plain.kept  # and no copies of weights in autocast's type


def test_what_is_gathered_comes_and_goes():
    a, b, c = ((0, 10),), ((1, 20),), ((2, 30), (3, 1))
    # Forward alone: each module's weights while it runs; small ones (3) stay all along.
    assert gathered((a, b, c), backward=False, persistent=1, reuse=1000) == (30, 60)
    # Everything comes up again before so many others did: all stay, and are gathered once.
    assert gathered((a, b, c), backward=True, persistent=1, reuse=1000) == (60, 60)
    # The last one comes up again at once, the others do not soon enough.
    assert gathered((a, b, c), backward=True, persistent=1, reuse=1) == (30, 10 + 20 + 30 + 20 + 10)


class Alive(TorchDispatchMode):
    """Bytes of fake tensors' storages that operators made and that live."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_iter(out):
            if isinstance(value, FakeTensor) and not func.is_view:
                storage = value.untyped_storage()
                if storage._cdata not in self.sizes:
                    self.sizes[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self.sizes.pop, storage._cdata, None)
        return out


class Flash(TorchFunctionMode):
    """torch asks the GPU which attention it can do; here is none to ask."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.scaled_dot_product_attention:
            return torch.ops.aten._scaled_dot_product_flash_attention(*args)[0]
        return func(*args, **(kwargs or {}))


@pytest.mark.filterwarnings("ignore:Accessing the data pointer")
def test_a_vit_l_on_a_gpu_that_is_not_there_keeps_what_plan_says():
    """FakeTensorMode on `cuda`, under its autocast. A backward would ask the driver for a stream, so it ends before it."""
    recipe = load_recipe("mugs-vitl16-250", ["precision=autocast", "student.drop_path=0.3"])
    images = 8
    told = traced(recipe, images).sizes
    with torch.device("meta"):
        backbone: Any = Student(recipe.student).backbone
    assert len(backbone.blocks) == 24
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    try:
        with FakeTensorMode(), Flash():
            for module in backbone.modules():
                for name, p in list(module.named_parameters(recurse=False)):
                    own = torch.empty(p.shape, device="cuda")
                    module._parameters[name] = nn.Parameter(own, requires_grad=p.requires_grad)
            for size, crops in ((224, 2), (96, 10)):
                x = torch.empty(crops * images, 3, size, size, device="cuda")
                scale = torch.empty(crops * images, 48, device="cuda")
                with Alive() as alive:
                    y: Tensor = backbone(x, scale)
                    assert y.device.type == "cuda"
                    assert y.grad_fn is not None
                found = sum(alive.sizes.values())
                assert told[size] == pytest.approx(found, rel=0.1)
                del y
    finally:
        torch.set_autocast_enabled("cuda", False)
