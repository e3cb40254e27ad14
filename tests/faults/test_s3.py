"""A real S3 server that is killed in mid-epoch and comes back, and one that stays away."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow.fs
import pytest
from gristmill.pipeline.loader import Loader
from gristmill.shards.objects import _credentials
from gristmill.shards.quarantine import Quarantine

from ..servers import WEED_MISSING, Server, find_weed, weed_server
from ..waiting import wait_for
from .served import TARS, cached, client_stats, mirrored
from .streams import SLOTS, N, hold, load, take, write_set


@pytest.fixture(scope="module")
def weed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that holds the data set as s3://shards/set."""
    if find_weed() is None:
        pytest.skip(WEED_MISSING)
    data = write_set(tmp_path_factory.mktemp("s3") / "data")
    with weed_server(tmp_path_factory.mktemp("weed")) as server:
        store = pyarrow.fs.S3FileSystem(
            access_key=server.key,
            secret_key=server.secret,
            endpoint_override=server.endpoint,
            scheme="http",
            allow_bucket_creation=True,
        )
        store.create_dir("shards")
        for path in sorted(data.root.rglob("*")):
            if path.is_file():
                with store.open_output_stream(f"shards/set/{path.relative_to(data.root)}") as file:
                    file.write(path.read_bytes())
        yield server


@pytest.fixture
def remote(weed: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", weed.key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", weed.secret)
    _credentials.cache_clear()
    yield mirrored(f"s3://shards/set?endpoint_override=http://{weed.endpoint}", tmp_path / "copy")
    _credentials.cache_clear()


def start_again(weed: Server) -> subprocess.Popen[bytes]:
    """The same server, on its old ports and data. Alone in its cluster, it need not wait long for others to vote."""
    command = [*weed.process.args, "-master.electionTimeout=1s"]  # pyright: ignore[reportGeneralTypeIssues]
    place = next(one for one in command if one.startswith("-dir=")).removeprefix("-dir=")
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=place)


def tries(loader: Loader) -> int:
    return sum(client_stats(loader).retries.values())


def needs_no_server(loader: Loader) -> bool:
    """All shards are in the cache, and no range is being read ahead."""
    prefetcher, full = loader.reader._fetcher.prefetcher, (loader._encoded.capacity, loader._ready.capacity)
    assert prefetcher is not None
    return prefetcher.stats.fetched == len(TARS) and (loader._encoded.depth, loader._ready.depth) == full


@pytest.mark.fault("S3 server killed in mid-epoch, gone and back", varies=True)
def test_gone_and_back(tmp_path, undisturbed, weed, remote, fault):
    """SIGKILL while ranges are read; once tries have failed it is started anew on its old data, and all goes on.

    Then the same with a cache: once the shards have landed, it may stay away for good.
    """
    plain, quarantine = undisturbed.plain, Quarantine(tmp_path / "q.jsonl")
    back = None
    try:
        with load(remote, quarantine) as loader, ThreadPoolExecutor(1) as pool:
            got = take(loader, N // 2)
            weed.process.kill()
            weed.process.wait()
            rest = pool.submit(take, loader, SLOTS - N // 2)
            while tries(loader) < 5:
                time.sleep(0.01)
            back = start_again(weed)
            got += rest.result(timeout=100)
            assert client_stats(loader).failures == {}
            failed = tries(loader)
        fault.add(hold(got, plain.slots, plain.oracle), 1, failed_tries=failed)
        with load(remote, quarantine, config=cached(tmp_path / "cache", 1 << 20)) as loader:
            got = take(loader, N // 2)
            wait_for(lambda: needs_no_server(loader), 60, every=0.01)
            back.kill()
            back.wait()
            got += take(loader, SLOTS - N // 2)
            assert loader.reader.stats.cached_bytes > 0
        fault.add(hold(got, plain.slots, plain.oracle), 1)
    finally:
        if back is not None:
            back.kill()
            back.wait()
    assert quarantine.count == 0
    assert not quarantine.path.exists()
    fault.became = "waited for; with all shards in the cache not even noticed"
