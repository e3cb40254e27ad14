"""Philox is held to Random123's known answers; what is built on it, to its distribution and to its independence."""

from itertools import pairwise

import numpy as np
import pytest
from gristmill.pipeline import philox
from hypothesis import given, settings
from hypothesis import strategies as st

KNOWN = [  # Random123, tests/kat_vectors, philox4x32 10: counter, key, answer
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]
GOLDEN_WORDS = [[2157980143, 4196518766, 3485170737], [3732482811, 960340207, 3249343277]]
GOLDEN_INTEGERS = [[178256879, 78859825], [831353083, 62916397]]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_known_answers(counter, key, answer):
    assert philox.philox4x32(counter, key).tolist() == answer


def test_known_answers_as_one_array():
    counters, keys, answers = (np.array(column, np.uint32) for column in zip(*KNOWN, strict=True))
    assert np.array_equal(philox.philox4x32(counters, keys), answers)


def test_layout_of_counter_and_key():
    seed, position, stream = 0x299F31D0_A4093822, 0x05A308D3_243F6A88, 77
    expected = philox.philox4x32([0x243F6A88, 0x05A308D3, 77, 1], [0xA4093822, 0x299F31D0])
    assert np.array_equal(philox.words(seed, [position], stream, 8)[0, 4:], expected)


@settings(deadline=None)
@given(
    st.integers(0, 2**64 - 1),
    st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=20),
    st.integers(0, 2**32 - 1),
    st.integers(1, 13),
)
def test_a_draw_does_not_depend_on_its_neighbours(seed, positions, stream, count):
    together = philox.uniform(seed, positions, stream, count)
    assert together.shape == (len(positions), count)
    assert together.dtype == np.float64
    assert ((together >= 0) & (together < 1)).all()
    alone = np.stack([philox.uniform(seed, [p], stream, count + 5)[0, :count] for p in positions])
    assert np.array_equal(together, alone)


def test_positions_and_streams_broadcast():
    positions, streams = np.arange(5), np.arange(3)
    grid = philox.uniform(9, positions[:, None], streams, 6)
    assert grid.shape == (5, 3, 6)
    for s in streams:
        assert np.array_equal(grid[:, s], philox.uniform(9, positions, int(s), 6))


def test_uniform_and_normal_have_their_moments():
    u = philox.uniform(3, np.arange(50_000), philox.VIEW, 4)
    assert abs(u.mean() - 0.5) < 4 / np.sqrt(12 * u.size)
    assert np.abs(np.corrcoef(u.T) - np.eye(4)).max() < 0.02
    z = philox.normal(3, np.arange(50_000), philox.VIEW + 1, 3)
    assert z.shape == (50_000, 3)
    assert abs(z.mean()) < 4 / np.sqrt(z.size)
    assert abs(z.var() - 1) < 0.02
    assert abs((z**4).mean() - 3) < 0.15
    assert np.isfinite(z).all()


def test_streams_are_disjoint():
    names = [
        philox.SUBSTITUTE,
        philox.ORDER_SHARDS,
        philox.ORDER_WINDOWS,
        philox.MIXTURE,
        philox.DROP_PATH,
        philox.MASK,
    ]
    assert len(set(names)) == len(names)
    assert min(names) >= philox.VIEW + 1000


def test_integers_cover_their_range_evenly():
    draws = philox.integers(1, np.arange(6000), philox.SUBSTITUTE, 5, 10)
    counts = np.bincount(draws.ravel(), minlength=10)
    assert len(counts) == 10
    assert np.abs(counts - 3000).max() < 5 * np.sqrt(3000)
    assert philox.integers(1, np.arange(6000), philox.SUBSTITUTE, 5, 2**40).max() > 2**39


def test_golden_values():
    """The stream is a contract: a change here makes every recorded run another one."""
    assert philox.words(1234, [0, 2**40], philox.SUBSTITUTE, 3).tolist() == GOLDEN_WORDS
    assert philox.integers(1234, [0, 2**40], philox.SUBSTITUTE, 2, 10**9).tolist() == GOLDEN_INTEGERS


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_outside_64_bits_is_refused(seed):
    with pytest.raises(philox.SeedError, match="seed"):
        philox.key_from(seed)


def test_negative_positions_and_foreign_streams_are_refused():
    with pytest.raises(philox.SeedError, match="position"):
        philox.uniform(0, [-1], 0, 1)
    with pytest.raises(philox.SeedError, match="stream"):
        philox.uniform(0, [1], 2**32, 1)


@settings(deadline=None)
@given(st.integers(0, 2**64 - 1), st.lists(st.integers(0, 8), max_size=5))
def test_blocks_are_the_draws_that_they_stand_for(seed, blocks):
    positions, streams = np.arange(4)[:, None], np.arange(3)
    everything = philox.uniform(seed, positions, streams, 36).reshape(4, 3, 9, 4)
    some = philox.uniform_blocks(seed, positions, streams, blocks)
    assert np.array_equal(some, everything[:, :, blocks].reshape(4, 3, -1))


def test_purposes_have_streams_of_their_own():
    most = philox.SUBSTITUTE  # crops of an image
    ranges = [(philox.VIEW, most), (philox.SUBSTITUTE, 1), (philox.ORDER_SHARDS, 1), (philox.ORDER_WINDOWS, 1)]
    ranges += [(philox.MIXTURE, 1), (philox.DROP_PATH, 200), (philox.MASK, most), (philox.NOISE, 1)]
    ends = sorted((start, start + count) for start, count in ranges)
    assert all(end <= start for (_, end), (start, _) in pairwise(ends))
