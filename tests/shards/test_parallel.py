"""Work on threads: in order, and never far ahead."""

import time

import pytest
from gristmill.shards.parallel import in_order


def test_in_order_keeps_the_order_and_stays_ahead_by_little() -> None:
    started: list[int] = []

    def work(item: int) -> int:
        started.append(item)
        time.sleep(0.002 * (item % 3))
        return item

    for taken, result in enumerate(in_order(work, range(60), 4, "test")):
        assert result == taken
        assert len(started) <= taken + 1 + 2 * 4 + 1
    with pytest.raises(ZeroDivisionError):
        list(in_order(lambda item: 1 // item, [1, 0, 1], 2, "test"))
