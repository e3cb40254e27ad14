"""Bytes come out as they went in; damage costs its own slot, the same substitute takes it, and the rest is an error."""

import io
import os
import tarfile
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
from gristmill.pipeline.order import Order, Sequential
from gristmill.pipeline.reader import DamageError, Reader
from gristmill.shards.manifest import Manifest, Rows
from gristmill.shards.quarantine import Quarantine
from gristmill.shards.writer import write_manifest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

PER_SHARD = 8
SHARDS = 5
N = SHARDS * PER_SHARD


def jpeg(index, orientation=1):
    noise = np.random.default_rng(index).integers(0, 256, (20 + index % 3, 30, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    out = io.BytesIO()
    Image.fromarray(noise).save(out, "JPEG", quality=90, exif=exif)
    return out.getvalue()


IMAGES = [jpeg(i, orientation=6 if i % 4 == 3 else 1) for i in range(N)]


def upright(index):
    width, height = 30, 20 + index % 3
    return (height, width) if index % 4 == 3 else (width, height)


def write_shards(root, deep=True, images=IMAGES):
    """Tars written by tarfile and their manifest; returns it opened. Sample i is row i % 8 of shard i // 8."""
    root.mkdir(parents=True, exist_ok=True)
    shards = []
    for shard in range(SHARDS):
        members = images[shard * PER_SHARD : (shard + 1) * PER_SHARD]
        path = root / f"{shard:06d}.tar"
        with tarfile.open(path, "w") as tar:
            for row, data in enumerate(members):
                info = tarfile.TarInfo(f"{shard:02d}-{row}.jpg")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        with tarfile.open(path) as tar:
            offsets = [member.offset_data for member in tar.getmembers()]
        index = range(shard * PER_SHARD, shard * PER_SHARD + len(members))
        rows = Rows(
            keys=[f"{shard:02d}-{row}" for row in range(len(members))],
            offset=np.array(offsets, np.int64),
            length=np.array([len(data) for data in members], np.int64),
            crc32=np.array([zlib.crc32(data) for data in members], np.uint32),
            width=np.array([upright(i)[0] for i in index], np.int32),
            height=np.array([upright(i)[1] for i in index], np.int32),
            format=["jpg"] * len(members),
            deep=deep,
        )
        shards.append((path.name, path.stat().st_size, rows))
    write_manifest(root, shards)
    return Manifest.open(root)


def open_shards(root):
    """Names of the tars under `root` that this process holds open."""
    held = []
    for entry in Path("/proc/self/fd").iterdir():
        try:
            held.append(entry.readlink())
        except FileNotFoundError:  # the descriptor of this very listing, or one that is just being closed
            continue
    return [path.name for path in held if path.suffix == ".tar" and path.is_relative_to(root)]


def make_reader(manifest, quarantine, **options):
    options = {"order": Sequential(manifest.counts), "seed": 11, "damage_bound": 0.5} | options
    return Reader(manifest, quarantine, **options)


def patch(path, offset, data):
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def overwrite(manifest, index, data):
    """Put bytes over the head of a sample's data."""
    shard, row = divmod(index, PER_SHARD)
    patch(manifest.path(shard), int(manifest.rows(shard).offset[row]), data)


def spoil_scan(manifest, index):
    """Leave the image's header as it is, and nothing of its pixels."""
    scan = IMAGES[index].index(b"\xff\xda")
    overwrite(manifest, index, IMAGES[index][:scan] + b"\0" * (len(IMAGES[index]) - scan))


@pytest.fixture(params=[True, False], ids=["deep", "quick"])
def deep(request):
    return request.param


@pytest.fixture
def quarantine(tmp_path):
    return Quarantine(tmp_path / "run" / "quarantine.jsonl")


def test_bytes_keys_ids_and_sizes(tmp_path, quarantine, deep):
    manifest = write_shards(tmp_path / "data", deep)
    order = Order(manifest.counts, 3, 4, 8)
    reader = make_reader(manifest, quarantine, order=order, threads=3)
    positions = np.arange(N - 5, 2 * N + 3)
    got = reader.read(positions, decode_check=True)
    reader.close()
    assert np.array_equal(got.ids, np.stack(order.locate(positions), axis=1))
    assert got.ids.dtype == np.int64
    assert got.sizes.dtype == np.int32
    for slot, (shard, row) in enumerate(got.ids.tolist()):
        assert got.data[slot].dtype == np.uint8
        assert got.data[slot].tobytes() == IMAGES[shard * PER_SHARD + row]
        assert got.keys[slot] == f"{shard:02d}-{row}"
        assert tuple(got.sizes[slot]) == upright(shard * PER_SHARD + row)
    assert not got.substituted.any()
    assert quarantine.count == 0
    assert not quarantine.path.exists()


def test_many_shards_do_not_exhaust_descriptors(tmp_path, quarantine, monkeypatch):
    monkeypatch.setattr("gristmill.pipeline.fetch._OPEN", 2)
    manifest = write_shards(tmp_path / "data")
    reader = make_reader(manifest, quarantine, threads=2)
    for _ in range(3):
        got = reader.read(np.arange(N))
        assert [data.tobytes() for data in got.data] == IMAGES
        assert len(open_shards(tmp_path)) <= 2
    reader.close()
    assert open_shards(tmp_path) == []


def flip_a_pixel(manifest):
    shard, row = 1, 2
    rows = manifest.rows(shard)
    at = int(rows.offset[row] + rows.length[row] - 40)  # in the entropy-coded data: still a JPEG
    with manifest.path(shard).open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 0x10]))
    return [(1, 2)]


def truncate(manifest):
    os.truncate(manifest.path(2), int(manifest.rows(2).offset[5]) + 10)
    return [(2, 5), (2, 6), (2, 7)]


def garbage(manifest):
    overwrite(manifest, 3, bytes(range(60)))
    return [(0, 3)]


def cut_to_nothing(manifest):
    os.truncate(manifest.path(4), 0)
    return [(4, row) for row in range(PER_SHARD)]


@pytest.mark.parametrize("fault", [flip_a_pixel, truncate, garbage, cut_to_nothing])
def test_damage_costs_its_own_slot_and_is_remembered(tmp_path, quarantine, fault):
    manifest = write_shards(tmp_path / "data")
    bad = fault(manifest)
    reader = make_reader(manifest, quarantine)
    got = reader.read(np.arange(N))
    for slot in range(N):
        place = divmod(slot, PER_SHARD)
        assert got.substituted[slot] == (place in bad)
        if place not in bad:
            assert got.data[slot].tobytes() == IMAGES[slot]
        shard, row = got.ids[slot].tolist()
        assert (shard, row) not in bad
        assert got.data[slot].tobytes() == IMAGES[shard * PER_SHARD + row]
        assert got.keys[slot] == f"{shard:02d}-{row}"
        assert tuple(got.sizes[slot]) == upright(shard * PER_SHARD + row)
    reader.close()
    kept = Quarantine(quarantine.path)
    assert [(entry.shard, entry.row) for entry in kept] == [(manifest.urls[s], r) for s, r in bad]
    assert all(entry.key == f"{int(entry.shard[:6]):02d}-{entry.row}" and entry.reason for entry in kept)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=8, deadline=None)
@given(known=st.sets(st.integers(0, 7)), cuts=st.lists(st.integers(1, N - 1), max_size=4), threads=st.integers(1, 3))
def test_substitutes_do_not_depend_on_what_was_known(tmp_path_factory, known, cuts, threads):
    """Any part of the damage known before, any batches, any threads: the same samples in the same slots."""
    root = tmp_path_factory.mktemp("known")
    manifest = write_shards(root / "data")
    bad = [0, 7, 9, 16, 17, 30, 31, 39]
    for index in bad:
        overwrite(manifest, index, b"\0" * 50)
    clean = make_reader(manifest, Quarantine(root / "a.jsonl"), order=Order(manifest.counts, 5))
    expected = clean.read(np.arange(2 * N))
    clean.close()
    quarantine = Quarantine(root / "b.jsonl")
    for i in known:
        shard, row = divmod(bad[i], PER_SHARD)
        quarantine.add(str(manifest.urls[shard]), row, str(manifest.rows(shard).keys[row]), "known before")
    reader = make_reader(manifest, quarantine, order=Order(manifest.counts, 5), threads=threads)
    parts = [reader.read(part) for part in np.split(np.arange(2 * N), sorted(set(cuts)))]
    reader.close()
    assert np.array_equal(np.concatenate([part.ids for part in parts]), expected.ids)
    assert np.array_equal(np.concatenate([part.substituted for part in parts]), expected.substituted)
    assert expected.substituted.sum() == 2 * len(bad)
    assert quarantine.digest == clean.quarantine.digest


def test_a_substitute_depends_on_seed_and_position(tmp_path, quarantine):
    manifest = write_shards(tmp_path / "data")
    overwrite(manifest, 6, b"\0" * 50)
    chosen = set()
    for seed in range(3):
        reader = make_reader(manifest, quarantine, seed=seed)
        chosen |= {tuple(reader.read([6 + N * epoch]).ids[0].tolist()) for epoch in range(4)}
        reader.close()
    assert len(chosen) > 6


def test_damage_found_in_decoding_takes_the_same_substitute(tmp_path, quarantine):
    """With a quick index garbage is found only by the decoder; `replace` then gives what `read` would have given."""
    manifest = write_shards(tmp_path / "data", deep=False)
    spoil_scan(manifest, 12)
    reader = make_reader(manifest, quarantine)
    got = reader.read([12])
    assert not got.substituted[0]  # its header is that of an image, and there is no checksum
    sample = reader.replace(12, (1, 4), "does not decode")
    got.put(0, sample)
    assert sample.data.tobytes() == IMAGES[sample.place[0] * PER_SHARD + sample.place[1]]
    assert (manifest.urls[1], 4) in quarantine
    again = reader.read([12])
    assert again.substituted[0]
    assert np.array_equal(again.ids, got.ids)
    assert np.array_equal(again.sizes, got.sizes)
    reader.close()


def test_decode_check_finds_what_a_quick_index_cannot_know(tmp_path, quarantine):
    manifest = write_shards(tmp_path / "data", deep=False)
    spoil_scan(manifest, 12)
    reader = make_reader(manifest, quarantine)
    assert reader.read(np.arange(N), decode_check=True).substituted.nonzero()[0].tolist() == [12]
    assert "does not decode" in next(iter(quarantine)).reason
    reader.close()


def test_a_quick_index_sees_no_header_no_member_and_no_end(tmp_path, quarantine):
    manifest = write_shards(tmp_path / "data", deep=False)
    overwrite(manifest, 3, b"no image")  # no image header
    patch(manifest.path(1), int(manifest.rows(1).offset[2]) - 512 + 124, b"zzzz")  # no size in the tar header
    patch(manifest.path(1), int(manifest.rows(1).offset[3]) - 512 + 124, b"\0" * 12)
    os.truncate(manifest.path(4), int(manifest.rows(4).offset[7]) - 300)
    reader = make_reader(manifest, quarantine)
    assert reader.read(np.arange(N)).substituted.nonzero()[0].tolist() == [3, 10, 11, 39]
    reader.close()
    reasons = {(entry.shard, entry.row): entry.reason for entry in quarantine}
    assert "no image header" in reasons["000000.tar", 3]
    assert "no tar member" in reasons["000001.tar", 2]
    assert "truncated: 0 of" in reasons["000004.tar", 7]


def test_a_missing_shard_stops_at_once(tmp_path, quarantine, deep):
    manifest = write_shards(tmp_path / "data", deep)
    manifest.path(3).unlink()
    reader = make_reader(manifest, quarantine)
    with pytest.raises(DamageError, match=r"000003\.tar cannot be read \(No such file.*gristmill verify"):
        reader.read(np.arange(N))
    assert quarantine.count == 0  # nothing is wrong with the samples
    assert len(reader.read(np.arange(10)).data) == 10
    reader.close()


def test_a_missing_shard_stops_a_substitution_too(tmp_path, quarantine):
    """A substitute from elsewhere would be another stream on a machine where the shard is there."""
    manifest = write_shards(tmp_path / "data")
    overwrite(manifest, 0, b"\0" * 50)
    for shard in range(1, SHARDS):
        manifest.path(shard).unlink()
    reader = make_reader(manifest, quarantine)
    with pytest.raises(DamageError, match="cannot be read"):
        reader.read([0, N, 2 * N, 3 * N, 4 * N, 5 * N, 6 * N])
    reader.close()


def test_a_replaced_shard_is_never_taken_for_the_old_one(tmp_path, quarantine, deep):
    """Longer: refused at sight. Whole, though no longer: when it is met. Broken besides: each sample that is not the old
    one counts as damage, for then the tar cannot tell what it is."""
    manifest = write_shards(tmp_path / "data", deep)
    other = write_shards(tmp_path / "other", images=[jpeg(100 + i) * (1 + (i == 9) * 20) for i in range(N)])
    first = manifest.path(1).read_bytes()
    os.replace(other.path(1), manifest.path(1))
    os.replace(other.path(2), manifest.path(2))
    last = other.rows(2)
    os.truncate(manifest.path(2), min(int(manifest.shard_bytes[2]), int(last.offset[-1] + last.length[-1])) - 1)
    reader = make_reader(manifest, quarantine)
    for _ in range(2):  # the second time too
        with pytest.raises(DamageError, match=r"000001\.tar was replaced"):
            reader.read(np.arange(8, 16))
    manifest.path(1).write_bytes(first)
    got = reader.read(np.arange(16, 24))
    for slot in range(8):
        shard, row = got.ids[slot].tolist()
        if deep or got.substituted[slot]:
            assert got.data[slot].tobytes() == IMAGES[shard * PER_SHARD + row]
    assert got.substituted.any()
    if deep:
        assert got.substituted.all()
    reader.close()


def test_too_much_damage_stops_and_says_where_it_began(tmp_path, quarantine):
    manifest = write_shards(tmp_path / "data")
    for index in (17, 18, 19):
        overwrite(manifest, index, b"\0" * 50)
    reader = make_reader(manifest, quarantine, damage_bound=2 / N)
    assert reader.read(np.arange(19)).substituted.sum() == 2
    pattern = rf"3 of {N} samples.*more than the 2 allowed.*first is 02-1 in 000002\.tar.*checksum.*gristmill verify"
    pattern += r".*raise stream\.damage_bound"
    with pytest.raises(DamageError, match=pattern):
        reader.read(np.arange(19, N))
    reader.close()
    with pytest.raises(DamageError, match="more than the 2 allowed"):  # a restart changes nothing
        make_reader(manifest, Quarantine(quarantine.path), damage_bound=2 / N)


def test_one_bad_sample_is_always_allowed(tmp_path, quarantine):
    manifest = write_shards(tmp_path / "data")
    overwrite(manifest, 17, b"\0" * 50)
    reader = make_reader(manifest, quarantine, damage_bound=0.0)
    assert reader.read(np.arange(N)).substituted.sum() == 1
    reader.close()


def test_a_data_set_of_nothing_but_damage_ends(tmp_path, quarantine):
    manifest = write_shards(tmp_path / "data")
    for shard in range(SHARDS):
        os.truncate(manifest.path(shard), 0)
    reader = make_reader(manifest, quarantine, damage_bound=1.0)
    with pytest.raises(DamageError, match=f"{N} of {N} samples"):
        reader.read([0])
    reader.close()


def test_close_leaves_no_thread_and_no_descriptor(tmp_path, quarantine):
    def ours():
        return [thread for thread in threading.enumerate() if thread.name.startswith("gristmill")]

    manifest = write_shards(tmp_path / "data")
    reader = make_reader(manifest, quarantine, threads=4)
    reader.read(np.arange(N))
    assert ours()
    assert not reader.doing()
    assert len(open_shards(tmp_path)) == SHARDS
    reader.close()
    assert not ours()
    assert open_shards(tmp_path) == []
