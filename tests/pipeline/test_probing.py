"""Probes see every healthy image once; the real executors behind the loader."""

import io
import threading

import numpy as np
import pytest
import torch
from gristmill.pipeline.augment.cpu import CpuExecutor
from gristmill.pipeline.augment.dali import DaliExecutor
from gristmill.pipeline.probing import probe_batches
from gristmill.pipeline.views import View
from gristmill.shards.quarantine import Quarantine
from PIL import Image

from .pictures import (
    CONFIG,
    PER_SHARD,
    PICTURES,
    N,
    PlainExecutor,
    assert_equal,
    collect,
    first_healthy,
    load,
    ours,
    part,
    spoil,
    write_data,
)


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


@pytest.mark.parametrize("augment", ["cpu", "dali"])
def test_one_stream_however_it_is_cut_and_spoiled(tmp_path, quarantine, augment):
    """The real executors, over a data set whose damage only the decoder sees."""
    config = CONFIG.model_copy(update={"augment": augment})
    manifest = write_data(tmp_path / "data", deep=False)
    whole = collect(load(manifest, quarantine, executor=None, batch=12, config=config), 3)
    for index in (2, 15):
        spoil(manifest, index)
    got = collect(load(manifest, quarantine, executor=None, batch=12, config=config), 3)
    assert sorted(entry.key for entry in quarantine) == ["k002", "k015"]
    for slot, key in enumerate(whole[0]):
        if key in ("k002", "k015"):
            assert got[0][slot] == f"k{first_healthy(slot, (2, 15)):03d}"
        else:
            assert_equal(part(got, slot, slot + 1), part(whole, slot, slot + 1))
    config = config.model_copy(update={"augment_threads": 2})
    fresh = Quarantine(tmp_path / "fresh.jsonl")
    assert_equal(collect(load(manifest, fresh, executor=None, batch=7, start=3, config=config), 4), part(got, 3, 31))


@pytest.mark.parametrize("augment", ["auto", "dali"])
def test_the_executor_is_built_in_the_thread_that_runs_it(manifest, quarantine, monkeypatch, augment):
    """Which one it is says a fixed rule: on a machine's CPU our own, unless DALI is asked for."""
    built, ran = [], []
    kind = DaliExecutor if augment == "dali" else CpuExecutor
    build, run = kind.__init__, kind.run

    def noting_build(self, *args, **kwargs):
        built.append(threading.current_thread().name)
        build(self, *args, **kwargs)

    def noting_run(self, *args):
        ran.append(threading.current_thread().name)
        return run(self, *args)

    monkeypatch.setattr(kind, "__init__", noting_build)
    monkeypatch.setattr(kind, "run", noting_run)
    collect(load(manifest, quarantine, executor=None, config=CONFIG.model_copy(update={"augment": augment})), 2)
    assert built == ["gristmill-augment"]
    assert set(ran) == {"gristmill-augment"}
