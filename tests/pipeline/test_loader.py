"""The loader gives the same stream however it is cut, carries on past damage, never hangs silently, leaves nothing."""

import io
import os
import tarfile
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from gristmill.pipeline.augment import DecodeError
from gristmill.pipeline.augment.dali import DaliExecutor
from gristmill.pipeline.cursor import Cursor
from gristmill.pipeline.draws import COLUMNS
from gristmill.pipeline.loader import Loader, LoaderError, StallError, probe_batches
from gristmill.pipeline.order import Sequential
from gristmill.pipeline.philox import SUBSTITUTE, integers
from gristmill.pipeline.reader import DamageError
from gristmill.pipeline.views import StreamConfig, View
from gristmill.shards.manifest import Manifest, Rows
from gristmill.shards.quarantine import Quarantine
from gristmill.shards.writer import write_manifest
from PIL import Image, ImageOps

PER_SHARD, SHARDS = 6, 4
N = PER_SHARD * SHARDS
VIEWS = [View(name="global", count=2, size=16), View(name="local", count=3, size=8, scale=(0.05, 0.25))]
CONFIG = StreamConfig(seed=7, lanes=3, window=8, reader_threads=2, prefetch=2, damage_bound=0.5)
X0, FLIP = COLUMNS.index("x0"), COLUMNS.index("flip")


def picture(index):
    noise = np.random.default_rng(index).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(noise).resize((40 + index % 5, 32)).save(out, "JPEG", quality=90)
    return out.getvalue()


PICTURES = [picture(i) for i in range(N)]


def write_data(root, deep=True):
    root.mkdir(parents=True)
    shards = []
    for shard in range(SHARDS):
        index = range(shard * PER_SHARD, (shard + 1) * PER_SHARD)
        path = root / f"{shard:06d}.tar"
        with tarfile.open(path, "w") as tar:
            for i in index:
                info = tarfile.TarInfo(f"k{i:03d}.jpg")
                info.size = len(PICTURES[i])
                tar.addfile(info, io.BytesIO(PICTURES[i]))
        with tarfile.open(path) as tar:
            offsets = [member.offset_data for member in tar.getmembers()]
        rows = Rows(
            keys=[f"k{i:03d}" for i in index],
            offset=np.array(offsets, np.int64),
            length=np.array([len(PICTURES[i]) for i in index], np.int64),
            crc32=np.array([zlib.crc32(PICTURES[i]) for i in index], np.uint32),
            width=np.array([40 + i % 5 for i in index], np.int32),
            height=np.full(PER_SHARD, 32, np.int32),
            format=["jpg"] * PER_SHARD,
            deep=deep,
        )
        shards.append((path.name, path.stat().st_size, rows))
    write_manifest(root, shards)
    return Manifest.open(root)


class PlainExecutor:
    """Crop, resize and flip with Pillow; remembers who called it."""

    def __init__(self, views=VIEWS):
        self.views, self.threads, self.runs = views, set(), 0

    def run(self, data, draws):
        self.threads.add(threading.get_ident())
        self.runs += 1
        images, bad = [], []
        for slot, encoded in enumerate(data):
            try:
                images.append(ImageOps.exif_transpose(Image.open(io.BytesIO(encoded.tobytes())).convert("RGB")))
            except OSError:
                bad.append(slot)
        if bad:
            raise DecodeError(bad)
        result, v = {}, 0
        for view in self.views:
            out = np.empty((len(data), view.count, 3, view.size, view.size), np.float32)
            for slot, image in enumerate(images):
                for copy in range(view.count):
                    row = draws.params[slot, v + copy]
                    crop = image.resize((view.size, view.size), Image.Resampling.BILINEAR, box=tuple(row[X0 : X0 + 4]))
                    pixels = np.asarray(crop, np.float32)[:, :: -1 if row[FLIP] else 1]
                    out[slot, copy] = pixels.transpose(2, 0, 1) / 255
            result[view.name] = torch.from_numpy(out)
            v += view.count
        return result


def ours():
    return [thread for thread in threading.enumerate() if thread.name.startswith("gristmill")]


def open_files():
    names = []
    for entry in Path("/proc/self/fd").iterdir():
        try:
            names.append(str(entry.readlink()))
        except FileNotFoundError:  # the descriptor of this very listing, or one that is just being closed
            continue
    return names


@pytest.fixture(autouse=True)
def _no_leaked_threads():
    assert not ours()
    yield
    assert not ours()


@pytest.fixture
def manifest(tmp_path):
    return write_data(tmp_path / "data")


@pytest.fixture
def quarantine(tmp_path):
    return Quarantine(tmp_path / "run" / "quarantine.jsonl")


def load(manifest, quarantine, **options):
    options = {"batch": 4, "executor": PlainExecutor(), "stall": 60.0} | options
    return Loader(manifest, VIEWS, options.pop("config", CONFIG), quarantine=quarantine, **options)


def collect(loader, batches):
    """Keys, ids, views and geometry of so many batches, end to end; closes the loader."""
    with loader:
        got = [next(loader) for _ in range(batches)]
    tensors = {
        f"{kind}.{view.name}": torch.cat([getattr(batch, kind)[view.name] for batch in got])
        for kind in ("views", "geometry")
        for view in VIEWS
    }
    return [key for batch in got for key in batch.keys], np.concatenate([batch.ids for batch in got]), tensors


def assert_equal(a, b):
    assert a[0] == b[0]
    assert np.array_equal(a[1], b[1])
    for name in a[2]:
        assert torch.equal(a[2][name], b[2][name]), name


def part(stream, start, stop):
    return stream[0][start:stop], stream[1][start:stop], {k: v[start:stop] for k, v in stream[2].items()}


def spoil(manifest, index, offset=0, data=None):
    """Overwrite bytes of a sample; by default everything behind its image header."""
    shard, row = divmod(index, PER_SHARD)
    if data is None:
        offset = PICTURES[index].index(b"\xff\xda")
        data = b"\0" * (len(PICTURES[index]) - offset)
    with manifest.path(shard).open("r+b") as file:
        file.seek(int(manifest.rows(shard).offset[row]) + offset)
        file.write(data)


def test_a_batch_is_what_it_says(manifest, quarantine):
    loader = load(manifest, quarantine, batch=5, start=10)
    with loader:
        batch = next(loader)
        assert batch.position == 10
        assert loader.position == 15
    assert batch.views["global"].shape == (5, 2, 3, 16, 16)
    assert batch.views["local"].shape == (5, 3, 3, 8, 8)
    assert batch.views["local"].dtype == torch.float32
    assert batch.geometry["global"].shape == (5, 2, 2, 3)
    assert batch.geometry["global"].dtype == torch.float32
    assert batch.ids.shape == (5, 2)
    assert batch.keys == [f"k{shard * PER_SHARD + row:03d}" for shard, row in batch.ids.tolist()]


def test_the_stream_does_not_depend_on_how_it_is_cut(manifest, quarantine):
    """Batch size, world size, threads, prefetch and place of start are all the same to it, over three epochs."""
    whole = collect(load(manifest, quarantine, batch=6), 12)
    assert_equal(collect(load(manifest, quarantine, batch=36), 2), whole)
    config = CONFIG.model_copy(update={"prefetch": 5, "reader_threads": 1})
    assert_equal(collect(load(manifest, quarantine, batch=9, start=18, config=config), 6), part(whole, 18, 72))
    ranks = [collect(load(manifest, quarantine, batch=12, world=3, rank=rank), 6) for rank in range(3)]
    for step in range(6):
        for rank in range(3):
            mine, first = part(ranks[rank], 4 * step, 4 * step + 4), 12 * step + 4 * rank
            assert_equal(mine, part(whole, first, first + 4))
    assert sorted(whole[0][:N]) == [f"k{i:03d}" for i in range(N)]


def test_what_is_prefetched_is_not_decided(manifest, quarantine):
    """A loop that is killed after some steps goes on from its cursor, whatever lay ready."""
    whole = collect(load(manifest, quarantine), 9)
    cursor = Cursor(manifest.digest, CONFIG.seed, CONFIG.lanes, CONFIG.window)
    with load(manifest, quarantine) as loader:
        for _ in range(3):
            next(loader)
            cursor = cursor.advance(4, committed=True)
        next(loader)  # delivered, but its step was never decided
    cursor = Cursor.from_json(cursor.to_json())
    cursor.check(manifest.digest, CONFIG.seed, CONFIG.lanes, CONFIG.window)
    assert_equal(collect(load(manifest, quarantine, start=cursor.position), 6), part(whole, 12, 36))


def test_seek_goes_both_ways(manifest, quarantine):
    whole = collect(load(manifest, quarantine, batch=3), 12)
    with load(manifest, quarantine, batch=3) as loader:
        for position in (0, 9, 30, 3, 3, 0):
            loader.seek(position)
            assert loader.position == position
            batch = next(loader)
            assert batch.position == position
            assert torch.equal(batch.views["local"], whole[2]["views.local"][position : position + 3])


def test_one_thread_runs_the_executor(manifest, quarantine):
    executor = PlainExecutor()
    collect(load(manifest, quarantine, executor=executor), 5)
    assert len(executor.threads) == 1
    assert threading.get_ident() not in executor.threads


@pytest.mark.parametrize("known", [False, True], ids=["found", "known"])
@pytest.mark.parametrize("deep", [True, False], ids=["deep", "quick"])
def test_damage_costs_its_own_slot(tmp_path, quarantine, deep, known):
    """Garbage (found by checksum or by the decoder) and a truncated tar, known before or not."""
    whole = collect(load(write_data(tmp_path / "whole"), quarantine), 12)
    manifest = write_data(tmp_path / "spoiled", deep)
    bad = [8, 22, 23]
    spoil(manifest, 8)
    os.truncate(manifest.path(3), int(manifest.rows(3).offset[4]) + 100)
    if known:
        for i in bad:
            quarantine.add(manifest.urls[i // PER_SHARD], i % PER_SHARD, f"k{i:03d}", "known")
    loader = load(manifest, quarantine)
    got = collect(loader, 12)
    for slot, key in enumerate(whole[0]):
        if int(key[1:]) in bad:
            assert int(got[0][slot][1:]) == first_healthy(slot, bad)
        else:
            assert_equal(part(got, slot, slot + 1), part(whole, slot, slot + 1))
    assert loader.stats.substituted == 6
    assert loader.stats.quarantined == 3
    assert [entry.key for entry in Quarantine(quarantine.path)] == [f"k{i:03d}" for i in bad]
    again = collect(load(manifest, Quarantine(quarantine.path), batch=7, start=4), 6)
    assert_equal(again, part(got, 4, 46))


def first_healthy(position, bad):
    draws = integers(CONFIG.seed, [position], SUBSTITUTE, 100, N)[0].tolist()
    return next(i for i in draws if i not in bad)


def test_a_substitute_that_does_not_decode_is_substituted(tmp_path, quarantine):
    manifest = write_data(tmp_path / "data", deep=False)
    draws = list(dict.fromkeys(integers(CONFIG.seed, [5], SUBSTITUTE, 100, N)[0].tolist()))
    bad = sorted({5, *draws[:3]})
    for index in bad:
        spoil(manifest, index)
    keys, _, _ = collect(load(manifest, quarantine, order=Sequential(manifest.counts), start=5, batch=1), 1)
    assert keys == [f"k{first_healthy(5, bad):03d}"]
    assert (manifest.urls[draws[0] // PER_SHARD], draws[0] % PER_SHARD) in quarantine


def test_a_flipped_byte_in_a_pixel_is_found(manifest, quarantine):
    spoil(manifest, 13, len(PICTURES[13]) - 30, bytes([PICTURES[13][-30] ^ 1]))
    keys, _, _ = collect(load(manifest, quarantine), 6)
    assert "checksum" in next(iter(quarantine)).reason
    assert sorted(set(keys)) == [f"k{i:03d}" for i in range(N) if i != 13]


def test_too_much_damage_stops_the_stream(manifest, quarantine):
    for index in range(0, N, 2):
        spoil(manifest, index)
    config = CONFIG.model_copy(update={"damage_bound": 0.2})
    with (
        load(manifest, quarantine, config=config) as loader,
        pytest.raises(DamageError, match=r"5 of 24 samples.*4 allowed.*gristmill verify"),
    ):
        for _ in loader:
            pass
    with pytest.raises(DamageError, match="4 allowed"):
        load(manifest, quarantine, config=config)


@pytest.mark.parametrize("replace", [False, True], ids=["missing", "replaced"])
def test_a_shard_that_is_not_the_old_one_stops_where_it_is_met(manifest, quarantine, replace):
    """Batches before it are delivered; the error stays until it is mended, and then the stream goes on as it was."""
    order = Sequential(manifest.counts)
    whole = collect(load(manifest, quarantine, order=order), 6)
    away = manifest.path(2).rename(manifest.path(2).with_suffix(".away"))
    if replace:
        manifest.path(2).write_bytes(away.read_bytes() + b"\0" * 10240)
    with load(manifest, quarantine, order=order) as loader:
        for first in (0, 4, 8):
            assert next(loader).keys == whole[0][first : first + 4]
        for _ in range(2):
            with pytest.raises(DamageError, match=r"000002\.tar"):
                next(loader)
        assert loader.position == 12
    assert quarantine.count == 0
    away.rename(manifest.path(2))
    with load(manifest, quarantine, order=order, start=12) as loader:
        assert next(loader).keys == whole[0][12:16]


class Faulty(PlainExecutor):
    """Fails in its third run, until it is told not to."""

    def __init__(self, error):
        super().__init__()
        self.error, self.calls = error, 0

    def run(self, data, draws):
        self.calls += 1
        if self.runs == 2 and self.error is not None:
            raise self.error
        return super().run(data, draws)


@pytest.mark.parametrize("error", [RuntimeError("driver lost"), DecodeError([]), SystemExit(3)], ids=repr)
def test_an_exception_comes_out_at_its_own_batch(manifest, quarantine, error):
    executor = Faulty(error)
    with load(manifest, quarantine, executor=executor) as loader:
        assert [next(loader).position for _ in range(2)] == [0, 4]
        for _ in range(2):
            with pytest.raises(type(error)):
                next(loader)
        time.sleep(0.1)
        assert executor.calls == 3  # nothing behind the gap is worked on
        executor.error = None
        loader.seek(loader.position)
        assert next(loader).position == 8
    assert quarantine.count == 0


class Broken(PlainExecutor):
    """A decoder that lost its device: no image decodes any more."""

    def run(self, data, draws):
        raise DecodeError(list(range(len(data))))


def test_a_broken_decoder_is_not_taken_for_broken_images(manifest, quarantine):
    with load(manifest, quarantine, executor=Broken()) as loader, pytest.raises(DecodeError):
        next(loader)
    assert quarantine.count == 0


def test_a_batch_of_nothing_but_garbage_is_substituted(tmp_path, quarantine):
    manifest = write_data(tmp_path / "data", deep=False)
    for index in range(4):
        spoil(manifest, index)
    keys, _, _ = collect(load(manifest, quarantine, order=Sequential(manifest.counts)), 1)
    assert keys == [f"k{first_healthy(slot, range(4)):03d}" for slot in range(4)]


def test_an_executor_that_forgets_a_view_is_refused(manifest, quarantine):
    with (
        load(manifest, quarantine, executor=PlainExecutor(VIEWS[:1])) as loader,
        pytest.raises(LoaderError, match="local"),
    ):
        next(loader)


class Gated(PlainExecutor):
    """Runs once for each time that its gate is released."""

    def __init__(self):
        super().__init__()
        self.gate = threading.Semaphore(0)
        self.entered = threading.Semaphore(0)

    def run(self, data, draws):
        self.entered.release()
        assert self.gate.acquire(timeout=60)
        return super().run(data, draws)


def test_a_hanging_executor_is_named(manifest, quarantine):
    executor = Gated()
    loader = load(manifest, quarantine, executor=executor, stall=0.2)
    assert executor.entered.acquire(timeout=60)
    with pytest.raises(StallError, match=r"no batch within 0\.2 s at position 0: stage 'augment' has been augmenting"):
        next(loader)
    assert loader.stats.starved_seconds > 0
    loader.stall = 60
    executor.gate.release(100)
    assert next(loader).position == 0  # late, not lost
    loader.close()


def test_hanging_storage_is_named(manifest, quarantine):
    """A shard that is a pipe: opening it blocks for real."""
    manifest.path(0).unlink()
    os.mkfifo(manifest.path(0))
    loader = load(manifest, quarantine, order=Sequential(manifest.counts), stall=0.2)
    while not loader._reader.busy:
        time.sleep(0.01)
    with pytest.raises(StallError, match=r"stage 'read' has been reading .* position 0 \(000000\.tar\) .*storage"):
        next(loader)
    loader.stall = 60
    os.close(os.open(manifest.path(0), os.O_WRONLY))
    with pytest.raises(DamageError, match=r"000000\.tar cannot be read"):
        next(loader)
    loader.close()


def test_every_batch_taken_starts_one_more_and_no_more(manifest, quarantine):
    """Refill goes batch by batch, and what lies ready never exceeds the capacity."""
    executor = Gated()
    with load(manifest, quarantine, executor=executor) as loader:
        for _ in range(CONFIG.prefetch):
            assert executor.entered.acquire(timeout=60)
            executor.gate.release()
        for _ in range(5):
            assert not executor.entered.acquire(timeout=0.05)  # the buffer is full
            next(loader)
            assert executor.entered.acquire(timeout=60)  # room for one: the next one begins at once
            executor.gate.release()
        executor.gate.release(100)


class Recorded(Sequential):
    """Notes which positions were asked for."""

    def __init__(self, counts):
        super().__init__(counts)
        self.asked = []

    def locate(self, positions):
        self.asked += np.asarray(positions).tolist()
        return super().locate(positions)


def test_reading_goes_on_while_the_executor_works(manifest, quarantine):
    """Two batches ahead of the one in work, and no more."""
    executor, order = Gated(), Recorded(manifest.counts)
    loader = load(manifest, quarantine, executor=executor, order=order)
    assert executor.entered.acquire(timeout=60)
    deadline = time.monotonic() + 60
    while len(order.asked) < 12 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert order.asked == list(range(12))
    executor.gate.release(100)
    loader.close()


def test_close_in_the_middle_of_everything(manifest, quarantine):
    executor = Gated()
    loader = load(manifest, quarantine, executor=executor)
    assert executor.entered.acquire(timeout=60)
    assert len(ours()) >= 2
    closer = threading.Thread(target=loader.close)
    closer.start()
    executor.gate.release(100)
    closer.join(60)
    assert not closer.is_alive()
    assert not ours()
    assert not any(str(manifest.root) in name and name.endswith(".tar") for name in open_files())
    loader.close()
    with pytest.raises(LoaderError, match="closed"):
        next(loader)
    with pytest.raises(LoaderError, match="closed"):
        loader.seek(0)


def test_closing_wakes_a_waiting_consumer(manifest, quarantine):
    executor, seen = Gated(), []
    loader = load(manifest, quarantine, executor=executor)

    def consume():
        try:
            next(loader)
        except LoaderError as error:
            seen.append(error)

    assert executor.entered.acquire(timeout=60)
    consumer = threading.Thread(target=consume)
    consumer.start()
    closer = threading.Thread(target=loader.close)
    closer.start()
    consumer.join(60)
    executor.gate.release(100)
    closer.join(60)
    assert len(seen) == 1


def test_counters(manifest, quarantine):
    with load(manifest, quarantine, batch=6) as loader:
        for _ in range(4):
            next(loader)
        stats = loader.stats
        assert stats.samples == N
        assert stats.bytes == sum(map(len, PICTURES))
        assert stats.ready_capacity == CONFIG.prefetch
        assert 0 <= stats.ready_depth <= stats.ready_capacity
        assert stats.read_seconds > 0
        assert stats.augment_seconds > 0
        assert stats.substituted == stats.quarantined == 0


@pytest.mark.parametrize(
    "options",
    [{"batch": 0}, {"batch": 6, "world": 4}, {"world": 2, "rank": 2}, {"start": -1}, {"stop": 8, "world": 2}],
)
def test_impossible_loaders_are_refused(manifest, quarantine, options):
    with pytest.raises(LoaderError):
        load(manifest, quarantine, **options)


def test_an_end_leaves_a_shorter_batch_and_stays_ended(manifest, quarantine):
    with load(manifest, quarantine, batch=10, stop=N) as loader:
        assert [len(batch.keys) for batch in loader] == [10, 10, 4]
        assert loader.position == N
        assert list(loader) == []


@pytest.mark.parametrize("keep", [True, False])
def test_probes_see_every_healthy_image_once(tmp_path, quarantine, keep):
    manifest = write_data(tmp_path / "data", deep=False)
    spoil(manifest, 8)
    spoil(manifest, 9, data=b"nothing")
    view = View.model_validate({"name": "probe", "size": 8, "augment": "none"})
    config = CONFIG.model_copy(update={"seed": 3})
    seen = []
    for keys, images in probe_batches(
        manifest, 8, 7, executor=PlainExecutor([view]), config=config, quarantine=quarantine if keep else None
    ):
        assert images.shape == (len(keys), 3, 8, 8)
        for key, image in zip(keys, images, strict=True):
            with Image.open(io.BytesIO(PICTURES[int(key[1:])])) as picture:
                left = (picture.width - 32) // 2
                small = picture.resize((8, 8), Image.Resampling.BILINEAR, box=(left, 0, left + 32, 32))
            assert torch.equal(image, torch.from_numpy(np.asarray(small, np.float32).transpose(2, 0, 1) / 255))
        seen += keys
    assert seen == [f"k{i:03d}" for i in range(N) if i not in (8, 9)]
    assert quarantine.count == (2 if keep else 0)


def test_a_limited_probe_takes_the_same_images_from_all_over(manifest, quarantine):
    view = View.model_validate({"name": "probe", "size": 8, "augment": "none"})

    def keys(limit, batch):
        batches = probe_batches(manifest, 8, batch, limit=limit, executor=PlainExecutor([view]), quarantine=quarantine)
        return [key for keys, _ in batches for key in keys]

    few = keys(9, 4)
    assert len(set(few)) == 9
    assert len({int(key[1:]) // PER_SHARD for key in few}) > 1
    assert keys(9, 7) == few
    assert keys(N, 7) == keys(10 * N, 5) == [f"k{i:03d}" for i in range(N)]


def test_probe_batches_left_early_leave_nothing(manifest, quarantine):
    view = View.model_validate({"name": "probe", "size": 8, "augment": "none"})
    batches = probe_batches(manifest, 8, 5, executor=PlainExecutor([view]), quarantine=quarantine)
    next(batches)
    batches.close()
    assert not ours()


def test_dali_gives_one_stream_however_it_is_cut_and_spoiled(tmp_path, quarantine):
    """The real executor, over a data set whose damage only the decoder sees."""
    manifest = write_data(tmp_path / "data", deep=False)
    whole = collect(load(manifest, quarantine, executor=None, batch=12), 3)
    for index in (2, 15):
        spoil(manifest, index)
    got = collect(load(manifest, quarantine, executor=None, batch=12), 3)
    assert sorted(entry.key for entry in quarantine) == ["k002", "k015"]
    for slot, key in enumerate(whole[0]):
        if key in ("k002", "k015"):
            assert got[0][slot] == f"k{first_healthy(slot, (2, 15)):03d}"
        else:
            assert_equal(part(got, slot, slot + 1), part(whole, slot, slot + 1))
    config = CONFIG.model_copy(update={"dali_threads": 2})
    fresh = Quarantine(tmp_path / "fresh.jsonl")
    assert_equal(collect(load(manifest, fresh, executor=None, batch=7, start=3, config=config), 4), part(got, 3, 31))


def test_dali_is_built_in_the_thread_that_runs_it(manifest, quarantine, monkeypatch):
    built, ran = [], []
    build, run = DaliExecutor.__init__, DaliExecutor.run

    def noting_build(self, *args, **kwargs):
        built.append(threading.current_thread().name)
        build(self, *args, **kwargs)

    def noting_run(self, *args):
        ran.append(threading.current_thread().name)
        return run(self, *args)

    monkeypatch.setattr(DaliExecutor, "__init__", noting_build)
    monkeypatch.setattr(DaliExecutor, "run", noting_run)
    collect(load(manifest, quarantine, executor=None), 2)
    assert built == ["gristmill-augment"]
    assert set(ran) == {"gristmill-augment"}


def test_dali_probes(manifest):
    images = torch.cat([images for _, images in probe_batches(manifest, 16, 10)])
    assert images.shape == (N, 3, 16, 16)
    assert torch.isfinite(images).all()
    assert len({tuple(image.flatten().tolist()) for image in images}) == N
