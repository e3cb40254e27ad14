"""The loader alone: an exact, resumable stream in a line, over folders, urls, and mixtures of them."""

import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from gristmill.pipeline import images
from gristmill.pipeline.augment.dali import DaliExecutor
from gristmill.pipeline.cursor import CursorError
from gristmill.pipeline.draws import Plan
from gristmill.pipeline.standalone import ImagesError
from gristmill.pipeline.views import CacheConfig, StreamConfig
from gristmill.shards.manifest import ManifestError

from ..faulty_http import FaultyServer
from .pictures import CONFIG, VIEWS, N, PlainExecutor, ours, write_data
from .rows import write_rows


def stream(data, batch=4, **options):
    return images(data, batch, **{"views": VIEWS, "executor": PlainExecutor(), "config": CONFIG} | options)


def keys(some, batches):
    return [key for _ in range(batches) for key in next(some).keys]


def test_a_line_gives_tensors(manifest):
    """With DALI, no views named: the middle of each image, every image once an epoch."""
    with images(manifest.root, 6, size=16) as some:
        got = [next(some) for _ in range(N // 6)]
        assert some.epoch == 1
        assert some.position == N
    for batch in got:
        assert batch.views["image"].shape == (6, 1, 3, 16, 16)
        assert batch.views["image"].dtype == torch.float32
    assert sorted(key for batch in got for key in batch.keys) == [f"k{i:03d}" for i in range(N)]
    assert not ours()


def test_a_state_goes_on_exactly_in_another_process_or_batch_size(manifest):
    with stream(manifest.root) as some:
        whole = keys(some, 18)
    with stream(manifest.root) as some:
        begun = keys(some, 5)
        state = some.state()
        next(some)  # after the state, and lost with the process
    assert len(state) < 1024
    with stream(manifest.root, batch=13, state=state) as some:
        assert some.position == 20
        assert begun + keys(some, 4) == whole[:72]
        some.seek(state)
        assert keys(some, 1) == whole[20:33]
        some.seek(7)
        assert keys(some, 2) == whole[7:33]


def test_a_state_brings_its_order_along_when_the_data_grew(tmp_path):
    """Without a config lanes and window are suggested by the number of images; a state goes on with its own."""
    options = {"views": VIEWS, "executor": PlainExecutor()}
    with images(write_rows(tmp_path / "data", [1000]).root, 8, **options) as some:
        some.seek(400)
        state, whole = some.state(), some.stream.locate(np.arange(1000))
    with images(write_rows(tmp_path / "data", [1000, 200]).root, 8, state=state, **options) as some:
        assert some.position == 400
        assert np.array_equal(some.stream.locate(np.arange(1000)), whole)
        assert some.stream.cursor.grown == ((0, 0, 1), (1000, 0, 2))


def test_ranks_share_the_stream_and_the_state(manifest):
    with stream(manifest.root, batch=6) as some:
        whole = keys(some, 6)
    parts, states = [], []
    for rank in range(2):
        with stream(manifest.root, batch=6, rank=rank, world=2) as some:
            parts.append([next(some).keys for _ in range(6)])
            states.append(some.state())
    assert [key for step in range(6) for rank in range(2) for key in parts[rank][step]] == whole
    assert states[0] == states[1]


def test_a_state_of_other_data_is_refused(manifest):
    with stream(manifest.root) as some:
        state = some.state()
    with pytest.raises(CursorError, match="lanes"), stream(manifest.root, config=StreamConfig(seed=7), state=state):
        pass
    with stream(manifest.root, config=CONFIG.model_copy(update={"lanes": 5})) as some:
        with pytest.raises(ImagesError, match="another order"):
            some.seek(state)
        with pytest.raises(CursorError, match="data: the checkpoint mixes"):
            some.seek(state.replace(manifest.digest, "a+b").replace('"grown":[[0,0,4]]', '"grown":[[0,0,4],[0,1,4]]'))
    with stream(manifest.root) as some, pytest.raises(ImagesError, match="from 0"):
        some.seek(-1)


def test_two_seeds_are_refused(manifest):
    with pytest.raises(ImagesError, match=r"seed is 3, and config\.seed is 7"):
        stream(manifest.root, seed=3)
    with stream(manifest.root, seed=CONFIG.seed) as some:
        assert some.stream.cursor.seed == CONFIG.seed


def test_a_mixture_with_weights_and_filters(manifest, tmp_path):
    other = write_data(tmp_path / "other")
    data = [{"path": manifest.root, "weight": 3}, {"path": str(other.root), "where": "width == 44"}]
    with stream(data, batch=64) as some:
        batch = next(some)
    second = batch.ids[:, 0] >= len(manifest.urls)
    assert second.sum() == pytest.approx(16, abs=12)
    assert all(int(key[1:]) % 5 == 4 for key in np.array(batch.keys)[second])
    with pytest.raises(ImagesError, match="unknown key 'weigth'"):
        stream([{"path": manifest.root, "weigth": 3}])


def test_a_url_streams_through_the_cache(manifest, tmp_path):
    with FaultyServer() as server:
        for path in sorted(manifest.root.rglob("*")):
            if path.is_file():
                server.put(f"/set/{path.relative_to(manifest.root)}", path.read_bytes())
        with stream(manifest.root) as some:
            expected = keys(some, 12)
        cache = CacheConfig(folder=tmp_path / "cache", bytes=10 * manifest.bytes)
        config = CONFIG.model_copy(update={"cache": cache})
        with stream(server.url("/set"), config=config) as some:
            assert keys(some, 12) == expected
        with stream({"path": server.url("/set"), "where": "width >= 42"}, config=config) as some:
            assert all(int(key[1:]) % 5 >= 2 for key in keys(some, 12))
        with pytest.raises(ManifestError, match="no data set"):
            stream(server.url("/nothing"), config=config)


def test_it_ends_where_it_is_told_to(manifest):
    with stream(manifest.root, batch=10, stop=N) as some:
        assert [len(batch.keys) for batch in some] == [10, 10, 4]
        assert some.position == N


def begun(some):
    """The counters behind the first batch: until then a busy machine may have waited for what starts."""
    next(some)
    return replace(some.loader.stats)


def test_the_slow_stage_is_named(manifest):
    """Each in turn is slowed down for real."""

    class Slow(PlainExecutor):
        def run(self, data, draws):
            time.sleep(0.05)
            return super().run(data, draws)

    with stream(manifest.root, executor=Slow()) as some:
        before = begun(some)
        keys(some, 10)
        assert some.loader.bottleneck(before) == "augment"
    with stream(manifest.root) as some:
        before = begun(some)
        for _ in range(8):
            next(some)
            time.sleep(0.1)
        assert some.loader.bottleneck(before) == "consumer"
    with FaultyServer() as server:
        for path in sorted(manifest.root.rglob("*")):
            if path.is_file():
                server.put(f"/set/{path.relative_to(manifest.root)}", path.read_bytes())
        with stream(server.url("/set"), config=CONFIG.model_copy(update={"prefetch": 1})) as some:
            server.hold = 0.1
            keys(some, 8)
            assert some.bottleneck() == "storage"


def test_memory_stays_bounded_while_nobody_takes(manifest):
    """The consumer goes away: reading stops after what the buffers hold."""
    runs = []

    class Counting(PlainExecutor):
        def run(self, data, draws):
            runs.append(len(data))
            return super().run(data, draws)

    with stream(manifest.root, executor=Counting()) as some:
        until = time.monotonic() + 60
        while some.loader._ready.depth < CONFIG.prefetch and time.monotonic() < until:
            time.sleep(0.01)
        threading.Event().wait(0.2)
        assert len(runs) == CONFIG.prefetch
        assert some.loader._encoded.depth <= 2


def test_dali_and_plain_read_the_same_images(manifest):
    plan = Plan(VIEWS)
    with stream(manifest.root, executor=DaliExecutor(plan, batch=4)) as a, stream(manifest.root) as b:
        assert keys(a, 3) == keys(b, 3)
