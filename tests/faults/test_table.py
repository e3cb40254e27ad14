"""The table in the docs and the tests are of the same faults."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from .streams import Found, Oracle, hold, plain
from .table import DOCS, HEAD, Row, documented, render


def marked() -> list[str]:
    """The faults that tests here are marked with."""
    sources = [path.read_text() for path in sorted(Path(__file__).parent.glob("test_*.py"))]
    return [name for source in sources for name in re.findall(r'mark\.fault\("([^"]+)"', source)]


def test_every_row_has_its_test_and_every_test_its_row():
    assert len(set(marked())) == len(marked()) > 20
    assert sorted(documented()) == sorted(marked())


def test_docs_hold_the_table_as_it_is_written():
    assert render([]).splitlines()[0] in DOCS.read_text().splitlines()
    assert all(line.count("|") == len(HEAD) + 1 for line in documented().values())


def test_what_is_counted_is_checked(undisturbed):
    """A slot that is skipped, repeated, or that has other pixels or draws does not pass; nor another substitute."""
    whole, oracle = undisturbed.plain.slots, Oracle(plain())
    assert hold(whole, whole, oracle) == Found(slots=len(whole))
    for wrong in (
        [whole[1], *whole[1:]],
        [*whole[1:], whole[0]],
        [whole[0]._replace(pixels="0"), *whole[1:]],
        [whole[0]._replace(draws="0"), *whole[1:]],
        [whole[0]._replace(key="0"), *whole[1:]],
    ):
        with pytest.raises(AssertionError):
            hold(wrong, whole, oracle)
    with pytest.raises(AssertionError):
        hold(whole, whole, oracle, {whole[0].place})


def test_rows_add_up():
    row = Row("a fault")
    row.add(Found(10, 2, 2), 3, "read past", stops=1)
    row.add(Found(5), 1, stops=1)
    assert row.markdown() == "| a fault | 4 | 15 | 2 | 2 = 2 | 0, 0, 0 | read past. stops 2 |"
