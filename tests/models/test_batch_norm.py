"""Batch norm tied to torch's own: outputs, gradients, running statistics; and that a forward changes nothing."""

import copy

import pytest
import torch
from gristmill.models.batch_norm import BatchNorm, collect_statistics, merge_statistics, statistics_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype) * 3 + 1


def both(features: int, affine: bool = True, **how) -> tuple[BatchNorm, nn.BatchNorm1d]:
    """Ours and torch's, in float64, with the same weights that are not 1 and 0."""
    plain = nn.BatchNorm1d(features, affine=affine, eps=1e-5, momentum=how.get("momentum", 0.1)).double()
    if affine:
        nn.init.normal_(plain.weight, generator=torch.Generator().manual_seed(1))
        nn.init.normal_(plain.bias, generator=torch.Generator().manual_seed(2))
    ours = BatchNorm(features, affine=affine, **how).double()
    ours.load_state_dict(plain.state_dict(), strict=True)
    return ours, plain


def run(module: nn.Module, x: Tensor, cotangent: Tensor) -> list[Tensor]:
    """Output, and gradients of input and parameters."""
    x = x.clone().requires_grad_()
    y = module(x)
    y.backward(cotangent)
    assert x.grad is not None
    return [y.detach(), x.grad, *[p.grad for p in module.parameters() if p.grad is not None]]


def close(found: list[Tensor], wanted: list[Tensor], tolerance: float = 1e-10) -> None:
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


def running(module: nn.Module) -> list[Tensor]:
    return [b.double() for b in module.buffers()]


@given(st.integers(2, 30), st.integers(1, 9), st.booleans(), st.floats(0, 1), st.integers(1, 3))
@settings(max_examples=40, deadline=None)
def test_one_virtual_batch_is_torchs(rows: int, features: int, affine: bool, momentum: float, steps: int):
    ours, plain = both(features, affine, momentum=momentum, virtual=rows)
    for step in range(steps):
        x, cotangent = draw(rows, features, seed=step), draw(rows, features, seed=step + 50)
        for module in (ours, plain):
            module.zero_grad()
        with collect_statistics(ours) as found:
            mine = run(ours, x, cotangent)
        close(mine, run(plain, x, cotangent))
        merge_statistics(ours, found)
        close(running(ours), running(plain), 1e-5)
    ours.eval(), plain.eval()
    x = draw(4, features)
    torch.testing.assert_close(ours(x), plain(x), rtol=1e-5, atol=1e-5)
    assert found["batch_norm."].shape == (1, 2, features)


@given(st.integers(1, 5), st.integers(2, 7), st.integers(1, 5))
@settings(max_examples=30, deadline=None)
def test_virtual_batches_are_torchs_one_by_one(count: int, rows: int, features: int):
    ours, plain = both(features, virtual=rows)
    x, cotangent = draw(count * rows, features), draw(count * rows, features, seed=9)
    with collect_statistics(ours) as found:
        mine = run(ours, x, cotangent)
    parts = [run(plain, a, b) for a, b in zip(x.split(rows), cotangent.split(rows), strict=True)]
    # torch's parameter gradients were added up over the parts.
    close(mine, [torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts]), *parts[-1][2:]])
    wanted = torch.stack([torch.stack([part.mean(0), part.var(0)]) for part in x.split(rows)])
    close([found["batch_norm."]], [wanted])
    merge_statistics(ours, found)
    mean, var = wanted.mean(0)
    close([ours.running_mean.double(), ours.running_var.double()], [0.1 * mean, 0.9 + 0.1 * var], 1e-5)
    assert int(ours.num_batches_tracked) == 1


@pytest.mark.parametrize("shape", [(12, 3, 5), (12, 3, 4, 2)])
def test_maps_are_normalised_over_their_places_too(shape: tuple[int, ...]):
    ours, _ = both(3, virtual=6)
    plain = (nn.BatchNorm1d if len(shape) == 3 else nn.BatchNorm2d)(3).double()
    plain.load_state_dict(ours.state_dict())
    x = draw(*shape)
    close([ours(x)], [torch.cat([plain(part) for part in x.split(6)])])


def test_ranks_that_hold_whole_virtual_batches_agree():
    one, x = BatchNorm(5, virtual=4), draw(24, 5, dtype=torch.float32)
    two = copy.deepcopy(one)
    with collect_statistics(one) as whole:
        y = one(x)
    shares = []
    for rows in (x[:8], x[8:]):
        with collect_statistics(two) as found:
            share = two(rows)
        shares.append((share, found["batch_norm."]))
    assert torch.equal(torch.cat([share[0] for share in shares]), y)
    assert torch.equal(torch.cat([share[1] for share in shares]), whole["batch_norm."])
    merge_statistics(one, whole)
    # Whatever order the ranks' rows come in.
    merge_statistics(two, {"batch_norm.": torch.cat([shares[1][1], shares[0][1]])})
    close(running(one), running(two), 0)


def test_nothing_is_remembered_before_the_merge():
    norm = BatchNorm(3)
    before = copy.deepcopy(norm.state_dict())
    bad = torch.full((4, 3), torch.nan)
    with collect_statistics(norm) as found:
        assert norm(bad).isnan().all()
    norm(bad)
    assert all(torch.equal(value, before[key]) for key, value in norm.state_dict().items())
    assert found["batch_norm."].isnan().all()
    assert norm(draw(4, 3).float()).isfinite().all()
    merge_statistics(norm, found)
    assert norm.running_mean.isnan().all()  # the verdict's to prevent, and visible in what it sees


def test_statistics_are_collected_by_name_call_after_call_and_only_in_training():
    net = nn.Sequential(BatchNorm(3, virtual=2), nn.Sequential(nn.Linear(3, 4), BatchNorm(4)), BatchNorm(4).eval())
    x = draw(6, 3).float()
    with collect_statistics(net) as found:
        net(x), net(x[:4])
        assert not found
    assert {key: tuple(value.shape) for key, value in found.items()} == {
        "batch_norm.0": (5, 2, 3),
        "batch_norm.1.1": (2, 2, 4),
    }
    assert not any(value.requires_grad for value in found.values())
    assert statistics_of({"x": x, **found}) == found
    with collect_statistics(net) as again:
        pass
    assert again == {}
    broken = nn.Sequential(BatchNorm(3), nn.Linear(2, 2))
    with pytest.raises(RuntimeError, match="cannot be multiplied"), collect_statistics(broken):
        broken(x)
    assert broken[0].sink is None
    with collect_statistics(broken) as again:  # nothing is left over from the forward that failed
        broken[0](x)
    assert len(again["batch_norm.0"]) == 1


@pytest.mark.parametrize("how", ["cast", "autocast"])
def test_low_precision_touches_neither_arithmetic_nor_statistics(how: str):
    norm = BatchNorm(3, momentum=1e-3)
    norm.running_mean += 1.2345678
    kept = norm.running_mean.clone()
    if how == "cast":
        norm.bfloat16()
    assert {norm.running_mean.dtype, norm.running_var.dtype} == {torch.float32}
    assert torch.equal(norm.running_mean, kept)
    assert norm.double().running_mean.dtype == torch.float32
    norm = norm.bfloat16() if how == "cast" else norm.float()
    x = (draw(64, 3) + 100).bfloat16()
    plain = nn.BatchNorm1d(3).double()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=how == "autocast"), collect_statistics(norm) as found:
        y = norm(x)
    assert y.dtype == torch.bfloat16
    assert found["batch_norm."].dtype == torch.float32
    # Equal to float64's but for the rounding of the output.
    torch.testing.assert_close(y.double(), plain(x.double()).detach(), rtol=2**-8, atol=1e-4)
    torch.testing.assert_close(found["batch_norm."][0, 0].double(), x.double().mean(0), rtol=1e-6, atol=0)
    merge_statistics(norm, found)
    assert (norm.running_mean != kept).all()
    assert norm.running_mean.dtype == torch.float32
    y = norm.eval()(x)
    assert y.dtype == torch.bfloat16


def test_state_travels_to_and_from_torchs():
    for affine in (True, False):
        ours, plain = BatchNorm(3, affine=affine), nn.BatchNorm1d(3, affine=affine)
        assert list(ours.state_dict()) == list(plain.state_dict())
        plain(draw(5, 3).float())
        ours.load_state_dict(plain.state_dict(), strict=True)
        x = draw(2, 3).float()
        torch.testing.assert_close(ours.eval()(x), plain.eval()(x))
        assert int(ours.num_batches_tracked) == 1
        plain.load_state_dict(ours.state_dict(), strict=True)


def test_rows_that_fill_no_virtual_batch_are_refused():
    with pytest.raises(ValueError, match="over 10 rows: they do not fill virtual batches of 4"):
        BatchNorm(3, virtual=4)(draw(10, 3))
    for norm in (BatchNorm(3), BatchNorm(3, virtual=2)):
        with pytest.raises(ValueError, match="one row has no variance"):
            norm(draw(1, 3))
        with pytest.raises(ValueError, match="over 0 rows"):
            norm(draw(0, 3))
        assert norm.eval()(draw(1, 3)).shape == (1, 3)
    with pytest.raises(ValueError, match="virtual batch of 1"):
        BatchNorm(3, virtual=1)


def test_statistics_that_do_not_fit_change_nothing():
    net = nn.Sequential(BatchNorm(3), nn.Linear(3, 3))
    good = torch.ones(2, 2, 3)
    for key, value, said in [
        ("batch_norm.1", good, "'batch_norm.1' belong to no batch norm"),
        ("batch_norm.heads.x", good, "belong to no batch norm"),
        ("0", good, "'0' belong to no batch norm"),
        ("batch_norm.0", good[0], r"are \[2, 3\], not \[virtual batches, 2, 3\]"),
        ("batch_norm.0", good[:0], r"are \[0, 2, 3\]"),
        ("batch_norm.0", torch.ones(1, 2, 4), r"are \[1, 2, 4\]"),
    ]:
        statistics = {"batch_norm.0": good, key: value}
        with pytest.raises(ValueError, match=said):
            merge_statistics(net, statistics)
    assert int(net[0].num_batches_tracked) == 0  # pyright: ignore[reportArgumentType]
    assert not net[0].running_mean.any()  # pyright: ignore[reportCallIssue]
