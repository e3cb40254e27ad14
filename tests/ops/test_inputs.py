"""What the networks are fed besides pixels, however a global batch is cut: weak flags as the pipeline drew the crops."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from gristmill.ops.inputs import Inputs
from gristmill.ops.recipe import Recipe, RecipeError, load_recipe
from gristmill.pipeline.draws import draw
from gristmill.pipeline.masks import draw_masks
from gristmill.pipeline.plan import Plan


def recipe(*more: str) -> Recipe:
    """The demo with Mugs' fourteen views."""
    own = ["views=mugs", "batch=24", "seed=3", "student.patch_size=8", "student.image_size=32", *more]
    sizes = ["views.teacher.size=32", "views.global.size=32", "views.local.size=16"]
    return load_recipe("demo", [*own, *sizes])


@pytest.mark.parametrize(("world", "parts"), [(1, 1), (2, 1), (3, 2), (1, 4)])
def test_weak_flags_are_those_of_the_draws_in_position_order(world: int, parts: int):
    made, at = recipe(f"engine.accumulate={parts}", "stream.seed=9"), 480
    flags = []
    for rank in range(world):
        inputs = Inputs(made, rank, world, "cpu")
        for part in range(parts):
            weak = inputs.info(at, 0.0, part).weak
            assert weak is not None
            assert weak.shape == (inputs.micro,)
            flags.append(weak)
    plan = Plan(made.views)
    draws = draw(plan, 9, np.arange(at, at + 24), np.full((24, 2), 64))
    strong = draws.column("strong")[:, plan.columns["global"].start]
    assert torch.cat(flags).tolist() == (strong == 0).tolist()
    assert 0 < strong.sum() < 24


def test_without_a_strong_form_there_are_no_flags():
    inputs = Inputs(load_recipe("demo"), 0, 1, "cpu")
    assert inputs.info(0, 0.0).weak is None
    assert Inputs(recipe("views.global.strong=null"), 0, 1, "cpu").info(0, 0.0).weak is None


def ibot(*more: str) -> Recipe:
    """The demo learning iBOT's way: DINO's form of the group objective, and hidden patches."""
    own = ["objectives.instance=null", "objectives.local_group=null", "objectives.group={form: dino}"]
    return load_recipe("demo", [*own, "objectives.patch={}", "objectives.add=sum", "seed=3", "batch=12", *more])


def test_masks_are_drawn_by_position_crop_by_crop():
    made, at = ibot("engine.accumulate=2"), 240
    whole = Inputs(ibot(), 0, 1, "cpu").info(at, 0.5).masks
    assert whole is not None
    assert whole.shape == (24, 4, 4)
    assert whole.device.type == "cpu"
    shares = []
    for rank in range(3):
        for part in range(2):
            masks = Inputs(made, rank, 3, "cpu").info(at, 0.5, part).masks
            assert masks is not None
            shares.append(masks.view(2, 2, 4, 4))
    assert torch.equal(torch.cat(shares, 1).flatten(0, 1), whole)
    crops = draw_masks(3, np.arange(at, at + 12), range(2), (4, 4), made.masks)
    assert torch.equal(whole, torch.from_numpy(crops).transpose(0, 1).flatten(0, 1))
    assert not torch.equal(whole[:12], whole[12:])
    inputs = Inputs(made, 0, 1, "cpu")
    context = inputs.masked(inputs.info(at, 0.5))
    assert torch.equal(context["patch.index"], context["patch.masks"].flatten().nonzero().squeeze(1))


def test_masks_begin_when_the_recipe_says():
    inputs = Inputs(ibot("objectives.patch.start=0.25"), 0, 1, "cpu")
    early, late = inputs.info(0, 0.2).masks, inputs.info(0, 0.25).masks
    assert early is not None
    assert late is not None
    assert not early.any()
    assert late.any()
    plain = Inputs(load_recipe("demo"), 0, 1, "cpu")
    assert plain.info(0, 0.0).masks is None
    assert plain.masked(plain.info(0, 0.0)) == {}


@pytest.mark.parametrize("override", ["views.global.role=teacher", "views.local.role=both", "views.local.size=32"])
def test_patches_are_told_of_crops_that_the_teacher_sees_whole(override: str):
    with pytest.raises(RecipeError, match=r"objectives\.patch: the teacher must see the very crops"):
        ibot(override)


def test_balance_over_a_batch_ties_a_run_to_its_ranks_unless_it_is_cut():
    assert ibot().elastic == "any"
    assert ibot("objectives.group.balance=sinkhorn").elastic == "same_topology"
    assert ibot("objectives.group.koleo=0.1", "objectives.group.virtual_batch=4").elastic == "any"
    with pytest.raises(RecipeError, match=r"virtual_batch: 5 does not divide batch 12"):
        ibot("objectives.group.koleo=0.1", "objectives.group.virtual_batch=5")


def test_a_step_that_is_only_asked_its_place_draws_nothing():
    inputs = Inputs(ibot("views.global.strong=mugs", "views.global.weak_p=0.5"), 0, 1, "cpu")
    drawn, place = inputs.info(24, 0.5), inputs.info(24, 0.5, drawn=False)
    assert drawn.masks is not None
    assert drawn.weak is not None
    assert (place.masks, place.weak) == (None, None)
    assert replace(drawn, masks=None, weak=None) == place
