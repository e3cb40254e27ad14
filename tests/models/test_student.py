"""The student: the official outputs, the order of crops, what it asks of its context, and where its weights come from."""

from pathlib import Path
from typing import Any

import pytest
import torch
from gristmill.models.batch_norm import BatchNorm, merge_statistics, statistics_of
from gristmill.models.student import Student, StudentConfig
from gristmill.models.vit import Backbone, tokens
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn.functional import normalize

VECTORS = Path(__file__).parent.parent / "vectors"
TINY = StudentConfig(
    image_size=16, patch_size=8, embed_dim=32, depth=2, heads=2, drop_path=0, head_hidden=24, head_out=8,
    predictor_hidden=20, prototypes=40, neighbours=3,
)  # fmt: skip


def views(batch: int = 3, seed: int = 0) -> list[Tensor]:
    """Two global crops of 16 pixels, three local ones of 8."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(c * batch, 3, s, s, generator=generator) for c, s in ((2, 16), (3, 8))]


def bank(rows: int = 30, dim: int = 32) -> dict[str, Tensor]:
    return {"local_group.bank": torch.randn(rows, dim, generator=torch.Generator().manual_seed(9))}


def test_outputs_equal_the_official_step():
    official = torch.load(VECTORS / "mugs_step_slim.pt", weights_only=True)
    config = StudentConfig(
        embed_dim=48, depth=3, heads=3, drop_path=0, head_hidden=32, head_out=16, predictor_hidden=40, prototypes=64,
        neighbours=4,
    )  # fmt: skip
    ours = {"backbone.relation_blocks.0.": "relation."} | {
        f"{name}_head.": f"heads.{name}." for name in ("instance", "local_group", "group")
    }
    state = {}
    for key, value in official["student"].items():
        for theirs, name in ours.items():
            key = key.replace(theirs, name)
        state[key] = value
    student = Student(config)
    student.load_state_dict(state, strict=True)
    context = {
        "local_group.bank": official["memory"]["queue_k"],
        "local_group.unit_bank": normalize(official["memory"]["queue_q"], dim=-1),
    }
    with torch.no_grad():
        out = student([official["crop"].float()], context)
    for name, wanted in official["outputs"].items():
        torch.testing.assert_close(out[name], wanted, rtol=0, atol=2e-5, msg=name)


@pytest.mark.parametrize(
    ("objectives", "reads"),
    [
        (("instance", "group"), ["class", "class"]),
        (("instance", "local_group", "group"), ["all", "pair"]),
        (("group", "dense"), ["all", "class"]),
        (("group", "patch"), ["all", "class"]),
        (("local_group", "patch"), ["all", "pair"]),
    ],
)
def test_no_more_is_computed_than_is_read(
    objectives: tuple[Any, ...], reads: list[str], monkeypatch: pytest.MonkeyPatch
):
    """Outputs and gradients are those of a forward of all tokens."""
    config = TINY.model_copy(update={"objectives": objectives, "drop_path": 0.3})
    student, found = Student(config).double(), []
    assert student.reads(2) == reads
    crops = [x.double() for x in views()]
    context = {k: v.double() for k, v in bank().items()} | {
        "drop_path.draws": torch.rand(15, 4, generator=torch.Generator().manual_seed(1)),
        "patch.masks": torch.rand(6, 2, 2, generator=torch.Generator().manual_seed(2)) < 0.4,
    }
    for form in (student.reads, lambda sizes, _: ["all"] * sizes):
        monkeypatch.setattr(student, "reads", form)
        student.zero_grad()
        out = student(crops, context)
        sum(value.sin().sum() for value in out.values() if value.requires_grad).backward()  # pyright: ignore[reportAttributeAccessIssue]
        found.append(out | {name: p.grad for name, p in student.named_parameters()})
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], rtol=1e-8, atol=1e-9, msg=name)


def test_rows_are_crop_major_over_the_sizes_as_given():
    student, crops = Student(TINY), views()
    with torch.no_grad():
        out = student(crops, bank())
        for name, width in {"class_token": 32, "instance": 8, "local_group": 8, "group": 40}.items():
            assert out[name].shape == (15, width)
        assert out["memory_row"].shape == (6, 32)
        apart = [student([one], bank()) for size in crops for one in size.split(3)]
        for name in ("class_token", "instance", "local_group", "group"):
            torch.testing.assert_close(out[name], torch.cat([o[name] for o in apart]), rtol=0, atol=1e-5, msg=name)
    for name in ("instance", "local_group"):
        torch.testing.assert_close(out[name].norm(dim=1), torch.ones(15), rtol=0, atol=1e-5)


def test_memory_rows_are_the_mean_patches_after_the_norm():
    student, crops = Student(TINY), views()
    out, backbone = student(crops, bank()), student.backbone
    assert isinstance(backbone, Backbone)
    with torch.no_grad():
        wanted = [tokens(backbone, x)[1] for x in crops]
    torch.testing.assert_close(out["memory_row"], wanted[0][:, 1:].mean(1), rtol=0, atol=1e-5)
    torch.testing.assert_close(out["class_token"], torch.cat([x[:, 0] for x in wanted]), rtol=0, atol=1e-5)
    assert not out["memory_row"].requires_grad
    assert len(student(crops, bank(), global_sizes=2)["memory_row"]) == 15


@pytest.mark.parametrize("head_norm", ["none", "batch"])
@pytest.mark.parametrize("frozen", [False, True])
def test_every_trainable_weight_gets_a_gradient(frozen: bool, head_norm: str):
    student = Student(TINY.model_copy(update={"norm_last_layer": frozen, "head_norm": head_norm}))
    out = student(views(), bank())
    torch.stack(
        [out[name].square().sum() + out[name].sum() for name in ("instance", "local_group", "group")]
    ).sum().backward()
    assert [name for name, parameter in student.named_parameters() if parameter.grad is None] == []
    assert all(parameter.requires_grad for parameter in student.parameters())
    # Norms that stay are a buffer: same name, but nothing that an optimizer or ZeRO would look after.
    kept = "heads.group.last_layer.weight_g"
    assert (kept in dict(student.named_buffers())) == frozen
    assert (kept in dict(student.named_parameters())) == (not frozen)
    assert kept in student.state_dict()


def test_heads_only_for_the_objectives_named():
    student = Student(TINY.model_copy(update={"objectives": ("instance",)}))
    assert set(student(views())) == {"class_token", "instance"}
    assert not any("relation" in name or "group" in name for name in student.state_dict())


def test_leaving_an_objective_out_moves_no_other_weight():
    before = torch.get_rng_state()
    whole, part = Student(TINY, seed=3), Student(TINY.model_copy(update={"objectives": ("group",)}), seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    weights = whole.state_dict()
    assert all(torch.equal(value, weights[key]) for key, value in part.state_dict().items())
    other = Student(TINY, seed=4).state_dict()
    assert all(torch.equal(value, other[key]) != bool(value.std() > 0) for key, value in weights.items())
    assert not torch.equal(
        weights["heads.instance.projector.0.weight"], weights["heads.local_group.projector.0.weight"]
    )


def test_initial_heads_are_mugs():
    wide = {"head_hidden": 512, "predictor_hidden": 512, "head_out": 64, "prototypes": 512}
    weights = Student(TINY.model_copy(update=wide)).state_dict()
    assert abs(weights["heads.instance.projector.2.weight"].std().item() - 0.02) < 1e-3
    assert abs(weights["heads.group.projector.2.weight"].std().item() - 0.02) < 1e-3
    assert 0.99 < weights["heads.instance.predictor.0.weight"].abs().max() * 8 <= 1
    assert 0.99 < weights["heads.group.last_layer.weight_v"].abs().max() * 8 <= 1
    assert (weights["heads.group.last_layer.weight_g"] == 1).all()


def test_stochastic_depth_follows_its_draws():
    student, crops = Student(TINY.model_copy(update={"drop_path": 0.5})), views()
    draws = torch.rand(15, 4, generator=torch.Generator().manual_seed(1))
    first, again = (student(crops, bank() | {"drop_path.draws": draws}) for _ in range(2))
    assert torch.equal(first["group"], again["group"])
    # Rows of their own: changing the draws of one local crop changes that row only.
    draws[8] = 1 - draws[8]
    changed = student(crops, bank() | {"drop_path.draws": draws})["class_token"] != first["class_token"]
    assert changed.any(dim=1).nonzero().flatten().tolist() == [8]
    student.eval()
    whole = student(crops, bank())["class_token"]
    assert torch.equal(whole, Student(TINY)(crops, bank())["class_token"])


NORMED = TINY.model_copy(update={"head_norm": "batch", "virtual_batch": 3})
NORMS = [f"heads.{name}.projector.{i}" for name in ("instance", "local_group", "group") for i in (1, 4)]


def test_batch_norm_is_the_official_switch():
    """Linear, BatchNorm1d, GELU, twice, Linear, as `use_bn_in_head` builds it; none in the predictor."""
    student = Student(NORMED)
    assert [name for name, part in student.named_modules() if isinstance(part, BatchNorm)] == NORMS
    for name, bias in (("instance", False), ("group", True)):
        plain = nn.Sequential(
            nn.Linear(32, 24, bias=bias), nn.BatchNorm1d(24), nn.GELU(),
            nn.Linear(24, 24, bias=bias), nn.BatchNorm1d(24), nn.GELU(),
            nn.Linear(24, 8, bias=bias),
        )  # fmt: skip
        ours = student.heads[name].projector
        plain.load_state_dict(ours.state_dict(), strict=True)  # pyright: ignore[reportCallIssue]
        x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(ours(x), plain(x), rtol=0, atol=1e-6)  # pyright: ignore[reportCallIssue]
    weights = student.state_dict()
    assert all((weights[f"{name}.weight"] == 1).all() and not weights[f"{name}.bias"].any() for name in NORMS)


def test_a_forward_carries_its_statistics_out_and_changes_nothing():
    student = Student(NORMED)
    before = {key: value.clone() for key, value in student.state_dict().items()}
    out = student(views(), bank())
    # Five crops of three images: each crop is a virtual batch.
    assert {key: tuple(value.shape) for key, value in statistics_of(out).items()} == {
        f"batch_norm.{name}": (5, 2, 24) for name in NORMS
    }
    assert not any(value.requires_grad for value in statistics_of(out).values())
    student([torch.full_like(x, torch.nan) for x in views()], bank())
    assert all(torch.equal(value, before[key]) for key, value in student.state_dict().items())
    merge_statistics(student, statistics_of(out))
    changed = {key for key, value in student.state_dict().items() if not torch.equal(value, before[key])}
    kinds = ("running_mean", "running_var", "num_batches_tracked")
    assert changed == {f"{name}.{kind}" for name in NORMS for kind in kinds}
    hidden = student.get_submodule("heads.instance.projector.0")(out["class_token"].detach())
    mean = torch.stack([part.mean(0) for part in hidden.split(3)]).mean(0)
    torch.testing.assert_close(student.state_dict()["heads.instance.projector.1.running_mean"], 0.1 * mean)
    student.eval()
    out = student(views(), bank())
    assert not statistics_of(out)
    alone = student([views()[0][:1]], bank())["instance"]  # in evaluation a row does not depend on others
    torch.testing.assert_close(alone, out["instance"][:1], rtol=0, atol=1e-5)


def test_two_ranks_with_whole_virtual_batches_do_what_one_does():
    student, crops = Student(NORMED), views(batch=6)
    with torch.no_grad():
        whole = student(crops, bank())
        shares = []
        for images in (slice(0, 3), slice(3, 6)):
            own = [x.view(-1, 6, *x.shape[1:])[:, images].flatten(0, 1) for x in crops]
            shares.append(student(own, bank()))
    for name in ("instance", "local_group", "group"):
        joined = torch.cat([share[name].view(5, 3, -1) for share in shares], dim=1).flatten(0, 1)
        torch.testing.assert_close(joined, whole[name], rtol=0, atol=1e-5)
    merged = []
    for statistics in (whole, {key: torch.cat([share[key] for share in shares]) for key in statistics_of(whole)}):
        fresh = Student(NORMED)
        merge_statistics(fresh, statistics_of(statistics))
        merged.append(fresh.state_dict())
    for key, value in merged[0].items():
        torch.testing.assert_close(merged[1][key], value, rtol=1e-5, atol=1e-6)


def test_crops_that_fill_no_virtual_batch_are_refused():
    student = Student(NORMED)
    with pytest.raises(
        ValueError, match="8 crops of one size do not fill virtual batches of 3; let virtual_batch divide"
    ):
        student(views(batch=4), bank())
    assert student.eval()(views(batch=4), bank())["group"].shape == (20, 40)


def test_weights_are_read_only_inside_the_forward_of_the_module_that_owns_them():
    """As under ZeRO 3, which gathers a module's own parameters before its forward and scatters them after it."""
    student = Student(NORMED.model_copy(update={"drop_path": 0.3}))
    context = bank() | {"drop_path.draws": torch.rand(15, 4, generator=torch.Generator().manual_seed(1))}
    with torch.no_grad():
        wanted = student(views(), context)
        whole = {parameter: parameter.data for parameter in student.parameters()}

        def gather(module: nn.Module, *_) -> None:
            for parameter in module.parameters(recurse=False):
                parameter.data = whole[parameter]

        def scatter(module: nn.Module, *_) -> None:
            for parameter in module.parameters(recurse=False):
                parameter.data = torch.empty(0)

        for module in student.modules():
            module.register_forward_pre_hook(gather)
            module.register_forward_hook(scatter)
            scatter(module)
        found = student(views(), context)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_what_the_context_lacks_is_named():
    with pytest.raises(ValueError, match=r"local_group\.bank"):
        Student(TINY)(views())
    student = Student(TINY.model_copy(update={"drop_path": 0.1}))
    with pytest.raises(ValueError, match=r"drop_path\.draws"):
        student(views(), bank())
    with pytest.raises(ValueError, match=r"shape \(2, 4\); these views want \(15, 4\)"):
        student(views(), bank() | {"drop_path.draws": torch.zeros(2, 4)})


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"haeds": 3}, "haeds"),
        ({"image_size": 50, "patch_size": 8}, "not a multiple of patch_size"),
        ({"embed_dim": 100, "heads": 3}, "not a multiple of heads"),
        ({"objectives": ["group", "group"]}, "names one twice"),
        ({"objectives": ["denser"]}, "objectives"),
        ({"objectives": []}, "objectives"),
        ({"drop_path": 1.0}, "drop_path"),
        ({"head_norm": "layer"}, "head_norm"),
        ({"virtual_batch": 8}, "virtual_batch 8 is for batch norm; set head_norm: batch"),
        ({"head_norm": "batch", "virtual_batch": 1}, "virtual_batch"),
    ],
)
def test_impossible_configurations_are_refused(given: dict, said: str):
    with pytest.raises(ValidationError, match=said):
        StudentConfig.model_validate(given)
