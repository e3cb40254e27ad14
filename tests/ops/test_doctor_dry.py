"""The dry run: what is found where a checkpoint comes back as something else, and that nothing of it is left in the run."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from gristmill.ops.checkpoint import CheckpointError
from gristmill.ops.doctor.dry import dry_run, same
from gristmill.ops.launch import join
from gristmill.ops.run import Run

from ..distributed.guard_cases import make_data, recipe_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dry")
    make_data(folder, 40)
    return folder


@pytest.fixture
def run(folder: Path, tmp_path: Path) -> Iterator[Run]:
    """A run with its first checkpoint written."""
    join()  # left at exit: other tests of this process use the group, too
    recipe = recipe_of(folder, 4, "probes.at=[0.5]", "probes.names=[knn,label_free,correspondence]")
    made = Run(recipe, tmp_path / "run", 0, 1, torch.device("cpu"))
    try:
        made.restore()
        made.writer.begin(made.position, made.content())
        made.writer.finish(made.total)
        yield made
    finally:
        made.close()


def test_a_sound_run_goes_on_as_it_was(run: Run):
    dice, log = torch.get_rng_state(), (run.folder / "metrics.jsonl").read_bytes()
    before = [part.tensor.clone() for part in run.content().parts]
    (told,) = dry_run(run, {24})
    assert "read back and compared" in told
    assert "probes tried on 64 images" in told
    assert all(same(a, part.tensor) for a, part in zip(before, run.content().parts, strict=True))
    assert torch.equal(dice, torch.get_rng_state())
    assert (run.folder / "metrics.jsonl").read_bytes() == log
    assert "probes" not in dry_run(run, {0, 24})[0]
    assert "probes" not in dry_run(run, ())[0]


def test_what_differs_is_named(run: Run):
    name, weight = next(iter(run.engine.module.named_parameters()))
    with torch.no_grad():
        weight.view(-1)[0] += 1
    with pytest.raises(CheckpointError, match=f"read back, is not what was saved .*student {name}"):
        dry_run(run, ())


def test_state_that_loading_does_not_bring_back_is_named(run: Run, monkeypatch: pytest.MonkeyPatch):
    load = run.mixture.load
    monkeypatch.setattr(
        run.mixture, "load", lambda state: load({n: t + (t.dtype == torch.float32) for n, t in state.items()})
    )
    with pytest.raises(CheckpointError, match=r"loaded, is not what was saved .*objectives "):
        dry_run(run, ())


def test_a_checkpoint_that_the_disk_changed(run: Run):
    (file,) = (run.folder / "checkpoints").glob("*/rank-00000.safetensors")
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="no checkpoint is readable"):
        dry_run(run, ())


def test_a_checkpoint_that_is_gone(run: Run):
    run.store.remove(run.position)
    with pytest.raises(CheckpointError, match="cannot be found again"):
        dry_run(run, ())


def test_a_probe_that_cannot_be_made(run: Run):
    for shard in run.recipe.sources[0].path.glob("*.tar"):  # pyright: ignore[reportAttributeAccessIssue]
        shard.rename(shard.with_suffix(".gone"))
    try:
        with pytest.raises(Exception, match=r"\.tar"):
            dry_run(run, {24})
    finally:
        for shard in run.recipe.sources[0].path.glob("*.gone"):  # pyright: ignore[reportAttributeAccessIssue]
            shard.rename(shard.with_suffix(".tar"))


def test_nan_is_nan():
    one = torch.tensor([float("nan"), 1.0])
    assert same(one, one.clone())
    assert not same(one, torch.tensor([float("nan"), 2.0]))
    assert not same(torch.zeros(2), -torch.zeros(2))
