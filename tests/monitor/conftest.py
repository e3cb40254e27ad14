"""The night that all tests here look back at, and `--alert-table FILE` to write down what was told after how long."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from ..workers import Workers
from .night import SCALES, Night, night_of


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--alert-table", metavar="FILE", help="write what was told about each fault as Markdown")


@pytest.fixture(scope="module")
def night(
    workers: Workers, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Night]:
    """One in which all was told as it should be; where other work on this machine spoilt it, a slower one."""
    for scale in SCALES:
        with night_of(tmp_path_factory.mktemp("night"), workers, scale) as night:
            print(night.table())
            if night.wrong() and scale != SCALES[-1]:
                # A second in which nothing runs is more than a minute of the rules, also before the faults. What is
                # really wrong is wrong slower, too.
                print(f"{night.wrong()} went otherwise ({night.disturbed or 'undisturbed'}): once more, slower")
                continue
            if target := request.config.getoption("--alert-table", default=None):
                Path(target).write_text(night.table())
            yield night
            return
