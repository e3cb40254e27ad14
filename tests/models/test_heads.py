"""Heads against the numbers that the official code printed (float64), and the weight norm against torch's."""

from pathlib import Path

import pytest
import torch
from gristmill.models.heads import ProjectionHead, PrototypeHead, WeightNormLinear, unit
from torch import Tensor, nn

VECTORS = Path(__file__).parent.parent / "vectors"


@pytest.fixture(scope="module")
def official() -> dict:
    return torch.load(VECTORS / "mugs_heads.pt", weights_only=True)


def close(found: Tensor | None, wanted: Tensor, tolerance: float = 1e-10) -> bool:
    """Within `tolerance` of the largest number wanted: gradients there go up to the thousands."""
    assert found is not None
    return bool((found - wanted).abs().max() <= tolerance * max(1.0, float(wanted.abs().max())))


@pytest.mark.parametrize("name", ["instance", "local_group"])
def test_projection_head_equals_the_official_one(official: dict, name: str):
    case = official[name]
    head = ProjectionHead(24, 40, 16, 56).double()
    head.load_state_dict(case["state"], strict=True)
    x = case["x"].clone().requires_grad_()
    y = head(x)
    y.backward(case["cotangent"])
    assert close(y, case["y_student"])
    assert close(x.grad, case["grad_x"])
    for key, parameter in head.named_parameters():
        assert close(parameter.grad, case["grad_params"][key]), key


def test_without_predictor_it_is_the_teachers(official: dict):
    case = official["instance"]
    head = ProjectionHead(24, 40, 16, None).double()
    head.load_state_dict({k: v for k, v in case["state"].items() if k.startswith("projector")}, strict=True)
    assert close(head(case["x"]), case["y_target"])


@pytest.mark.parametrize("frozen", [True, False])
def test_prototype_head_equals_the_official_one(official: dict, frozen: bool):
    case = official[f"group_norm_last_layer_{frozen}"]
    head = PrototypeHead(24, 40, 16, 48, norm_last_layer=frozen).double()
    head.load_state_dict(case["state"], strict=True)
    x = case["x"].clone().requires_grad_()
    y = head(x)
    y.backward(case["cotangent"])
    assert close(y, case["y"])
    assert close(x.grad, case["grad_x"])
    for key, parameter in head.named_parameters():
        wanted = case["grad_params"][key]
        assert (parameter.grad is None and wanted is None) or close(parameter.grad, wanted), key
    trained = {key: parameter.requires_grad for key, parameter in head.named_parameters()}
    assert all(trained.values())
    assert ("last_layer.weight_g" in trained) != frozen
    assert ("last_layer.weight_g" in dict(head.named_buffers())) == frozen


def test_weight_norm_is_torchs():
    torch.manual_seed(0)
    layer = WeightNormLinear(7, 5, train_norms=True).double()
    nn.init.uniform_(layer.weight_g, 0.5, 2.0)
    torchs = nn.utils.parametrizations.weight_norm(nn.Linear(7, 5, bias=False).double())
    names = {
        f"parametrizations.weight.original{i}": layer.state_dict()[key]
        for i, key in enumerate(("weight_g", "weight_v"))
    }
    torchs.load_state_dict(names, strict=True)
    x = torch.randn(3, 7, dtype=torch.float64)
    torch.testing.assert_close(layer(x), torchs(x), rtol=0, atol=1e-14)
    assert sorted(layer.state_dict()) == ["weight_g", "weight_v"]


def test_unit_vectors_keep_their_length_under_autocast():
    torch.manual_seed(0)
    head = ProjectionHead(24, 40, 16, 56)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = head(torch.randn(5, 24))
    assert y.dtype == torch.float32
    torch.testing.assert_close(y.norm(dim=1), torch.ones(5), rtol=0, atol=1e-6)
    assert unit(torch.ones(2, 4, dtype=torch.float64)).dtype == torch.float64
