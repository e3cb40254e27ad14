"""Recipes: what is shipped is valid, mistakes are named with their remedy, overrides and --tiny change only what they say."""

from pathlib import Path

import pytest
import yaml
from gristmill.ops.recipe import RECIPES, Recipe, RecipeError, dump_recipe, load_recipe
from pydantic import ValidationError

SHIPPED = sorted(path.stem for path in RECIPES.glob("*.yaml"))


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipes_are_valid_short_and_shrink(name: str):
    recipe = load_recipe(name)
    assert len((RECIPES / f"{name}.yaml").read_text().splitlines()) <= 40
    tiny = load_recipe(name, tiny=True)
    assert tiny.images <= 2048
    assert tiny.student.depth == (1 if tiny.student.resnet else 2)
    assert (tiny.student.prototypes, tiny.student.head_hidden, tiny.student.predictor_hidden) <= (512, 256, 256)
    for objective in (tiny.objectives.instance, tiny.objectives.local_group):
        assert objective is None or objective.queue <= 1024
    assert tiny.objectives.names() == recipe.objectives.names()
    assert [view.augment for view in tiny.views] == [view.augment for view in recipe.views]


@pytest.mark.parametrize("name", SHIPPED)
def test_a_resolved_recipe_reads_back_equal(name: str, tmp_path: Path):
    recipe = load_recipe(name, ["optimizer.lr=0.003", "data=somewhere"])
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(tmp_path / "recipe.yaml") == recipe


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optimiser.lr=1", ["optimiser", "unknown key", "'optimizer'"]),
        ("optimizer.learning_rate=1", ["optimizer.learning_rate", "unknown key"]),
        ("optimizer.warm_up=0.1", ["optimizer.warm_up", "'warmup'"]),
        ("views.global.sise=64", ["views.0.sise", "'size'"]),
        ("views.globl.size=64", ["'globl'", "global", "local"]),
        ("views.global.size=33", ["views.global.size", "33", "patch_size"]),
        ("objectives.instance.que=9", ["objectives.instance.que", "'queue'"]),
        ("objectives.weights.dense=1", ["dense", "instance"]),
        ("images=12", ["images", "one batch"]),
        ("images=many", ["images: 'many' is no whole number"]),
        ("optimizer.lr=fast", ["optimizer.lr: 'fast' is no number"]),
        ("optimizer.lr=-1", ["optimizer.lr: -1 should be greater than 0"]),
        ("metrics.port=foo", ["metrics.port: 'foo' should be a whole number, or 'off'"]),
        ("precision=fp64", ["precision: 'fp64' should be 'fp32', 'autocast' or 'bf16'"]),
        ("checkpoint.asynchronous=maybe", ["checkpoint.asynchronous: 'maybe' should be true or false"]),
        ("images=", ["images: nothing is no whole number"]),
        ("student=vit", ["student: 'vit' is no mapping of keys to values"]),
        ("data=[{weight: 1}]", ["data.0.path: it has to be given"]),
        ("metrics.port=99999", ["99999", "65535"]),
        ("nonsense", ["key=value"]),
    ],
)
def test_a_mistake_is_named_with_its_remedy(override: str, words: list[str]):
    with pytest.raises(RecipeError) as caught:
        load_recipe("demo", [override])
    for word in words:
        assert word in str(caught.value)
    assert "demo.yaml" not in str(caught.value), "the file is not to blame"
    assert "Input should" not in str(caught.value)


def test_what_the_command_line_did_is_put_down_to_it(tmp_path: Path):
    tree = yaml.safe_load((RECIPES / "demo.yaml").read_text())
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(tree | {"batch": "few"}))
    mistakes = [
        ((), f"{path}:\n  batch: 'few' is no whole number"),
        (["batch=32", "optimiser.lr=1"], "on the command line: optimiser: unknown key; did you mean 'optimizer'?"),
        (["threads=x"],
         f"{path}:\n  batch: 'few' is no whole number\non the command line: threads: 'x' is no whole number"),
        (["batch=no one", "threads=x"],
         "on the command line:\n  batch: 'no one' is no whole number\n  threads: 'x' is no whole number"),
        (["views=mug"], "on the command line: views: no set of views 'mug': did you mean 'mugs'? there are "),
    ]  # fmt: skip
    for overrides, message in mistakes:
        with pytest.raises(RecipeError) as caught:
            load_recipe(path, overrides)
        assert str(caught.value).startswith(message), overrides


def test_a_mistake_shows_no_password_and_no_page_of_text():
    with pytest.raises(RecipeError) as caught:
        load_recipe("demo", ["seed=http://user:canary@host/", f"batch={'x' * 1000}"])
    assert "'http://host/' is no whole number" in str(caught.value)
    assert len(str(caught.value)) < 300


MUGS = "'mugs-vitb16-400', 'mugs-vitl16-250', 'mugs-vits16-100', 'mugs-vits16-300', 'mugs-vits16-800'?"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dmeo", "no recipe 'dmeo': did you mean 'demo'?"),
        ("mugs", f"no recipe 'mugs': that is a family; did you mean {MUGS}"),
        ("mgus", f"no recipe 'mgus': did you mean {MUGS}"),
        ("Mug", f"no recipe 'Mug': did you mean {MUGS}"),
        ("moco-v2", "no recipe 'moco-v2': that is a family; did you mean 'moco-v2-r50-200', 'moco-v2-r50-800'?"),
        ("byol", "no recipe 'byol': did you mean 'byol-r50-1000'?"),
        ("mugs_vits16_100", "no recipe 'mugs_vits16_100': did you mean 'mugs-vits16-100'?"),
        ("nowhere.yaml", "no recipe 'nowhere.yaml': there is no such file"),
        ("recipes/mine", "no recipe 'recipes/mine': there is no such file"),
        ("/tmp/", "no recipe '/tmp/': that is a folder; give a YAML file"),
        ("xyz", f"no recipe 'xyz': shipped are {', '.join(SHIPPED)}, or give a YAML file"),
    ],
)
def test_an_unknown_recipe_names_the_nearest(name: str, message: str):
    with pytest.raises(RecipeError) as caught:
        load_recipe(name)
    assert str(caught.value) == message


def test_overrides_reach_lists_and_nested_keys():
    recipe = load_recipe("demo", ["views.local.count=6", "views.0.scale=[0.3, 0.9]", "metrics.port=off"])
    assert recipe.views[1].count == 6
    assert recipe.views[0].scale == (0.3, 0.9)
    assert recipe.metrics.port == "off"


def test_views_can_be_given_by_name(tmp_path: Path):
    tree = yaml.safe_load((RECIPES / "demo.yaml").read_text()) | {"views": "mugs"}
    tree["student"] |= {"image_size": 224, "patch_size": 16}
    (tmp_path / "named.yaml").write_text(yaml.safe_dump(tree))
    recipe = load_recipe(tmp_path / "named.yaml")
    assert [(v.name, v.count, v.size, v.role) for v in recipe.views] == [
        ("teacher", 2, 224, "teacher"),
        ("global", 2, 224, "student"),
        ("local", 10, 96, "student"),
    ]
    (tmp_path / "resolved.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(tmp_path / "resolved.yaml") == recipe
    changed = load_recipe(tmp_path / "named.yaml", ["views.local.count=4", "views.local.strong.erase=0.5"])
    assert changed.views[2].count == 4
    assert changed.views[2].strong == recipe.views[2].strong.model_copy(update={"erase": 0.5})  # pyright: ignore
    assert Recipe.model_validate(tree) == recipe
    other = load_recipe(tmp_path / "named.yaml", ["views=dino", "views.local.count=6"])
    assert [(v.name, v.count) for v in other.views] == [("global", 2), ("local", 6)]


def test_a_tiny_recipe_keeps_large_and_small_views_apart(tmp_path: Path):
    tree = yaml.safe_load((RECIPES / "demo.yaml").read_text()) | {"views": "mugs"}
    (tmp_path / "named.yaml").write_text(yaml.safe_dump(tree))
    patch = tree["student"]["patch_size"]
    assert [view.size for view in load_recipe(tmp_path / "named.yaml", tiny=True).views] == [
        4 * patch,
        4 * patch,
        2 * patch,
    ]


def test_an_unknown_set_of_views_names_the_nearest(tmp_path: Path):
    tree = yaml.safe_load((RECIPES / "demo.yaml").read_text()) | {"views": "mug"}
    (tmp_path / "named.yaml").write_text(yaml.safe_dump(tree))
    for tiny in (False, True):
        with pytest.raises(RecipeError, match="views: no set of views 'mug': did you mean 'mugs'"):
            load_recipe(tmp_path / "named.yaml", tiny=tiny)
    with pytest.raises(RecipeError, match="views: no set of views 'mug': did you mean 'mugs'"):
        load_recipe("demo", ["views=mug"])
    with pytest.raises(ValidationError, match="no set of views 'mug'"):
        Recipe.model_validate(tree)


def test_an_objective_can_be_left_out_and_its_head_goes_with_it(tmp_path: Path):
    tree = yaml.safe_load((RECIPES / "demo.yaml").read_text())
    del tree["objectives"]["group"]
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(tree))
    assert load_recipe(tmp_path / "two.yaml").student.objectives == ("instance", "local_group")


def test_the_file_is_no_yaml(tmp_path: Path):
    (tmp_path / "bad.yaml").write_text("name: [")
    with pytest.raises(RecipeError, match="not valid YAML"):
        load_recipe(tmp_path / "bad.yaml")


def test_keys_do_not_get_into_a_recipe():
    with pytest.raises(RecipeError, match="AWS_ACCESS_KEY_ID") as error:
        load_recipe("demo", ["checkpoint.store=s3://key:canary@bucket/prefix"])
    assert "canary" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "count", "wanted"),
    [("simclr-r50", 1, "two crops of"), ("simsiam-r50-100", 1, "two crops or more"), ("npid-r50", 2, "one crop")],
)
def test_crops_that_an_objective_without_a_teacher_cannot_use_are_refused_at_once(name: str, count: int, wanted: str):
    assert load_recipe(name)
    with pytest.raises(RecipeError, match=f"it wants {wanted}.*, not {count}"):
        load_recipe(name, [f"views.global.count={count}"])
