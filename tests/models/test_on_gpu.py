"""On a GPU: networks, streamed prototypes, the search for neighbours and the moving average, as on the CPU."""

import copy
from collections.abc import Iterator, Mapping

import pytest
import torch
from gristmill.models import (
    Student,
    StudentConfig,
    ema_update,
    make_teacher,
    merge_statistics,
    search,
    statistics_of,
)
from gristmill.models.ema import ema_update_reference, pairs
from gristmill.models.heads import WeightNormLinear
from gristmill.models.vit import branch_scales
from torch import Tensor
from torch.nn.functional import normalize

from ..objectives.on_gpu import whole_products

VIT = StudentConfig(
    image_size=32, patch_size=8, embed_dim=64, depth=3, heads=2, drop_path=0.3, head_hidden=48, head_out=16,
    predictor_hidden=40, prototypes=96, neighbours=3,
)  # fmt: skip
PATCHES = VIT.model_copy(update={"objectives": ("group", "patch"), "shared_head": False, "patch_prototypes": 80})
RESNET = StudentConfig.model_validate({
    "backbone": "resnet18", "embed_dim": 64, "depth": 1, "virtual_batch": 4, "prototypes": 40,
    "objectives": ["hierarchy", "dense", "batch_contrast", "swapped"],
    "projections": {
        "dense": {"hidden": 32, "out": 16, "grid": 2}, "hierarchy": {"hidden": 32, "out": 16},
        "batch_contrast": {"hidden": 32, "out": 16, "norm": "batch", "predictor": {"hidden": 32, "norm": "batch"}},
        "swapped": {"hidden": 32, "out": 16, "norm": "batch"},
    },
})  # fmt: skip
Found = dict[str, Tensor]


@pytest.fixture
def device() -> Iterator[torch.device]:
    with whole_products():
        yield torch.device("cuda")


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def near(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], tolerance: float) -> None:
    """Each within `tolerance` of its largest number, or a thousandth of the largest of all: some are rounding."""
    assert found.keys() == wanted.keys()
    largest = max(float(value.abs().max()) for value in wanted.values())
    for key, value in wanted.items():
        given = found[key].detach().cpu()
        assert (given.shape, given.dtype) == (value.shape, value.dtype), key
        gap, size = float((given.double() - value.double()).abs().max()), float(value.abs().max())
        assert gap <= tolerance * max(size, 1e-3 * largest), (key, gap, size, largest)


def shown(net: Student, views: list[Tensor], context: Mapping[str, Tensor]) -> tuple[list[Tensor], Found]:
    """What a network is shown, where its weights are and in their type."""
    like = next(net.parameters())
    placed = {key: value.to(like if value.is_floating_point() else like.device) for key, value in context.items()}
    return [view.to(like) for view in views], placed


def led(
    net: Student, views: list[Tensor], context: Mapping[str, Tensor], where: torch.device | str, low: bool = False
) -> tuple[Found, Found, Student]:
    """Outputs and gradients by parameter of a copy on a device, under one sum of its outputs; and that copy."""
    where = torch.device(where)
    net = copy.deepcopy(net).to(where)
    dtype = next(net.parameters()).dtype
    with torch.autocast(where.type, torch.bfloat16, enabled=low):
        out = net(*shown(net, views, context))
    terms = [(v * draw(*v.shape, seed=n).to(v)).sum() for n, v in enumerate(out.values()) if v.requires_grad]
    gradients = torch.autograd.grad(torch.stack([term.to(dtype) for term in terms]).sum(), list(net.parameters()))
    named = zip((name for name, _ in net.named_parameters()), gradients, strict=True)
    return {key: value.detach() for key, value in out.items()}, dict(named), net


def vit_case(config: StudentConfig, rows: int = 30) -> tuple[list[Tensor], Found]:
    """Two global crops of 4 images, three local ones; what a training forward asks for. rows: of the memory."""
    views = [draw(2 * 4, 3, 32, 32, seed=0), draw(3 * 4, 3, 16, 16, seed=1)]
    context = {"local_group.bank": draw(rows, 64, seed=2), "patch.masks": draw(8, 4, 4, seed=3) > 0.3}
    if config.drop_path:
        context["drop_path.draws"] = torch.rand(20, 6, generator=torch.Generator().manual_seed(4))
    context["patch.index"] = context["patch.masks"].flatten().nonzero().squeeze(1)
    return views, context


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-10)], ids=str)
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("kind", ["dropped", "whole", "patches"])
def test_a_vit(kind: str, recompute: bool, dtype: torch.dtype, tolerance: float, device: torch.device) -> None:
    """Outputs and gradients of a training forward of two sizes of crops, with paths dropped or patches hidden."""
    config = PATCHES if kind == "patches" else VIT.model_copy(update={"drop_path": 0.3 if kind == "dropped" else 0.0})
    net = Student(config).to(dtype)
    net.backbone.recompute = recompute
    (wanted, slopes, _), (found, gradients, _) = (led(net, *vit_case(config), where) for where in ("cpu", device))
    near(found, wanted, tolerance)
    near(gradients, slopes, tolerance)
    with torch.no_grad():
        here, there = make_teacher(net), make_teacher(net).to(device)
        near(there(*shown(there, *vit_case(config))), here(*shown(here, *vit_case(config))), tolerance)


def gap(found: Tensor, wanted: Tensor) -> float:
    """How far it is from what is wanted, of that one's length."""
    return float((found.detach().cpu().double() - wanted.double()).norm() / wanted.double().norm())


def joined(gradients: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([gradient.flatten().cpu().double() for gradient in gradients.values()])


@pytest.mark.gpu
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_autocast(kind: str, recompute: bool, device: torch.device) -> None:
    """In bf16 as close to float64 as the CPU's bf16 is, up to a factor for luck; a ViT's outputs within 3%."""
    # Norms over four rows would make anything of bf16's third digit: no heads that have some.
    config = VIT if kind == "vit" else RESNET.model_copy(update={"objectives": ("hierarchy", "dense")})
    # As many rows in the memory as neighbours are asked for: bf16 decides otherwise which are near.
    views, context = vit_case(VIT, rows=3) if kind == "vit" else resnet_case()
    net = Student(config)
    net.backbone.recompute = recompute
    exact, slopes, _ = led(copy.deepcopy(net).double(), views, context, "cpu")
    (usual, theirs, _), (found, mine, _) = (led(net, views, context, where, low=True) for where in ("cpu", device))
    assert found.keys() == usual.keys() == exact.keys()
    for key, value in exact.items():
        assert gap(found[key], value) <= 3 * gap(usual[key], value) + 1e-3, key
        if kind == "vit":
            apart = float((found[key].double().cpu() - usual[key].double()).abs().max())
            assert apart <= 3e-2 * float(value.abs().max()), key
    off = gap(joined(mine), joined(slopes))
    assert 1e-4 < off <= 3 * gap(joined(theirs), joined(slopes)) + 1e-3  # it was in bf16


def resnet_case() -> tuple[list[Tensor], Found]:
    """Two crops of 8 images of 96 pixels, shuffled, and a queue to score."""
    context = {"shuffle.order": torch.randperm(8, generator=torch.Generator().manual_seed(0))}
    return [draw(2 * 8, 3, 96, 96, seed=1)], context | {"swapped.queue": normalize(draw(20, 16, seed=2))}


@pytest.mark.gpu
# Convolutions may go by Winograd's algorithm, and norms over four rows make more of its rounding.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-4), (torch.float64, 1e-10)], ids=str)
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_a_resnet(recompute: bool, dtype: torch.dtype, tolerance: float, device: torch.device) -> None:
    """Outputs, statistics of shuffled virtual batches, gradients; running statistics, and evaluation by them."""
    net = Student(RESNET).to(dtype)
    net.backbone.recompute = recompute
    (wanted, slopes, here), (found, gradients, there) = (led(net, *resnet_case(), where) for where in ("cpu", device))
    assert any(key.startswith("batch_norm.") for key in wanted)
    near(found, wanted, tolerance)
    # Where an input of a ReLU is about zero, float32 may decide otherwise, and a place more or less has a gradient.
    assert gap(joined(gradients), joined(slopes)) <= 2 * tolerance
    if dtype == torch.float64:
        near(gradients, slopes, 1e-9)
    for one, out in ((here, wanted), (there, found)):
        merge_statistics(one, statistics_of(out))
        one.eval()
    near(dict(there.named_buffers()), dict(here.named_buffers()), max(tolerance, 1e-6))  # always float32
    with torch.no_grad():
        evaluated = [one(*shown(one, *resnet_case())) for one in (here, there)]
    near(evaluated[1], evaluated[0], max(tolerance, 1e-6))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["fp64", "fp32", "bf16", "autocast"])
def test_streamed_prototypes(kind: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Log-sum-exps, agreements, gradients of crops, directions and lengths, in blocks of which the last is short."""
    monkeypatch.setattr("gristmill.models.prototypes.BLOCK_LOGITS_ELSEWHERE", 1)
    layer = WeightNormLinear(32, 300, train_norms=True).double()
    with torch.no_grad():
        layer.weight_g.copy_(draw(300, 1, seed=1).abs() + 0.5)
    x, targets = normalize(draw(5 * 4, 32, seed=2)), torch.softmax(5 * draw(2, 4, 300, seed=3), -1)

    def run(where: torch.device | str, kind: str) -> Found:
        dtype = {"fp64": torch.float64, "bf16": torch.bfloat16}.get(kind, torch.float32)
        precise = torch.promote_types(dtype, torch.float32)
        net, given = copy.deepcopy(layer).to(where, dtype), x.to(where, precise).requires_grad_()
        with torch.autocast(torch.device(where).type, torch.bfloat16, enabled=kind == "autocast"):
            lse, agreement = net(given, targets.to(where, precise), 0.1)
        total = (lse * draw(20, seed=4).to(lse)).sum() + (agreement * draw(4, 5, 2, seed=5).to(agreement)).sum()
        slopes = torch.autograd.grad(total, [given, net.weight_v, net.weight_g])
        return {"lse": lse.detach(), "agreement": agreement.detach()} | dict(zip(("x", "v", "g"), slopes, strict=True))

    found, wanted, exact = run(device, kind), run("cpu", kind), run("cpu", "fp64")
    if kind in ("fp64", "fp32"):
        near(found, wanted, 1e-12 if kind == "fp64" else 1e-5)
        return
    for key, value in exact.items():
        assert found[key].dtype == wanted[key].dtype
        assert gap(found[key], value) <= 3 * gap(wanted[key], value) + 1e-4, key


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["norms", "plain", "unit"])
def test_the_search(kind: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Float64: the same rows in the same order, also where queries pass in parts; float32: as near ones."""
    query, bank = draw(70, 24, seed=0), draw(3000, 24, seed=1) * draw(3000, 1, seed=2)

    def found(where: torch.device | str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        rows, asked = bank.to(where, dtype), query.to(where, dtype)
        norms = rows.norm(dim=1) if kind == "norms" else None
        return search(asked, rows, 8, normalize(rows) if kind == "unit" else None, norms)

    index, rows = found("cpu", torch.float64)
    monkeypatch.setattr("gristmill.models.neighbours._SEARCH_CELLS", 3000 * 32)
    for dtype in (torch.float64, torch.float32):
        other, taken = found(device, dtype)
        assert torch.equal(taken.cpu(), bank.to(dtype)[other.cpu()])
        cosines = [torch.cosine_similarity(query[:, None], bank[which.cpu()], dim=-1) for which in (index, other)]
        torch.testing.assert_close(cosines[1], cosines[0], rtol=0, atol=1e-6 if dtype == torch.float32 else 1e-14)
        if dtype == torch.float64:
            assert torch.equal(other.cpu(), index)
            assert torch.equal(taken.cpu(), rows)


@pytest.mark.gpu
def test_the_moving_average(device: torch.device) -> None:
    """All tensors at once on the device: as one by one on the host, and a teacher that equals its student stays so."""
    student = Student(VIT)
    teacher = make_teacher(student)
    with torch.no_grad():
        for number, weight in enumerate(student.parameters()):
            weight.add_(draw(*weight.shape, seed=number).to(weight), alpha=0.1)
    there = copy.deepcopy(student).to(device), copy.deepcopy(teacher).to(device)
    before = {name: weight.clone() for name, weight in teacher.named_parameters()}
    for momentum in (0.9, 0.99, 0.3):
        ema_update_reference(pairs(student, teacher), momentum)
        ema_update(pairs(*there), momentum)
    wanted = dict(teacher.named_parameters())
    near(dict(there[1].named_parameters()), {name: weight.detach() for name, weight in wanted.items()}, 1e-6)
    assert all(not torch.equal(before[name], weight) for name, weight in wanted.items())
    same = make_teacher(there[0])
    ema_update(pairs(there[0], same), 0.99)
    for source, target in zip(*pairs(there[0], same), strict=True):
        assert torch.equal(source, target)


@pytest.mark.gpu
def test_stochastic_depth_drops_the_same_branches(device: torch.device) -> None:
    draws = torch.rand(512, 24, generator=torch.Generator().manual_seed(0))
    wanted, found = branch_scales(draws, 0.3), branch_scales(draws.to(device), 0.3).cpu()
    assert torch.equal(found == 0, wanted == 0)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)
    assert 0 < int((wanted == 0).sum()) < wanted.numel()
