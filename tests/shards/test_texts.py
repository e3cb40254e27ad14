"""Compact texts are the sequence that they were made of, in whatever pieces Arrow holds them."""

import numpy as np
import pyarrow as pa
import pytest
from gristmill.shards.texts import Few, Texts
from hypothesis import given
from hypothesis import strategies as st

TEXT = st.text(max_size=6)


def column(pieces):
    """A column of these chunks, each one a slice of something longer."""
    chunks = [pa.array(["ahead", *piece, "behind"], pa.string()).slice(1, len(piece)) for piece in pieces]
    return pa.chunked_array(chunks, pa.string())


def same(got, plain):
    assert len(got) == len(plain)
    assert list(got) == plain
    assert got == plain
    assert [got[i] for i in range(-len(plain), len(plain))] == plain + plain
    for cut in (slice(1, 3), slice(None), slice(None, None, -2), slice(-2, None)):
        assert got[cut] == plain[cut]
    with pytest.raises(IndexError):
        got[len(plain)]
    if plain:
        assert got != [*plain[:-1], "another"]


@given(st.lists(st.lists(TEXT, max_size=5), max_size=4))
def test_texts(pieces):
    got, plain = Texts(column(pieces)), [text for piece in pieces for text in piece]
    same(got, plain)
    assert got.pick(np.arange(len(plain))[::-2]) == plain[::-2]


@given(st.lists(st.lists(st.sampled_from(["jpg", "png", "ä", None]), max_size=5), max_size=4))
def test_few(pieces):
    plain = [text for piece in pieces for text in piece]
    same(Few.of(column(pieces)), plain)


def test_many_different_texts_are_not_few():
    many = [f"{i}" for i in range(9000)]
    assert isinstance(Few.of(column([many])), Texts)
    assert Few.of(column([many])) == many
    assert Few.of(column([[*many, None]])) == [*many, None]
    with pytest.raises(ValueError, match="1 of 2 texts are null"):
        Texts(column([["a", None]]))


def test_what_they_take():
    got = Texts(column([[f"{i:09d}" for i in range(1000)]]))
    assert len(got._text) + got._ends.nbytes < 14_000
