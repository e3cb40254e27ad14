"""`gristmill plan` against runs that were measured: the peak within a tenth, under each ZeRO stage."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from gristmill.ops.bench.steps import IMAGES
from gristmill.ops.planning.hollow import networks
from gristmill.ops.planning.memory import Memory, memory
from gristmill.ops.planning.parameters import weights
from gristmill.ops.planning.states import states
from gristmill.ops.planning.trace import run

from ..workers import Workers
from .measured_memory import recipe_of

WIDE = ("student.embed_dim=192", "student.depth=3", "batch=8")
SMALL_BUCKET = "engine.deepspeed.zero_optimization.reduce_bucket_size=1000000"
CASES = {
    "mugs": ("mugs-vits16-100", *WIDE),
    "ibot, masks, autocast": ("ibot-vits16-800", *WIDE, "precision=autocast"),
    "moco v3, ResNet, LARS": ("moco-v3-r50-300", "batch=8", "student.embed_dim=128"),
    "mugs, recomputed, bf16": ("mugs-vits16-100", *WIDE, "precision=bf16", "engine.recompute=true"),
    "mugs, ZeRO 1": ("mugs-vits16-100", *WIDE, "engine.zero=1", SMALL_BUCKET),
    "mugs, ZeRO 3": ("mugs-vits16-100", *WIDE, "engine.zero=3", SMALL_BUCKET),
}
MEASURE = """
import sys
sys.path.insert(0, root)
sys.argv[1:] = [cases]
from tests.ops.measured_memory import main
main()
"""


@pytest.fixture(scope="module")
def measured(workers: Workers) -> dict[str, dict[str, int]]:
    """All cases in one process of their own."""
    process = workers.start(MEASURE, root=str(Path(__file__).parents[2]), cases=json.dumps(list(CASES.values())))
    assert process.join() == 0, process.output()[-3000:]
    lines = [json.loads(line) for line in process.output().splitlines() if line.startswith("{")]
    return dict(zip(CASES, lines, strict=True))


def planned(case: str) -> Memory:
    recipe = recipe_of(*CASES[case])
    nets = networks(recipe, IMAGES)
    counted = weights(nets.student, nets.teacher, 2)
    stage = 0 if recipe.engine.zero == "auto" else recipe.engine.zero
    trace = run(recipe, recipe.batch, "cpu", IMAGES, cut=stage == 3)
    return memory(recipe, states(recipe, counted, stage, 1), trace, nets, world=1, decoded=0.0, dali=False)


@pytest.mark.parametrize("case", CASES)
def test_the_peak_is_that_of_a_real_run(case: str, measured: dict[str, dict[str, int]]):
    found, told = measured[case], planned(case)
    peak = told.peak - told.parts["batches ready"]  # on a CPU they are no device's, and here nobody makes any
    assert told.held == pytest.approx(found["rest"] + found["rows"], rel=0.1)
    assert peak == pytest.approx(found["peak"] + found["rows"], rel=0.1)
    # What a step adds is what plan says it adds, not hidden by what is held.
    assert peak - told.held == pytest.approx(found["peak"] - found["rest"], rel=0.2)
