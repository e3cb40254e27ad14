"""Damage costs its own slot, an error comes out at its own batch, and a stall names its stage."""

import os
import time

import pytest
from gristmill.pipeline.augment import DecodeError
from gristmill.pipeline.loader import LoaderError, StallError
from gristmill.pipeline.order import Sequential
from gristmill.pipeline.philox import SUBSTITUTE, integers
from gristmill.pipeline.reader import DamageError
from gristmill.shards.quarantine import Quarantine

from .pictures import (
    CONFIG,
    PER_SHARD,
    PICTURES,
    VIEWS,
    Gated,
    N,
    PlainExecutor,
    assert_equal,
    collect,
    first_healthy,
    load,
    part,
    spoil,
    write_data,
)


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
    while not loader.reader.doing():
        time.sleep(0.01)
    with pytest.raises(StallError, match=r"stage 'read' has been reading .* position 0 \(000000\.tar\) .*storage"):
        next(loader)
    loader.stall = 60
    os.close(os.open(manifest.path(0), os.O_WRONLY))
    with pytest.raises(DamageError, match=r"000000\.tar cannot be read"):
        next(loader)
    loader.close()
