"""The catalogue as a run feeds it: names, bounds, cardinality, and that no value can harm a run."""

import math
import sys
import time
from collections import Counter
from typing import Any

import pytest
import torch
from gristmill.objectives.group import GroupConfig
from gristmill.objectives.instance import InstanceConfig
from gristmill.objectives.koleo import koleo
from gristmill.objectives.local_group import LocalGroupConfig
from gristmill.objectives.mixture import Dims, build_objectives
from gristmill.objectives.patch import PatchConfig
from gristmill.objectives.protocol import StepInfo
from gristmill.ops.monitor.catalogue import HEALTH_OF, MEMORIES, OBJECTIVES, PHASES, PROBES, WHO
from gristmill.ops.monitor.labels import STATES
from gristmill.ops.monitor.metrics import Metrics
from gristmill.pipeline.loader import Stats
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

MEMORY = ("fill", "age", "expected_age", "norm", "nonfinite")


def step(**more: Any) -> dict[str, Any]:
    phases = dict.fromkeys(PHASES, 0.01)
    values: dict[str, Any] = {"position": 64, "batch": 32, "loss": 3.0, "grad_norm": 1.5, "lr": 1e-3, "phases": phases}
    values |= {f"loss/{objective}": 1.0 for objective in OBJECTIVES} | {"weight_decay": 0.1, "momentum": 0.99}
    values |= {f"{objective}/{name}": 0.5 for objective in OBJECTIVES for name in HEALTH_OF[objective]}
    values |= {f"memory/{memory}/{what}": 0.5 for memory in MEMORIES for what in MEMORY}
    values |= {"group/teacher_temperature": 0.04, "group/koleo": 0.7, "patch/hidden_ratio": 0.15}
    values |= {"memory/bank/bytes": 0.6, "tokens": 10, "flops": 1e9, "clipped": True, "teacher_updates": True}
    return values | {"step": 2, "progress": 0.5, "crops": 192, "trained": 64} | more


def everything(metrics: Metrics) -> None:
    """Feeds every name of the catalogue, as one rank with a GPU, a cache and shards behind a network would."""
    for name, values in metrics._places.items():
        if values[0].kind != "add":
            metrics.observe({name: 1.0})
    for state in STATES:
        metrics.observe_state(state)
    metrics.observe({"rollbacks": 1})
    metrics.observe_step(step(**{f"weight/{objective}": 1.0 for objective in OBJECTIVES}, bad_in_a_row=0))
    metrics.observe_loader(Stats())
    for who in WHO:
        metrics.observe_probe({"who": who, "position": 64, **dict.fromkeys(PROBES, 0.5)})
    metrics.observe_checkpoint(ok=True, seconds=1.0, size=10)
    metrics.observe_checkpoint(ok=False)


def series(metrics: Metrics) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    families = text_string_to_metric_families(generate_latest(metrics.registry).decode())
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return series(metrics).get((name, tuple(sorted(labels.items()))))


def test_a_step_is_seen():
    metrics = Metrics("first", {"world": 1})
    before = time.time()
    metrics.observe_step(step(bad=[]))
    metrics.observe_step(step(bad=["group", "gradient"], loss=math.nan))
    assert value(metrics, "gristmill_steps_total") == 2
    assert value(metrics, "gristmill_bad_steps_total") == 1
    assert value(metrics, "gristmill_images_total") == 64
    assert value(metrics, "gristmill_position_samples") == 64
    assert value(metrics, "gristmill_loss", objective="local_group") == 1.0
    assert math.isnan(value(metrics, "gristmill_mixture_loss") or 0.0)
    assert value(metrics, "gristmill_step_phase_seconds_total", phase="ema") == pytest.approx(0.02)
    assert value(metrics, "gristmill_step_seconds_sum") == pytest.approx(2 * 0.01 * len(PHASES))
    assert value(metrics, "gristmill_data_wait_ratio") == pytest.approx(1 / len(PHASES))
    assert (value(metrics, "gristmill_last_step_timestamp_seconds") or 0) >= before
    assert value(metrics, "gristmill_run_info", run="first", world="1") == 1
    assert metrics.unknown == set()


def test_every_log_of_the_objectives_has_its_metric():
    """The names are agreed on by nothing but this test: real objectives, one step, no name left over."""
    generator = torch.Generator().manual_seed(0)
    configs = {
        "instance": InstanceConfig.model_validate({"queue": 16}),
        "local_group": LocalGroupConfig.model_validate({"queue": 16, "memory": 16, "neighbours": 2}),
        "group": GroupConfig.model_validate({"koleo": 0.1}),
        "patch": PatchConfig.model_validate({}),
    }
    mixture = build_objectives(configs, dims=Dims(8, 4, 4, 6, 6), seed=0)
    widths = {"instance": 4, "local_group": 4, "group": 6, "memory_row": 8, "class_token": 8}
    outputs = {name: torch.randn(8, width, generator=generator) for name, width in widths.items()}
    masks = torch.zeros(8, 2, 2, dtype=torch.bool)
    masks[::2, 0] = True  # 8 of 32 patches
    outputs |= {"patch": torch.randn(8, 6, generator=generator), "patch_mean": torch.zeros(1, 6)}
    info = StepInfo(batch=4, student_crops=2, student_globals=2, teacher_crops=2, same_views=True, masks=masks)
    outcome = mixture.loss(outputs, outputs, info)
    mixture.commit(outcome)
    metrics = Metrics("first", {}, objectives=configs)
    metrics.observe_step({name: float(number) for name, number in outcome.logs.items()})
    assert metrics.unknown == set()
    filled = {labels[0][1] for name, labels in series(metrics) if name == "gristmill_memory_fill_ratio"}
    assert filled == {"instance.queue", "local_group.queue", "local_group.student", "local_group.teacher"}
    assert filled < set(MEMORIES)
    assert value(metrics, "gristmill_teacher_temperature", objective="group") == pytest.approx(0.04)
    assert value(metrics, "gristmill_hidden_patches_ratio", objective="patch") == pytest.approx(0.25)
    spread = koleo(outputs["class_token"], 4)
    assert value(metrics, "gristmill_koleo_loss", objective="group") == pytest.approx(float(spread))


def test_the_data_wait_ratio_follows_recent_steps():
    metrics = Metrics("first", {})
    for _ in range(100):
        metrics.observe_step({"phases": {"data_wait": 0.0, "forward": 1.0}})
    for _ in range(32):
        metrics.observe_step({"seconds": 2.0, "phases": {"data_wait": 1.0, "forward": 1.0}})
    assert value(metrics, "gristmill_data_wait_ratio") == pytest.approx(32 / (32 * 2 + 32))


def test_gauges_appear_with_their_first_value_and_counters_at_once():
    metrics = Metrics("first", {})
    assert value(metrics, "gristmill_checkpoint_last_success_timestamp_seconds") is None
    assert value(metrics, "gristmill_gradient_norm") is None
    assert value(metrics, "gristmill_checkpoints_total", result="failed") == 0
    metrics.observe_checkpoint(ok=False)
    assert value(metrics, "gristmill_checkpoint_last_success_timestamp_seconds") is None
    metrics.observe_checkpoint(ok=True, seconds=2.0, size=1000)
    assert value(metrics, "gristmill_checkpoint_last_success_timestamp_seconds") == pytest.approx(time.time(), abs=60)
    assert value(metrics, "gristmill_checkpoint_size_bytes") == 1000
    assert value(metrics, "gristmill_checkpoints_total", result="failed") == 1
    assert value(metrics, "gristmill_step_phase_seconds_total", phase="checkpoint") == 0.0  # written beside the step


def test_one_state_at_a_time():
    metrics = Metrics("first", {})
    assert value(metrics, "gristmill_state", state="starting") == 1.0
    metrics.observe_state("training")
    metrics.observe_state("probing")
    metrics.observe_state("made up")
    on = [state for state in STATES if value(metrics, "gristmill_state", state=state) == 1.0]
    assert on == ["probing"]
    assert len(STATES) == sum(name == "gristmill_state" for name, _ in series(metrics))


def test_late_counters_are_there_once_they_are_told():
    metrics = Metrics("first", {})
    assert value(metrics, "gristmill_cache_hits_total") is None
    assert value(metrics, "gristmill_wall_seconds_total", state="lost") is None
    metrics.observe({"hits": 0}, "cache/")
    metrics.observe({"lost": 12.5, "productive": 100.0}, "spent/")
    assert value(metrics, "gristmill_cache_hits_total") == 0.0
    assert value(metrics, "gristmill_wall_seconds_total", state="productive") == 100.0
    metrics.observe({"lost": 13.0}, "spent/")
    assert value(metrics, "gristmill_wall_seconds_total", state="lost") == 13.0


def test_own_seconds_are_what_a_rank_does_alone():
    metrics = Metrics("first", {})
    metrics.observe_step({"phases": {"data_wait": 1.0, "forward": 2.0, "verdict": 4.0}})
    assert value(metrics, "gristmill_rank_own_seconds_total") == 3.0
    metrics.observe_step({"phases": {"data_wait": 1.0, "forward": 0.1}, "own_seconds": 2.5})  # a GPU's own clock
    assert value(metrics, "gristmill_rank_own_seconds_total") == 5.5


def test_running_totals_become_counters_also_when_they_start_again():
    metrics = Metrics("first", {})
    metrics.observe_loader(Stats(samples=10, starved_seconds=0.5, ready_depth=1, quarantined=3))
    metrics.observe_loader(Stats(samples=25, starved_seconds=0.5, ready_depth=2, quarantined=3))
    metrics.observe_loader(Stats(samples=5))
    assert value(metrics, "gristmill_read_samples_total") == 30
    assert value(metrics, "gristmill_buffer_starved_seconds_total", buffer="ready") == 0.5
    assert value(metrics, "gristmill_buffer_depth_batches", buffer="ready") == 0
    assert value(metrics, "gristmill_quarantined_samples") == 0
    assert metrics.unknown == set()
    with pytest.raises(TypeError, match="dataclass of numbers"):
        metrics.observe_loader({"samples": 1})


def test_probes_keep_whose_they_are():
    metrics = Metrics("first", {})
    metrics.observe_probe({"kind": "probe", "who": "chance", "position": 0, "coarse_knn": 0.1})
    metrics.observe_probe({"coarse_knn": 0.4}, seconds=3.0)
    assert value(metrics, "gristmill_probe_ratio", probe="coarse_knn", who="chance") == 0.1
    assert value(metrics, "gristmill_probe_ratio", probe="coarse_knn", who="teacher") == 0.4
    assert value(metrics, "gristmill_step_phase_seconds_total", phase="probe") == 3.0


def test_values_that_are_no_numbers_are_counted_and_change_nothing():
    metrics = Metrics("first", {})
    metrics.observe_step({"batch": math.nan, "crops": -5, "seconds": math.inf, "lr": "fast", "grad_norm": None})
    assert value(metrics, "gristmill_ignored_values_total") == 5
    assert value(metrics, "gristmill_images_total") == value(metrics, "gristmill_crops_total") == 0
    assert value(metrics, "gristmill_step_seconds_count") == 0
    assert metrics.unknown == {"batch", "crops", "seconds", "lr", "grad_norm"}


def test_enumerations_are_checked_when_built():
    with pytest.raises(ValueError, match="cannot be a label value"):
        Metrics("first", {}, objectives=['x"}'])
    with pytest.raises(ValueError, match="two metrics would be fed"):
        Metrics("first", {}, objectives=["loss"], health=["loss"])
    wider = Metrics("first", {}, objectives=["dense"], memories=["dense.queue"])
    wider.observe_step({"loss/dense": 2.0, "loss/instance": 1.0})
    wider.observe({"fill": 0.5, "age": 3.0, "norm": 1.0}, "memory/dense.queue/")
    assert value(wider, "gristmill_loss", objective="dense") == 2.0
    assert value(wider, "gristmill_memory_age_steps", memory="dense.queue") == 3.0
    assert wider.unknown == {"loss/instance"}


def test_the_info_holds_no_secret_and_no_control_character():
    metrics = Metrics("a\x1b[31mb\n", {"data": "s3://key:hunter2@bucket/x?X-Amz-Signature=hunter2", "long": "x" * 500})
    text = generate_latest(metrics.registry).decode()
    assert "hunter2" not in text
    assert "\x1b" not in text
    assert value(metrics, "gristmill_run_info", run="a?[31mb?", data="s3://bucket/x", long="x" * 120) == 1
    with pytest.raises(ValueError, match="16 at most"):
        Metrics("first", {f"x{i}": "" for i in range(17)})
    with pytest.raises(ValueError, match="cannot be a label"):
        Metrics("first", {"Bad-Name": ""})


def test_a_step_is_cheap():
    """By the calls that it makes, which a busy machine does not change: few a value, and no child is looked up again."""
    metrics = Metrics("first", {})
    row = step()
    metrics.observe_step(row)
    called: Counter[str] = Counter()

    def count(frame: Any, event: str, _: object) -> None:
        if event == "call":
            called[frame.f_code.co_name] += 1

    sys.setprofile(count)
    try:
        metrics.observe_step(row)
    finally:
        sys.setprofile(None)
    values = len(row) + len(PHASES)
    assert called["labels"] == called["_action"] == 0, called
    assert values <= called.total() <= 8 * values, called
    assert value(metrics, "gristmill_steps_total") == 2
