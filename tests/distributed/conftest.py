"""What tests of whole runs share: ranks without launch costs, and the smallest data set."""

from pathlib import Path

import pytest
from gristmill.ops.bench.endings import tiny_data
from gristmill.shards.demo import make_demo_images
from gristmill.shards.ingest import ingest_folder

from ..workers import Workers
from .case import Case
from .zygote import Zygote


@pytest.fixture(scope="package")
def zygote(workers: Workers) -> Zygote:
    return Zygote(workers)


@pytest.fixture(scope="package")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_data(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="package")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fewer images than a run sees, so that a second epoch begins in it."""
    folder = tmp_path_factory.mktemp("few")
    make_demo_images(folder / "images", images=96, size=32, instances=3)
    ingest_folder(folder / "images", folder / "data", shard_samples=25)
    return folder / "data" / "train"


@pytest.fixture(scope="package")
def straight(zygote: Zygote, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A run that meets no fault, which the others must equal. What it was fed lies beside it (node_cases.py)."""
    case = Case(zygote, tmp_path_factory.mktemp("straight") / "run", tiny)
    beside = case.folder.parent
    group = zygote.group(beside / "rank", "node_cases", beside, "[]", *case.command(), end=True)
    assert group.codes == [0, 0], group.errors
    case.said = group.errors
    return case
