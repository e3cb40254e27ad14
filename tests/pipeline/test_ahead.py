"""Asking ahead gives what asking at once gives, and asks seldom, whatever slice of the stream a rank reads."""

import numpy as np
from gristmill.pipeline.ahead import BLOCK, Ahead
from gristmill.pipeline.order import Order
from hypothesis import given, settings
from hypothesis import strategies as st

COUNTS = [40, 0, 7, 61, 33]
MANY = [1 << 20] * 4


class Counted(Order):
    asked = 0

    def locate(self, positions):
        self.asked += 1
        return super().locate(positions)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 40)), min_size=1, max_size=12), st.booleans())
def test_the_same_answers(batches, scattered):
    """Any batches, in any order, of any size, also such as are no stretch of positions."""
    order = Order(COUNTS, 3, 2, 16)
    ahead = Ahead(order)
    for start, size in batches:
        positions = np.arange(start, start + size)
        if scattered and size > 2:
            positions[1:] += 5
        for got, expected in zip(ahead.locate(positions), order.locate(positions), strict=True):
            assert np.array_equal(got, expected)


def test_a_rank_of_many_asks_once_in_many_batches():
    """32 of a global batch of 2,048: the first batch shows no distance yet, the second does."""
    order = Counted(MANY, 0)
    ahead = Ahead(order)
    for step in range(BLOCK // 32):
        ahead.locate(np.arange(step * 2048 + 64, step * 2048 + 96))
    assert order.asked == 2


def test_batches_change_in_the_middle():
    order = Counted(MANY, 0)
    ahead = Ahead(order)
    for first in range(0, 512, 8):
        ahead.locate(np.arange(first, first + 8))
    for first in range(512, 1024, 16):
        got = ahead.locate(np.arange(first, first + 16))
        assert np.array_equal(got, Order(MANY, 0).locate(np.arange(first, first + 16)))
    assert order.asked == 2


def test_a_small_data_set_is_not_asked_for_epochs_to_come():
    order = Counted(COUNTS, 0)
    ahead = Ahead(order)
    for first in range(0, 4 * order.samples, 40):
        ahead.locate(np.arange(first, first + 40))
    assert order.asked >= 4
