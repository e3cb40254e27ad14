"""`gristmill plan`: what fits, what does not and what would, machines by name, and every recipe."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from gristmill.ops.cli import main
from gristmill.ops.engine import resolve_stage
from gristmill.ops.planning import (
    GPUS,
    AssumptionError,
    Assumptions,
    HardwareError,
    PlanError,
    Setting,
    hardware,
    judge,
    plan,
)
from gristmill.ops.planning.fitting import built, micro_of
from gristmill.ops.planning.hardware import GIB
from gristmill.ops.planning.pages import BEGIN, END, row, written
from gristmill.ops.planning.pages import GPUS as COUNTS
from gristmill.ops.planning.pages import RECIPES as IN_TABLE
from gristmill.ops.planning.parameters import Weights
from gristmill.ops.planning.speed import speed
from gristmill.ops.planning.states import states
from gristmill.ops.planning.trace import Trace
from gristmill.ops.recipe import RECIPES, Recipe, load_recipe

SHIPPED = sorted(path.stem for path in RECIPES.glob("*.yaml"))
PAGE = Path(__file__).parents[2] / "docs" / "plan.md"
PLAIN = Assumptions(reserve=0.0, fragments=0.0)
WEIGHTS = Weights({"backbone": 1000, "predictors": 200}, {"backbone": 1000}, 1200, 1000, 0, (((0, 1000),), ((1, 200),)))


def tiny(*overrides: str, name: str = "mugs-vits16-100") -> Recipe:
    return load_recipe(name, overrides, tiny=True)  # nothing else changed, so that traces of one recipe are shared


def on(gpus: int, memory: float = 80.0) -> Setting:
    return Setting(hardware(f"h100-80 memory={memory}", gpus), PLAIN, 65536)


@pytest.mark.parametrize("name", SHIPPED)
def test_every_recipe_can_be_planned(name: str):
    recipe = load_recipe(
        name, ["batch=32"], tiny=True
    )  # its networks small, its views, objectives and optimizer as they are
    judged = judge(recipe, Setting(hardware("h100-80", 1), Assumptions(), 65536))
    assert judged.fits
    assert judged.memory.peak >= judged.memory.held + judged.trace.peak
    assert judged.trace.flops["backward"] > judged.trace.flops["student"] > 0
    micro_of(load_recipe(name), 1)  # raises where its own batch cannot be shared


@pytest.mark.parametrize("precision", ["fp32", "autocast", "bf16"])
def test_what_each_stage_keeps(precision: str):
    recipe, n = tiny(f"precision={precision}"), 4
    p, t, low = 1200, 1000, precision == "bf16"
    width = 2 if low else 4
    held = [states(recipe, WEIGHTS, stage, n).held for stage in range(4)]
    assert [part["optimizer states"] for part in held] == [8 * p, 2 * p, 2 * p, 2 * p]
    assert [part.get("fp32 masters", 0) for part in held] == [4 * p if low else 0, p, p, p]
    assert [part["weights, teacher"] for part in held] == [width * t] * 3 + [width * t / n]
    # Of ZeRO 3, too small weights stay whole: here all of them do.
    assert [part["weights, student"] for part in held] == [width * p] * 3 + [width * p / n + width * p]
    assert [part.get("EMA shadow", 0) for part in held] == ([4 * t] + [t] * 3 if low else [0] * 4)
    assert states(recipe, WEIGHTS, 0, 1).sent == {}
    assert [states(recipe, WEIGHTS, stage, n).overlap for stage in range(4)] == [False, False, False, True]


def test_buckets_are_as_large_as_the_recipe_says():
    small = tiny("engine.deepspeed.zero_optimization.reduce_bucket_size=1000")
    for stage in (1, 2):
        assert states(tiny(), WEIGHTS, stage, 4).backward["buckets"] == 4 * 500_000_000
        assert states(small, WEIGHTS, stage, 4).backward["buckets"] == 4 * 1000
    double = tiny("engine.deepspeed.zero_optimization.overlap_comm=true")
    assert states(double, WEIGHTS, 2, 4).backward["buckets"] == 8 * 500_000_000


def test_time_is_a_sum_of_what_bounds_it():
    recipe = tiny()
    trace = Trace(0, 0, 0, 0, {}, {"student": 1e12, "backward": 2e12}, traffic=3e9, kernels=1000)
    machine, assumed = hardware("h100-80", 16), Assumptions()

    def told(assumed: Assumptions = assumed, gpus: int = 16):
        there = replace(machine, gpus=gpus)
        return speed(recipe, there, trace, states(recipe, WEIGHTS, 1, gpus), WEIGHTS, assumed, 1, 1e9)

    found = told()
    assert found.step == pytest.approx(sum(found.seconds.values()))
    assert found.seconds["products"] == pytest.approx(3e12 / (67e12 * 0.5))  # fp32
    assert found.seconds["other operators"] == pytest.approx(3e9 / (3350e9 * 0.75))
    assert found.images == pytest.approx(recipe.batch / found.step)
    # Two nodes: round the ring, each byte but a sixteenth is sent once for an all-gather, twice for an all-reduce.
    assert found.sent["all-reduce"] == pytest.approx(2 * 15 / 16 * 4 * 1200)
    assert found.seconds["sending"] == pytest.approx(sum(found.sent.values()) / (400e9 * 0.75))
    assert told(gpus=8).seconds["sending"] < found.seconds["sending"]  # inside a node
    assert told(replace(assumed, launch=1e-3)).seconds["launches"] > 0.5
    assert told(replace(assumed, efficiency=0.25)).seconds["products"] == pytest.approx(2 * found.seconds["products"])


def test_what_cannot_fit_is_refused_with_what_would():
    settled = tiny("batch=64", "engine.zero=1")
    peak = judge(settled, on(2)).memory.peak
    tight = on(2, 0.6 * peak / GIB)
    found = plan(settled, tight)
    assert not found.fits
    assert found.judged.over == pytest.approx(0.4 * peak, rel=0.01)
    assert found.judged.memory.largest == "buckets"  # 2 GB, whatever the model's size
    assert found.proposals
    for proposal in found.proposals:  # each is what it is typed as, and then fits
        words = [word for word in shlex.split(proposal.change) if "=" in word]
        again = tiny("batch=64", "engine.zero=1", *words)
        then = judge(again, replace(tight, hardware=replace(tight.hardware, gpus=proposal.gpus)))
        assert then.fits
        assert then.memory.peak == pytest.approx(proposal.peak)


def test_activations_are_brought_down_by_recomputing_or_accumulating():
    # The batches that lie ready are as large however they are fed.
    large = ("student.embed_dim=128", "student.depth=12", "stream.prefetch=1")
    wide = tiny(*large, "batch=32", "engine.zero=0", "stream.augment=cpu")
    judged = judge(wide, on(1))
    assert judged.memory.largest == "activations"
    found = plan(wide, on(1, 0.7 * judged.memory.peak / GIB))
    assert {"engine.recompute=true", "engine.accumulate=2"} <= {proposal.change for proposal in found.proposals}
    assert 0 < found.largest < 32


def test_the_largest_micro_batch_fits_and_one_more_does_not():
    recipe = tiny("engine.zero=0")
    setting = on(1, 1.7 * judge(recipe, on(1)).memory.peak / GIB)
    largest = plan(recipe, setting, brief=True).largest
    assert largest > 32
    assert judge(recipe.model_copy(update={"batch": largest}), setting).fits
    assert not judge(recipe.model_copy(update={"batch": largest + 1}), setting).fits


def test_a_batch_that_cannot_be_shared_names_one_that_can():
    with pytest.raises(PlanError, match=r"1008 images cannot be shared .*32 GPUs; try batch=992 or batch=1024"):
        judge(load_recipe("multigrain-vitb16"), on(32))
    with pytest.raises(PlanError, match=r"groups of 64 .* at most 4 GPUs"):
        micro_of(load_recipe("swav-r50-200-bs256"), 8)


def test_the_billion_weights_want_zero_3():
    recipe = load_recipe("multigrain-vitg16")
    assert recipe.engine.zero == "auto"
    student = built(recipe)[0].student
    assert [resolve_stage(recipe, student, world) for world in (1, 64)] == [0, 3]


def test_the_command_says_it_in_tables_or_json():
    words = ["plan", "mugs-vits16-100", "batch=32", "--tiny", "--gpus", "2", "--images", "65536"]
    shown = CliRunner().invoke(main, words, env={"COLUMNS": "160"})
    assert shown.exit_code == 0, shown.output
    for part in ("local-group transformer", "ZeRO 3", "images a second", "GPU-hours", "It fits"):
        assert part in shown.output
    told = json.loads(CliRunner().invoke(main, [*words, "--json"]).stdout)
    assert told["fits"]
    assert told["zero"] == {"asked": "auto", "stage": 1}
    assert told["batch"]["micro"] == 16
    assert told["gpu_hours"] == pytest.approx(48 * told["days"])
    tight = [*words, "--gpu", "h100-80 memory=1", "--assume", "reserve=0"]
    refused = CliRunner().invoke(main, tight, env={"COLUMNS": "160"})
    assert refused.exit_code == 2
    assert "It does not fit" in refused.output
    assert "buckets" in refused.output
    assert "reduce_bucket_size=50000000" in refused.output


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("h10-80", "did you mean 'h100-80'"),
        ("custom memory=80", "flops="),
        ("h100-80 memori=3", "did you mean 'memory'"),
        ("h100-80 memory=lots", "no number"),
        ("h100-80 memory=-1", "above 0"),
    ],
)
def test_a_machine_that_is_mistaken_is_named(text: str, words: str):
    with pytest.raises(HardwareError, match=words):
        hardware(text, 8)


def test_machines():
    machine = hardware("custom memory=40,flops=100,bandwidth=900,link=50", 12, 4, network=10)
    assert (machine.nodes, machine.bus, machine.gpu.memory) == (3, 10e9, 40 * GIB)
    assert hardware("v100-32", 8).bus == GPUS["v100-32"].link
    for wrong, words in (("efficency=1", "did you mean 'efficiency'"), ("wire=2", "share"), ("core=0", "above 0")):
        with pytest.raises(AssumptionError, match=words):
            Assumptions().replaced([wrong])


def test_the_page_holds_what_the_code_prints():
    """Of every recipe a row is there; one that is quick to make anew is the same to the letter."""
    page = PAGE.read_text()
    lines = page.partition(BEGIN)[2].partition(END)[0].strip().splitlines()
    assert [line.split("|")[1].strip(" `") for line in lines[2:]] == [name for name in IN_TABLE for _ in COUNTS]
    assert row("dino-vits16-100", 32) in lines
    assert written(page, lines) == page
