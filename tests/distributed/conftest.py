"""What tests of whole runs share: ranks without launch costs, and the smallest data set."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from gristmill.ops.bench.endings import tiny_data

from .zygote import Zygote


@pytest.fixture(scope="package")
def zygote() -> Iterator[Zygote]:
    with Zygote() as started:
        yield started


@pytest.fixture(scope="package")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_data(tmp_path_factory.mktemp("tiny"))
