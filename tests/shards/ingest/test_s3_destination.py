"""Straight into an S3 bucket: the same bytes as into a folder, through kills and a server that is gone for a while."""

import itertools
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
from gristmill.pipeline.order import Sequential
from gristmill.pipeline.reader import Reader
from gristmill.shards import Manifest, Quarantine, open_manifest
from gristmill.shards.ingest import IngestConfig, IngestError, ingest
from gristmill.shards.objects import _credentials
from pyarrow import fs

from ...servers import WEED_MISSING, Server, find_weed, weed_server
from ...workers import Workers
from .life import CONFIG
from .sets import SMALL, counted, noise, scenes, tree

_numbers = itertools.count()


@pytest.fixture(scope="module")
def weed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    if find_weed() is None:
        pytest.skip(WEED_MISSING)
    with weed_server(tmp_path_factory.mktemp("weed")) as server:
        store(server, allow_bucket_creation=True).create_dir("crawl")
        yield server


def store(weed: Server, **more: bool) -> fs.S3FileSystem:
    keys = {"access_key": weed.key, "secret_key": weed.secret, "endpoint_override": weed.endpoint, "scheme": "http"}
    return fs.S3FileSystem(**keys, **more)  # pyright: ignore


@pytest.fixture
def url(weed: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """An empty place in the bucket; the keys are in the environment."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", weed.key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", weed.secret)
    _credentials.cache_clear()
    yield f"s3://crawl/{next(_numbers)}?endpoint_override=http://{weed.endpoint}"
    _credentials.cache_clear()


def with_keys(weed: Server, url: str, secret: str = "") -> str:
    return url.replace("s3://", f"s3://{weed.key}:{quote(secret or weed.secret, safe='')}@")


def there(weed: Server, url: str) -> dict[str, bytes]:
    """Every object below a place."""
    system, root = store(weed), url.partition("?")[0].removeprefix("s3://")
    found = system.get_file_info(fs.FileSelector(root, recursive=True, allow_not_found=True))
    files = [info.path for info in found if info.type is fs.FileType.File]
    return {path[len(root) + 1 :]: system.open_input_stream(path).read() for path in sorted(files)}


def part(url: str, name: str) -> str:
    return url.replace("?", f"/{name}?")


def test_the_same_bytes_as_in_a_folder_and_the_stream_reads_them(weed: Server, url: str, tmp_path: Path) -> None:
    data = scenes(tmp_path / "in", 20)
    config = SMALL.model_copy(update={"holdout": 0.3})
    ingest([tmp_path / "in"], tmp_path / "calm", config, workers=1)
    # With the keys in the url: processes that send were started before they stood in the environment.
    report = ingest([tmp_path / "in"], with_keys(weed, url), config, work=tmp_path / "work", workers=2)
    assert report.accepted == 20
    assert there(weed, url) == tree(tmp_path / "calm")
    assert list((tmp_path / "work").rglob("*.tar")) == [], "tars do not stay in the work folder"

    found = []
    for half in ("train", "probe"):
        manifest = open_manifest(part(url, half), tmp_path / "copy" / half)
        reader = Reader(manifest, Quarantine(tmp_path / "q.jsonl"), order=Sequential(manifest.counts), seed=0)
        try:
            read = reader.read(np.arange(manifest.samples))
        finally:
            reader.close()
        assert not read.substituted.any()
        found += [one.tobytes() for one in read.data]
    assert sorted(found) == sorted(data)


def test_an_append_from_another_machine(weed: Server, url: str, tmp_path: Path) -> None:
    """The work folder of the first one is gone: manifests, ledger and what was kept come from the bucket."""
    scenes(tmp_path / "one", 15)
    scenes(tmp_path / "two", 12, 10)
    ingest([tmp_path / "one"], url, SMALL, work=tmp_path / "first", workers=1)
    before = {name: data for name, data in there(weed, url).items() if name.endswith(".tar")}
    with pytest.raises(IngestError, match="holds a data set already"):
        ingest([tmp_path / "two"], url, SMALL, work=tmp_path / "second", workers=1)
    report = ingest([tmp_path / "two"], url, SMALL, work=tmp_path / "second", workers=1, append=True)
    assert report.outcomes == {"duplicate": 5, "kept": 7}
    assert before.items() < there(weed, url).items()

    ingest([tmp_path / "one"], tmp_path / "calm", SMALL, workers=1)
    ingest([tmp_path / "two"], tmp_path / "calm", SMALL, workers=1, append=True)
    assert there(weed, url) == tree(tmp_path / "calm")
    with pytest.raises(IngestError, match=r"nothing in .* failed in a way that may have passed"):
        ingest([], url, SMALL, work=tmp_path / "second", workers=1, retry_failed=True)


def test_killed_in_the_middle_and_gone_on_with(weed: Server, url: str, tmp_path: Path, workers: Workers) -> None:
    scenes(tmp_path / "in", 90)
    ingest([tmp_path / "in"], tmp_path / "calm", CONFIG, workers=1)
    expected = tree(tmp_path / "calm")
    values = {"source": str(tmp_path / "in"), "out": with_keys(weed, url), "workers": 1, "work": str(tmp_path / "work")}
    for dies_at in (9, 12, 10, 8, 7):
        worker = workers.start("live(**values)", values={**values, "dies_at": dies_at})
        assert worker.join() == -9, worker.output()
        assert weed.secret not in worker.output()
        found = there(weed, url)
        assert {name: data for name, data in found.items() if name.endswith(".tar")}.items() <= expected.items()
    worker = workers.start("live(**values)", values=values)
    assert worker.join() == 0, worker.output()
    assert there(weed, url) == expected


def test_begun_anew_it_leaves_nothing_of_the_first_start(
    weed: Server, url: str, tmp_path: Path, workers: Workers
) -> None:
    scenes(tmp_path / "in", 60)
    scenes(tmp_path / "other", 5, 300)
    values = {"source": str(tmp_path / "in"), "out": url, "workers": 1, "work": str(tmp_path / "work")}
    keys = "import os; os.environ.update(AWS_ACCESS_KEY_ID=keys[0], AWS_SECRET_ACCESS_KEY=keys[1]); live(**values)"
    worker = workers.start(keys, values={**values, "dies_at": 24}, keys=[weed.key, weed.secret])
    assert worker.join() == -9, worker.output()
    assert any(name.endswith(".tar") for name in there(weed, url))
    ingest([tmp_path / "other"], url, SMALL, work=tmp_path / "work", workers=1, restart=True)
    ingest([tmp_path / "other"], tmp_path / "calm", SMALL, workers=1)
    assert there(weed, url) == tree(tmp_path / "calm")


@pytest.mark.parametrize("wrong", ["secret", "bucket", "server", "form"])
def test_a_wrong_destination_is_refused_at_once(weed: Server, url: str, tmp_path: Path, wrong: str) -> None:
    """Before anything is read, with a sentence that says what to do, and nothing left behind."""
    scenes(tmp_path / "in", 4)
    place = {
        "secret": with_keys(weed, url, "wr0ng/canary"),
        "bucket": url.replace("s3://crawl", "s3://nowhere"),
        "server": url.replace(weed.endpoint, "127.0.0.1:1"),
        "form": "s3://",
    }[wrong]
    with pytest.raises(IngestError) as caught:
        ingest([tmp_path / "in"], place, SMALL, work=tmp_path / "work", workers=1)
    assert "canary" not in str(caught.value)
    assert any(word in str(caught.value) for word in ("see that the storage", "write s3://bucket/folder"))
    assert not (tmp_path / "work").exists()
    with pytest.raises(IngestError, match="--work"):
        ingest([tmp_path / "in"], url, SMALL)


def test_a_server_that_is_gone_for_a_while(weed: Server, url: str, tmp_path: Path) -> None:
    """Killed once the first shard is there, and started again on its old data while the next one waits."""
    noise(tmp_path / "in", 12, 96)
    config, back = IngestConfig(unit=3, shard_samples=3), []
    ingest([tmp_path / "in"], tmp_path / "calm", config, workers=1)

    def start_again() -> None:
        time.sleep(2)
        command = [*weed.process.args, "-master.electionTimeout=1s"]  # pyright: ignore
        place = next(one for one in command if one.startswith("-dir=")).removeprefix("-dir=")
        back.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=place))

    thread = threading.Thread(target=start_again)

    def progress(stats: object) -> None:
        if stats.shards == 1 and weed.process.poll() is None:  # pyright: ignore
            weed.process.kill()
            weed.process.wait()
            thread.start()

    try:
        report = ingest([tmp_path / "in"], url, config, work=tmp_path / "work", workers=1, progress=progress)
        thread.join()
        assert report.accepted == 12
        assert there(weed, url) == tree(tmp_path / "calm")
        assert counted(tmp_path / "work") == {"kept": 12}
        assert Manifest.open(tmp_path / "work" / "train").samples == 12
    finally:
        thread.join()
        for process in back:
            process.kill()
            process.wait()
