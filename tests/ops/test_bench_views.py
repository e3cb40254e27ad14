"""The benchmark of views: all loaders give crops of the same shape, what is missing is named, stages add up."""

import json
from pathlib import Path

import pytest
from gristmill.ops.bench import views as bench
from gristmill.ops.bench.croppers import PilRandAugment
from gristmill.shards.demo import make_demo_images
from gristmill.shards.ingest import ingest_folder
from PIL import Image, ImageOps


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("bench")
    make_demo_images(root / "images", images=96, size=48, instances=3)
    ingest_folder(root / "images", root / "data", shard_samples=25)
    return root


@pytest.fixture(autouse=True)
def few_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of eight, in the processes as well: nothing here is timed for its time."""
    monkeypatch.setattr(bench, "BATCH", 8)


@pytest.mark.parametrize("name", ["gristmill, CPU executor", "decode alone", bench.BASE])
def test_loaders_make_the_crops_that_they_are_asked_for(root: Path, name: str) -> None:
    views = bench.views_of("multi-crop", "bicubic")
    assert [(view.count, view.size) for view in views] == [(2, 224), (8, 96)]
    found = bench._measure(bench.LOADERS[name], root, views, 1)
    assert found["images_per_s"] > 0
    assert found["cpu_us"] >= 0  # in ticks of a hundredth of a second, of which a few images may take none


def test_a_loader_that_gives_something_else_is_not_measured(root: Path) -> None:
    def other(*_):
        yield from bench.LOADERS["decode alone"](root, bench.views_of("mugs", "bicubic"))

    with pytest.raises(RuntimeError, match="gave"):
        bench._measure(other, root, bench.views_of("multi-crop", "bicubic"), 1)


def test_mugs_has_its_fourteen_crops_and_its_strong_ones() -> None:
    views = bench.views_of("mugs", "bilinear")
    assert sum(view.count for view in views) == 14
    assert [view.strong is not None for view in views] == [False, True, True]
    assert {view.filter for view in views} == {"bilinear"}


def test_the_figures_as_json(root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """In processes of their own, as always; one of the loaders does not exist."""
    names = ["gristmill, CPU executor", "no such loader"]
    monkeypatch.setattr(bench, "LOADERS", {name: bench.LOADERS.get(name) for name in names})
    monkeypatch.setattr(bench, "BASE", names[0])
    assert bench.bench_views(root / "images", 16, True, ("multi-crop",)) == 0
    found = json.loads(capsys.readouterr().out)["multi-crop"]
    ours, missing = (found["loaders"][name] for name in names)
    assert ours["speed"] == ours["per_cpu"] == 1
    assert "no such loader" in missing["missing"]
    assert list(found["profile_us"])[:2] == ["draw", "decode"]
    assert all(value >= 0 for value in found["profile_us"].values())


def test_pillow_may_refuse_to_keep_no_bits() -> None:
    """timm's RandAugment asks for it at magnitude 10; any other error is one."""
    augment = PilRandAugment()
    image = Image.new("RGB", (8, 6), (200, 100, 50))
    augment.transform = lambda image: ImageOps.posterize(image, 0)
    assert augment(image).getextrema() == ((0, 0),) * 3
    augment.transform = lambda image: image.resize((0, -1))
    with pytest.raises(ValueError, match="height"):
        augment(image)
