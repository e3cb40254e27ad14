"""Executors round in their own ways: a run does not change from one to the other unless it is told to."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from gristmill.ops.checkpoint import CheckpointError
from gristmill.ops.launch import join
from gristmill.ops.train import train

from ..distributed.guard_cases import BATCH, make_data, recipe_of


@pytest.fixture(autouse=True)
def group() -> Iterator[None]:
    """Training leaves the group; other tests of this process use it, too."""
    join()
    yield
    join()


def test_another_executor_is_refused_unless_it_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    make_data(tmp_path, 40)
    begun = recipe_of(tmp_path, 2, "stream.augment=dali")
    assert train(begun, tmp_path / "run", quiet=True).position == 2 * BATCH
    with pytest.raises(CheckpointError, match=r"views by dali, .* come from cpu.*stream\.augment=dali .*augment=cpu"):
        train(recipe_of(tmp_path, 2), tmp_path / "run", quiet=True)
    ending = train(recipe_of(tmp_path, 2, "stream.augment=cpu"), tmp_path / "run")
    assert (ending.code, ending.position) == (0, 2 * BATCH)
    assert "not bit for bit as before: executor dali -> cpu" in "".join(capsys.readouterr())
