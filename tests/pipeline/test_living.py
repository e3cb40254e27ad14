"""The reader over several data sets, filters and removed samples: each slot as the stream says, substitutes as promised."""

import os
import shutil

import numpy as np
import pytest
from gristmill.pipeline.loader import Loader, LoaderError
from gristmill.pipeline.philox import SUBSTITUTE, integers
from gristmill.pipeline.reader import Reader
from gristmill.pipeline.source import Source
from gristmill.pipeline.stream import Stream
from gristmill.shards.manifest import Manifest
from gristmill.shards.quarantine import Quarantine
from gristmill.shards.tombstones import Tombstones

from .pictures import CONFIG, PER_SHARD, PICTURES, SHARDS, VIEWS, N, PlainExecutor, load, spoil, write_data


@pytest.fixture
def second(tmp_path):
    """The same names of shards, and the same keys, in another folder."""
    return write_data(tmp_path / "second")


def read(manifests, stream, quarantine, positions):
    reader = Reader(manifests, quarantine, order=stream, seed=7, damage_bound=0.5)
    try:
        return reader.read(np.asarray(positions))
    finally:
        reader.close()


def test_several_data_sets_are_read_as_the_stream_mixes_them(manifest, second, quarantine):
    stream = Stream([Source.of(manifest, weight=2), Source.of(second)], 7, 3, 8)
    positions = np.arange(3 * N)
    got = read([manifest, second], stream, quarantine, positions)
    assert np.array_equal(got.ids, np.stack(stream.locate(positions), axis=1))
    for data, (shard, row) in zip(got.data, got.ids.tolist(), strict=True):
        assert data.tobytes() == PICTURES[shard % SHARDS * PER_SHARD + row]
    assert {0, 1} == set((got.ids[:, 0] // SHARDS).tolist())


def test_damage_in_one_is_not_damage_in_the_other(manifest, second, quarantine):
    """Both have a 000001.tar with a k008: only the second's is in quarantine, and only its slots change."""
    spoil(second, 8)
    stream = Stream([Source.of(manifest), Source.of(second)], 7, 3, 8)
    shard, row = stream.locate(np.arange(2 * N))
    got = read([manifest, second], stream, quarantine, np.arange(2 * N))
    assert np.array_equal(got.substituted, (shard == SHARDS + 1) & (row == 2))
    assert [entry.shard for entry in quarantine] == [str(second.path(1))]
    assert (got.ids[got.substituted][:, 0] >= SHARDS).all()  # from its own data set
    again = read([manifest, second], stream, Quarantine(quarantine.path), np.arange(2 * N))
    assert np.array_equal(again.ids, got.ids)


def test_removed_samples_are_replaced_and_are_no_damage(manifest, quarantine):
    """By the first of the position's own sequence that is not removed itself; no other slot moves."""
    plain = Stream([Source.of(manifest)], 7, 3, 8)
    whole = read(manifest, plain, quarantine, np.arange(2 * N))
    gone = [3, 8, 9, 10, 20]
    Tombstones.of(manifest).remove(manifest, [f"k{i:03d}" for i in gone], "asked for")
    stream = Stream([Source.of(manifest)], 7, 3, 8)
    got = read(manifest, stream, quarantine, np.arange(2 * N))
    for slot, key in enumerate(whole.keys):
        if int(key[1:]) in gone:
            draws = integers(7, [slot], SUBSTITUTE, 100, N)[0].tolist()
            assert int(got.keys[slot][1:]) == next(i for i in draws if i not in gone)
            assert got.removed[slot]
            assert got.substituted[slot]
        else:
            assert got.keys[slot] == key
            assert not got.removed[slot]
    assert quarantine.count == 0


def test_removal_and_damage_meet(manifest, quarantine):
    """A substitute that is damaged is passed over and booked, one that is removed passed over in silence."""
    plain = Stream([Source.of(manifest)], 7, 3, 8)
    slot = 5
    own = int(read(manifest, plain, quarantine, [slot]).keys[0][1:])
    first, second_, *_ = dict.fromkeys(i for i in integers(7, [slot], SUBSTITUTE, 100, N)[0].tolist() if i != own)
    Tombstones.of(manifest).remove(manifest, [f"k{first:03d}", f"k{own:03d}"], "asked for")
    spoil(manifest, second_)
    got = read(manifest, Stream([Source.of(manifest)], 7, 3, 8), quarantine, [slot])
    assert int(got.keys[0][1:]) not in (own, first, second_)
    assert [entry.key for entry in quarantine] == [f"k{second_:03d}"]


def test_substitutes_of_a_filtered_stream_pass_the_filter(manifest, quarantine):
    for index in (1, 6, 11):  # of those 42 pixels wide or more, and of the others
        spoil(manifest, index)
    stream = Stream([Source.of(manifest, where="width >= 42")], 7, 3, 8)
    got = read(manifest, stream, quarantine, np.arange(4 * stream.samples))
    assert all(int(key[1:]) % 5 >= 2 for key in got.keys)


def test_the_loader_counts_removed_apart_from_damaged(manifest, quarantine):
    Tombstones.of(manifest).remove(manifest, ["k003"], "asked for")
    spoil(manifest, 9)
    stream = Stream([Source.of(manifest)], CONFIG.seed, CONFIG.lanes, CONFIG.window)
    with load(manifest, quarantine, order=stream, batch=N) as loader:
        batch = next(loader)
        assert (loader.stats.removed, loader.stats.substituted, loader.stats.quarantined) == (1, 1, 1)
    assert "k003" not in batch.keys


def test_several_manifests_need_a_stream(manifest, second, quarantine):
    with pytest.raises(LoaderError, match="order of a Stream"):
        Loader([manifest, second], VIEWS, CONFIG, batch=4, quarantine=quarantine, executor=PlainExecutor())


def test_a_shard_replaced_by_another_of_its_size_is_noticed(tmp_path, quarantine):
    """Quickly indexed, and so small that the tars' padding makes them equally long: time of change and headers tell."""
    manifest = write_data(tmp_path / "data", deep=False)
    shutil.copytree(manifest.root, tmp_path / "copy")
    about = manifest.path(1).stat()
    manifest.identities = [*manifest.identities]
    manifest.identities[1] = f"{about.st_mtime_ns}+{about.st_size}"
    stream = Stream([Source.of(manifest)], 7, 3, 8)
    reader = Reader(manifest, quarantine, order=stream, seed=7, damage_bound=0.5)
    reader.read(np.arange(N))
    other = manifest.path(2).read_bytes().ljust(about.st_size, b"\0")[: about.st_size]
    (tmp_path / "other").write_bytes(other)
    os.replace(tmp_path / "other", manifest.path(1))
    assert reader.read(np.arange(N, 2 * N)).substituted.sum() == 0  # the file that was checked is still open
    reader.close()
    with pytest.raises(Exception, match=r"000001\.tar was (replaced|changed) since it was indexed"):
        read(manifest, stream, quarantine, np.arange(N))
    assert quarantine.count == 0
    copy = Manifest.open(tmp_path / "copy")
    copy.identities = [*copy.identities]
    copy.identities[1] = "of another machine"
    assert not read(copy, Stream([Source.of(copy)], 7, 3, 8), quarantine, np.arange(N)).substituted.any()


def test_a_forked_child_is_told_and_does_no_harm(manifest, quarantine):
    """What it inherited is closed, its use is an error, and its end leaves the parent's stream alone."""
    with load(manifest, quarantine) as loader:
        first = next(loader)
        pid = os.fork()
        if not pid:
            code = 1
            try:
                next(loader)
            except LoaderError as error:
                names = [
                    os.readlink(f"/proc/self/fd/{fd}")
                    for fd in os.listdir("/proc/self/fd")
                    if int(fd) > 2 and os.path.lexists(f"/proc/self/fd/{fd}")
                ]
                held = [name for name in names if name.startswith(str(manifest.root)) and name.endswith(".tar")]
                code = 0 if "fork" in str(error) and not held else 2
            loader.close()
            os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        rest = [next(loader) for _ in range(11)]
    whole = [key for batch in (first, *rest) for key in batch.keys]
    assert sorted(whole[:N]) == [f"k{i:03d}" for i in range(N)]
