"""The benchmark of objectives compares like with like: its plain step computes the losses that ours does."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from gristmill.ops.bench import dense_forms, forms, objectives, parts, selective_forms, steps
from gristmill.ops.bench.growth_plot import PlotError, draw
from gristmill.ops.cli import main as cli
from gristmill.ops.launch import join, leave


@pytest.fixture(scope="module", autouse=True)
def group():
    threads = torch.get_num_threads()
    join()
    yield
    leave()
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def tiny() -> dict[str, Any]:
    return {"overrides": list(objectives.TINY_STEP), "steps": 1, "threads": 1, "tiny": True, "seconds": 0.0}


def test_the_plain_step_finds_our_losses_before_and_after_an_update() -> None:
    recipe = steps.recipe_of(tiny(), "student.drop_path=0", "objectives.group.student_temperature=0.1")
    ours, plain = steps.OurStep(recipe), steps.plain_of(recipe)
    plain.student.load_state_dict(ours.engine.module.state_dict())
    plain.teacher.load_state_dict(ours.engine.teacher.module.state_dict())
    kept = ours.mixture.objectives
    for name in ("instance", "local_group"):
        plain.queues[name] = kept[name].queue.rows.T.clone()  # pyright: ignore[reportAttributeAccessIssue]
    for who, network in (("student", plain.student), ("teacher", plain.teacher)):
        rows = getattr(kept["local_group"], who).rows
        network.bank.queries, network.bank.keys = rows.clone(), rows.clone()
    crops = steps.crops_of(recipe)
    first = [form.run(*crops) for form in (ours, plain)]
    assert first[0] == pytest.approx(first[1], rel=1e-5)
    for name in ("instance", "local_group"):
        torch.testing.assert_close(plain.queues[name].T, kept[name].queue.rows, atol=1e-6, rtol=0)  # pyright: ignore[reportAttributeAccessIssue]
    torch.testing.assert_close(plain.center, kept["group"].center, atol=1e-6, rtol=0)  # pyright: ignore[reportAttributeAccessIssue]
    second = plain.run(*crops)
    assert second["instance"] < first[1]["instance"] + 1  # it has stepped, and is finite
    assert second != first[1]


def test_the_whole_report(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Everything but the processes: what they would do is done here."""

    def here(module: str, *arguments: str, threads: int) -> dict[str, Any]:
        settings = json.loads(arguments[-1])
        assert threads == settings["threads"] == 1
        if module in ("steps", "parts"):
            return {"steps": measure, "parts": part}[module](arguments[-2], settings)
        if module == "dense_forms":
            return dense_forms.both(arguments[0], settings)
        if module == "selective_forms":
            sizes = selective_forms.Sizes(**{**settings, "levels": tuple(settings["levels"])})
            return forms.measured(selective_forms.form(arguments[0] == "fast", sizes), 0.0)
        return {"forms": forms.forms, "growth": forms.growth}[arguments[1]](arguments[0] == "fast", settings)

    measure, part = steps.measure, parts.measure
    monkeypatch.setattr(steps, "leave", lambda: None)
    monkeypatch.setattr(parts, "leave", lambda: None)
    monkeypatch.setattr(objectives, "_apart", here)
    monkeypatch.setattr(objectives, "STEPS", ("plain", "ours fp32"))
    monkeypatch.setattr(objectives, "LOW", ("backbones bf16",))
    assert objectives.bench_objectives(True, threads=1, steps=1, tiny=True, bf16=True) == 0
    found = json.loads(capsys.readouterr().out)
    granular = {"dense, 4 places", "hierarchy", "hierarchy, 4 local crops"}
    assert found["forms"].keys() == {*forms.FORMS, *granular}
    for leaf in found["forms"].values():
        for way in ("fast", "plain"):
            assert leaf[way]["seconds"] > 0
            assert leaf[way]["memory_MB"] >= 0
    assert found["parts"].keys() == {"all", "instance", "dense", "local_group", "hierarchy", "group"}
    assert found["parts"]["all"]["losses"].keys() == found["parts"].keys() - {"all"}
    assert found["parts"]["all"]["clustering_seconds"] > 0
    assert found["growth"]["queue"].keys() == {"32", "64"}
    leaf = found["growth"]["crops, group"]["4"]
    assert leaf["fast_over_plain"]["seconds"] == leaf["fast"]["seconds"] / leaf["plain"]["seconds"]
    rows = found["step"]["steps"]
    assert rows.keys() == {*objectives.STEPS, *objectives.LOW}
    for what, row in rows.items():
        assert ("over_plain" in row) == what.startswith("ours")
        assert row["GFLOP"] > 0
        assert sum(row["shares"].values()) == pytest.approx(1)
        assert row["shares"]["matrix products"] > 0
    assert rows["ours fp32"]["GFLOP"] < rows["plain"]["GFLOP"]
    objectives._show(found)
    assert "matrix products:" in capsys.readouterr().out


def test_bf16_is_left_out_where_it_is_not_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"seconds": 2.0, "cpu_seconds": 2.0, "memory_MB": 10.0, "process_MB": 20.0, "GFLOP": 100.0}
    turns = iter([1.0, 3.0] * 8)

    def found(module: str, what: str, *_: Any, threads: int) -> dict[str, Any]:
        return (
            {"fp32": 100.0, "ours fp32": 100.0, "bf16": 10.0} if what == "products" else row | {"seconds": next(turns)}
        )

    monkeypatch.setattr(objectives, "_apart", found)
    rows = objectives.whole_steps({"threads": 1}, 2, False)["steps"]
    assert "0.10 of float32's rate" in rows["ours autocast"]["missing"]
    assert rows["ours fp32"]["seconds"] == 3.0
    assert rows["plain"]["seconds"] == 1.0
    assert rows["ours fp32"]["over_plain"]["seconds"] == 3.0


def test_a_failed_measurement_says_why() -> None:
    with pytest.raises(RuntimeError, match="No module named"):
        objectives._apart("nothing", "products", threads=1)


def test_a_plot_without_its_library_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(PlotError, match="pip install matplotlib"):
        draw({}, tmp_path / "growth.png")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("words", [["objectives", "--plot"], ["scale", "--out"], ["scale", "--plot"]])
def test_a_folder_that_is_not_there_is_said_before_anything_is_measured(words: list[str], tmp_path: Path) -> None:
    told = CliRunner().invoke(cli, ["bench", *words, str(tmp_path / "no" / "file")])
    assert told.exit_code == 2
    assert "make it first" in told.output


@pytest.mark.parametrize(
    ("words", "says"), [([], "add --only step"), (["--only", "step", "--plot", "x.png"], "leave --plot out")]
)
def test_a_gpu_measures_steps_alone(words: list[str], says: str) -> None:
    told = CliRunner().invoke(cli, ["bench", "objectives", "--device", "cuda", *words])
    assert told.exit_code == 2
    assert says in told.output


def test_a_gpu_that_is_not_there_is_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    told = CliRunner().invoke(cli, ["bench", "objectives", "--device", "cuda", "--only", "step"])
    assert told.exit_code == 2
    assert "torch sees no GPU here" in told.output


@pytest.mark.gpu
def test_steps_on_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    """Each in a process of its own, as the command has it."""
    assert objectives.bench_objectives(True, ("step",), threads=1, steps=1, tiny=True, device="cuda") == 0
    found = json.loads(capsys.readouterr().out)["step"]["steps"]
    assert found.keys() == set(objectives.ON_GPU)
    for what, row in found.items():
        assert row["seconds"] > 0
        assert row["memory_MB"] > 0
        assert ("over_plain" in row) == what.startswith("ours")
