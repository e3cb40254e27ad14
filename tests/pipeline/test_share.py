"""The reader's two loops agree, whatever is damaged; a header is read at sight only where Pillow would say the same."""

import contextlib
import io
import os

import numpy as np
import pytest
from gristmill.pipeline.checks import header_size, pillow_size, plain_jpeg_size
from gristmill.pipeline.order import Order, Sequential
from gristmill.pipeline.reader import Reader
from gristmill.pipeline.share import native_loop
from gristmill.shards.quarantine import Quarantine
from gristmill.shards.retry import Stopped
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from .test_reader import SHARDS, N, patch, write_shards


def encoded(mode, **how):
    noise = np.random.default_rng(len(how)).integers(0, 256, (17, 23, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(noise).convert(mode).save(out, **{"format": "JPEG"} | how)
    return out.getvalue()


EXIF = Image.Exif()
EXIF[0x0112] = 6
PLAIN = [
    encoded("RGB"), encoded("L"), encoded("RGB", progressive=True), encoded("RGB", comment=b"of nothing"),
    encoded("RGB", restart_marker_blocks=1), encoded("L", optimize=True),
]  # fmt: skip
OTHER = [encoded("RGB", exif=EXIF), encoded("CMYK"), encoded("RGB", icc_profile=b"flat"), encoded("RGB", format="PNG")]


def test_a_plain_jpegs_header_is_read_at_sight_and_no_other():
    for data in PLAIN:
        assert plain_jpeg_size(memoryview(data)) == (23, 17) == pillow_size(np.frombuffer(data, np.uint8))
    for data in OTHER:
        assert plain_jpeg_size(memoryview(data)) is None
    assert [header_size(np.frombuffer(data, np.uint8)) for data in OTHER] == [(17, 23), *[(23, 17)] * 3]


HEADERS = st.tuples(
    st.sampled_from(PLAIN),
    st.lists(st.tuples(st.integers(0, 700), st.sampled_from([*range(6), *range(0xC0, 0xE4), 0xFE, 0xFF])), max_size=4),
    st.none() | st.integers(0, 700),
)


@settings(max_examples=300, deadline=None)
@given(HEADERS)
@pytest.mark.filterwarnings("ignore")
def test_what_is_read_at_sight_is_what_pillow_says(case):
    data, changes, cut = case
    changed = bytearray(data[:cut])
    for at, value in changes:
        if at < len(changed):
            changed[at] = value
    found = plain_jpeg_size(memoryview(changed))
    if found is not None:
        assert found == pillow_size(np.frombuffer(changed, np.uint8))


DAMAGE = st.lists(
    st.one_of(
        st.tuples(st.just("data"), st.integers(0, N - 1), st.integers(0, 400)),
        st.tuples(st.just("header"), st.integers(0, N - 1), st.integers(1, 512)),
        st.tuples(st.just("cut"), st.integers(0, SHARDS - 1), st.integers(0, 9000)),
    ),
    max_size=5,
)


@settings(max_examples=20, deadline=None)
@given(deep=st.booleans(), damage=DAMAGE, decode_check=st.booleans(), threads=st.integers(1, 2))
def test_both_loops_read_the_same(tmp_path_factory, deep, damage, decode_check, threads):
    """Bytes, sizes, substitutes, and what is said of the damage."""
    root = tmp_path_factory.mktemp("loops")
    manifest = write_shards(root / "data", deep)
    for kind, which, how in damage:
        shard = which if kind == "cut" else which // 8
        path, rows = manifest.path(shard), manifest.rows(shard)
        if kind == "cut":
            os.truncate(path, min(how, path.stat().st_size))
        elif kind == "data":
            patch(path, int(rows.offset[which % 8]) + how % int(rows.length[which % 8]), b"\xa5")
        else:
            patch(path, int(rows.offset[which % 8]) - how, b"\x07")
    seen = []
    for loop in (None, native_loop()):
        quarantine = Quarantine(root / f"{loop is None}.jsonl")
        order = Order(manifest.counts, 1, 2, 16)
        reader = Reader(manifest, quarantine, order=order, seed=3, threads=threads, damage_bound=1.0)
        reader._loop, reader._reads = loop, 1 << 20
        try:
            got = reader.read(np.arange(N), decode_check)
            seen.append(([d.tobytes() for d in got.data], got.keys, got.ids.tolist(), got.sizes.tolist()))
        except Exception as error:
            seen.append((type(error), str(error)))
        # Pillow names the memory that it could not identify.
        problems = sorted((entry.shard, entry.row, entry.reason.split(" <")[0]) for entry in quarantine)
        seen[-1] += (problems, reader.stats.local_bytes)
        reader.close()
    assert native_loop() is not None
    assert seen[0] == seen[1]


def test_a_compiled_loop_says_where_it_is_and_is_called_off(tmp_path):
    manifest = write_shards(tmp_path / "data")
    reader = Reader(manifest, Quarantine(tmp_path / "q"), order=Sequential(manifest.counts), seed=0)
    activity, loop = reader._fetcher.activity, native_loop()
    assert loop is not None
    ones, spare = np.ones(3, np.int64), np.ones((3, 3), np.int64)
    with contextlib.suppress(Stopped), activity.looping(np.array([2, 2, 4])) as frame:
        assert [entry[:2] for entry in activity.now()] == [("read", 2)]
        frame[0], frame[1] = 2, 5_000_000_000
        assert reader.doing() == [("read", "000004.tar", 5.0)]
        reader.close()
        assert loop(np.zeros(64, np.uint8), -ones, ones, ones, ones, ones, *spare, frame, 1) == 0
        after = True
    assert after
    with pytest.raises(Stopped), activity.looping(np.array([1])):
        pytest.fail("nothing new begins")
    assert not activity._loops


def test_a_handle_that_cannot_be_read_is_told_by_name(tmp_path):
    """A failing call in the compiled loop comes out as the reader's own error."""
    from gristmill.pipeline.reader import DamageError

    manifest = write_shards(tmp_path / "data")
    reader = Reader(manifest, Quarantine(tmp_path / "q"), order=Sequential(manifest.counts), seed=0)
    reader._loop, reader._reads = native_loop(), 1 << 20
    opened = reader._fetcher.open(1)
    assert opened.handle is not None
    closed = os.open(tmp_path, os.O_RDONLY)  # reading a folder is an error
    os.dup2(closed, opened.handle)
    os.close(closed)
    with pytest.raises(DamageError, match=r"000001\.tar cannot be read \(Is a directory\)"):
        reader.read(np.arange(8, 16))
    reader.close()
