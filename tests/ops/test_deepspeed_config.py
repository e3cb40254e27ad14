"""What the user may set reaches DeepSpeed and changes no weight; what he may not is refused with what to set instead."""

import copy
import functools
import gc
import itertools
import re
from typing import Any

import pytest
import torch
from gristmill.ops.deepspeed_config import FLOPS, FREE, FREE_ZERO, REFUSED, DeepSpeedConfigError, deepspeed_config
from gristmill.ops.launch import join, quiet_deepspeed
from gristmill.ops.optimizers import OptimizerConfig, make_optimizer, parameter_groups
from gristmill.ops.recipe import Recipe
from torch import Tensor, nn

PRECISIONS = ["fp32", "autocast", "bf16"]
TUNED = {  # free, far from the defaults, and small enough to matter to a small model
    "zero_optimization": {
        "reduce_bucket_size": 64,
        "allgather_bucket_size": 128,
        "contiguous_gradients": False,
        "overlap_comm": True,
        "allgather_partitions": False,
        "reduce_scatter": False,
        "use_multi_rank_bucket_allreduce": False,
        "sub_group_size": 40,
        "stage3_prefetch_bucket_size": 10,
        "stage3_param_persistence_threshold": 0,
        "stage3_max_live_parameters": 100,
        "max_reuse_distance": 100,
        "stage3_module_granularity_threshold": 5,
        "stage3_use_all_reduce_for_fetch_params": True,
        "enable_sanity_checks": True,
    },
    "wall_clock_breakdown": True,
    "disable_python_gc": True,
    "timers": {"throughput": {"enabled": False}},
}


@pytest.fixture
def device() -> torch.device:
    return join()[2]  # the group is left at exit: other tests of this process use it, too


@pytest.fixture(autouse=True)
def _linear(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed's ZeRO 3 leaves its own for the whole process; engines here are DeepSpeed's, which never take it back."""
    monkeypatch.setattr(nn.functional, "linear", nn.functional.linear)


def config_of(own: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return deepspeed_config(
        own, **{"stage": 1, "precision": "fp32", "micro_batch": 4, "accumulate": 1, "world": 1, **changes}
    )


class Net(nn.Module):
    """A small model; its forward turns autocast on itself, since DeepSpeed's engine turns off one that surrounds it."""

    def __init__(self, device: torch.device, autocast: bool):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3)).to(device)
        self.device, self.autocast = device, autocast

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.autocast):
            out = self.layers(x.to(next(self.parameters()).dtype))
        # Gradients of norm 10 and more: whatever clips them, unasked, is seen.
        return 10 * out.float().square().mean()


def data(step: int, micro: int, device: torch.device) -> Tensor:
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(10 * step + micro)).to(device)


def train(config: dict[str, Any], precision: str, device: torch.device) -> tuple[str, list[Tensor]]:
    """Two steps of SGD; the class of DeepSpeed's optimizer, and the weights."""
    deepspeed = quiet_deepspeed()
    model, settings = Net(device, precision == "autocast"), OptimizerConfig(name="sgd")
    optimizer = make_optimizer(parameter_groups(model, settings), settings, device.type)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    assert not any(optimizer.state.values()), "building the engine counted as a step"
    for group in optimizer.param_groups:
        group.update(lr=0.01, held=False)
    for step in range(2):
        for micro in range(config["gradient_accumulation_steps"]):
            engine.backward(engine(data(step, micro, device)))
            engine.step()
    assert engine.was_step_applied()
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        weights = [p.detach().float().clone() for p in model.parameters()]
    kind = type(engine.optimizer).__name__
    engine.destroy()
    return kind, weights


@functools.cache
def untuned(stage: int, precision: str, device: torch.device) -> tuple[str, list[Tensor]]:
    return train(config_of({}, stage=stage, precision=precision, accumulate=2), precision, device)


@functools.cache
def by_torch_alone(autocast: bool, device: torch.device) -> list[Tensor]:
    model = Net(device, autocast)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    for step in range(2):
        for micro in range(2):
            (model(data(step, micro, device)) / 2).backward()
        assert nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]) > 3
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("stage", range(4))
def test_every_stage_and_precision_equals_the_plain_loop(device: torch.device, stage: int, precision: str):
    kind, weights = untuned(stage, precision, device)
    assert ("Zero" in kind or kind == "BF16_Optimizer") == (stage > 0)
    rtol, atol = (0.05, 0.02) if precision == "bf16" else (1e-5, 1e-6)
    for ours, plain in zip(weights, by_torch_alone(precision == "autocast", device), strict=True):
        torch.testing.assert_close(ours, plain, rtol=rtol, atol=atol)


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), *itertools.product((1, 2, 3), ("fp32", "bf16"))])
def test_what_is_free_changes_no_weight(device: torch.device, stage: int, precision: str):
    before = copy.deepcopy(TUNED)
    tuned = config_of(TUNED, stage=stage, precision=precision, accumulate=2)
    assert before == TUNED, "the user's mapping is left as it was"
    kind, ours = train(tuned, precision, device)
    plain_kind, plain = untuned(stage, precision, device)
    assert kind == plain_kind
    for tuned_weight, weight in zip(ours, plain, strict=True):
        torch.testing.assert_close(tuned_weight, weight, rtol=1e-6, atol=1e-7)
    assert gc.isenabled()


def test_a_teacher_without_optimizer_comes_up_under_stage_3(device: torch.device):
    config = config_of({"zero_optimization": {"stage3_param_persistence_threshold": 0}}, stage=3)
    engine, *_ = quiet_deepspeed().initialize(model=nn.Linear(3, 2).to(device), config=config, dist_init_required=False)
    assert engine(torch.ones(1, 3, device=device)).shape == (1, 2)
    engine.destroy()


def test_ours_and_the_users_are_merged():
    own = {"zero_optimization": {"reduce_bucket_size": 1000}, "comms_logger": {"enabled": False}, "log_level": "error"}
    config = config_of(own, stage=2, precision="bf16", micro_batch=4, accumulate=3, world=2)
    assert config["train_batch_size"] == 24
    assert config["train_micro_batch_size_per_gpu"] == 4
    assert config["gradient_accumulation_steps"] == 3
    assert config["zero_optimization"] == {"stage": 2, "reduce_bucket_size": 1000, "compute_grad_norm": False}
    assert config["bf16"] == {"enabled": True, "check_grad_overflow": False}
    assert config["communication_data_type"] == config["data_types"]["grad_accum_dtype"] == "fp32"
    assert config["comms_logger"] == {"enabled": False}
    assert "bf16" not in config_of({}, precision="autocast")


@pytest.mark.parametrize("path", sorted(REFUSED))
def test_refused(path: str):
    own: Any = True
    for part in reversed(path.split(".")):
        own = {part: own}
    with pytest.raises(DeepSpeedConfigError) as caught:
        config_of(own)
    assert f"engine.deepspeed.{path}: " in str(caught.value)


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"optimizer": {"type": "Adam"}}, r"engine\.deepspeed\.optimizer: set optimizer\.name"),
        ({"gradient_clipping": 1.0}, r"optimizer\.clip "),
        ({"scheduler": {}}, r"optimizer\.warmup"),
        ({"train_batch_size": 64}, r"set batch .* engine\.accumulate"),
        ({"fp16": {"enabled": True}}, r"set precision to"),
        ({"zero_optimization": {"stage": 2}}, r"zero_optimization\.stage: set engine\.zero"),
        ({"zero_optimization": {"offload_optimizer": {}}}, r"not supported by the segments table"),
        (
            {"zero_optimization": {"stage3_gather_16bit_weights_on_model_save": True}},
            r"\.stage3_gather_16.* own checkp",
        ),
        ({"zero_optimization": {"reduce_bucket_sise": 1}}, r"bucket_sise: .* did you mean 'reduce_bucket_size'"),
        ({"zero_optimization": {"stage3_prefetch_buckets": 1}}, r"did you mean 'stage3_prefetch_bucket_size'"),
        ({"zero_optimisation": {}}, r"zero_optimisation: .* did you mean 'zero_optimization'"),
        ({"gradient_cliping": 1}, r"did you mean 'gradient_clipping'"),
        ({"qqq": 1}, r"free to set are .*zero_optimization"),
        (
            {"zero_optimization": {"reduce_bucket_size": -3}},
            r"zero_optimization\.reduce_bucket_size: .*greater than 0.*-3",
        ),
        ({"zero_optimization": True}, r"zero_optimization: True is no mapping"),
        ({"zero_optimization": {"leaf_module": 3}}, r"zero_optimization: leaf_module .*must be a mapping"),
        ({"wall_clock_breakdown": "yes"}, r"wall_clock_breakdown: 'yes' is neither"),
        ({"log_level": "loud"}, r"'loud' is none of debug"),
        ({"comms_logger": {"enable": True}}, r"comms_logger\.enable: .*did you mean 'enabled'"),
        ({"tensorboard": {"enabled": "maybe"}}, r"tensorboard\.enabled: .*'maybe'"),
        ({"flops_profiler": {"profile_steps": 1}}, r"flops_profiler\.profile_steps: .*'profile_step'"),
        ({"timers": {"thruput": {}}}, r"timers\.thruput: .*'throughput'"),
        ({"timers": {"throughput": False}}, r"timers\.throughput: False is no mapping"),
        ({"timers": {"throughput": {"enabled": 7}}}, r"timers\.throughput\.enabled"),
    ],
)
def test_messages_name_the_key_and_what_to_set_instead(own: dict[str, Any], message: str):
    with pytest.raises(DeepSpeedConfigError, match=message):
        config_of(own)


class Recorder(dict):
    """A mapping that notes what it is asked for."""

    asked: set[str]

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.asked = set()

    def __copy__(self) -> "Recorder":
        return self

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)


def test_every_key_that_deepspeed_reads_is_either_free_or_refused():
    """So that another release with another key fails here, and not by being passed through unseen."""
    deepspeed = quiet_deepspeed()
    flops = Recorder()
    # DeepSpeed asks for keys through `in param_dict.keys()`, so the section that it does so in must be there.
    recorder = Recorder({"train_batch_size": 1, "flops_profiler": flops})
    read = deepspeed.runtime.config.DeepSpeedConfig(recorder)
    assert read.train_batch_size == 1
    assert {"zero_optimization", "data_types", "gradient_clipping"} <= recorder.asked
    assert recorder.asked <= FREE | REFUSED.keys()
    assert flops.asked == set(FLOPS)
    removed = deepspeed.runtime.config._REMOVED_TOP_LEVEL_CONFIG_KEYS
    assert removed.keys() <= REFUSED.keys()
    zero = {path.removeprefix("zero_optimization.") for path in REFUSED if path.startswith("zero_optimization.")}
    fields = set(deepspeed.runtime.zero.config.DeepSpeedZeroConfig.model_fields)
    assert fields == FREE_ZERO | zero - deepspeed.runtime.config._REMOVED_ZERO_CONFIG_KEYS.keys()
    assert not FREE_ZERO & zero
    assert zero >= deepspeed.runtime.config._REMOVED_ZERO_CONFIG_KEYS.keys()
    assert not FREE & REFUSED.keys()


def test_the_fields_that_messages_name_exist():
    """`set a.b instead`: every dotted name in a refusal is a field of the recipe."""
    for path, reason in REFUSED.items():
        for named in re.findall(r"\b([a-z_]+\.[a-z_]+)\b", reason):
            section, field = named.split(".")
            model: Any = Recipe.model_fields[section].annotation
            assert field in model.model_fields, f"{path}: {named}"
