"""More comes to a published data set: the old part stays as it was, and what failed is asked for again, alone."""

import json
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from gristmill.shards import Labels, Manifest, verify
from gristmill.shards.ingest import FetchConfig, IngestConfig, IngestError, ingest, outcomes

from .sets import SMALL, counted, encoded, key, ledger, scene, scenes, stored, tree
from .web import Page, Web

QUICK = FetchConfig(allow_private=True, tries=2, first_pause=0.01, longest_pause=0.02, timeout=5, connect_timeout=2)
URLS = IngestConfig(unit=4, shard_samples=7, fetch=QUICK)


def test_old_shards_stay_as_they_were(tmp_path: Path) -> None:
    scenes(tmp_path / "one", 15)
    scenes(tmp_path / "two", 12, 10)  # five of them are in the first one too
    out, config = tmp_path / "out", SMALL.model_copy(update={"holdout": 0.3})
    ingest([tmp_path / "one"], out, config, workers=1)
    old = {split: Manifest.open(out / split) for split in ("train", "probe")}
    tars = {name: data for name, data in tree(out).items() if name.endswith(".tar")}

    report = ingest([tmp_path / "two"], out, config, append=True, workers=1)
    assert (report.kind, report.inputs, report.outcomes) == ("append", 12, {"duplicate": 5, "kept": 7})
    assert (report.accepted, report.samples) == (7, 22)
    assert tars.items() <= tree(out).items()
    now = {split: Manifest.open(out / split) for split in old}
    for split, before in old.items():
        grown, count = now[split], len(before.urls)
        assert grown.urls[:count] == before.urls
        assert grown.digests[:count] == before.digests
        assert grown.identities[:count] == before.identities
        for shard in range(count):
            assert grown.rows(shard).keys == before.rows(shard).keys
            assert (grown.rows(shard).places == before.rows(shard).places).all()
        assert verify(out / split, deep=True) == []
    everything = stored(out / "train") | stored(out / "probe")
    paths = [path for name in ("one", "two") for path in sorted((tmp_path / name).rglob("*.*"))]
    assert everything == {key(data): data for data in (path.read_bytes() for path in paths)}

    rows = ledger(out)
    assert [row["input"] for row in rows] == list(range(27))
    assert counted(out) == outcomes(out) == {"kept": 22, "duplicate": 5}
    kept = {row["key"] for row in ledger(out, 0)}
    assert all(row["duplicate_of"] in kept for row in ledger(out, 1) if row["outcome"] == "duplicate")
    labels = Labels.open(out / "train")
    assert labels is not None
    assert labels.classes(labels.names[0]) == ["a", "b"]
    assert (labels.codes(list(everything), labels.names[0]) >= 0).all()
    about = [json.loads((out / "ledger" / f"{number:03d}.json").read_text()) for number in (0, 1)]
    assert [(one["kind"], one["base"], one["inputs"]) for one in about] == [("new", 0, 15), ("append", 15, 12)]

    third = ingest([tmp_path / "two"], out, config, append=True, workers=1)
    assert (third.accepted, third.outcomes) == (0, {"duplicate": 12}), "again on purpose: counted, and nothing added"
    assert [Manifest.open(out / split).samples for split in old] == [now[split].samples for split in old]


def test_appending_in_parts_gives_the_same_samples_as_all_at_once(tmp_path: Path) -> None:
    for part in range(3):
        scenes(tmp_path / f"{part}", 9, 6 * part)
    near = SMALL.model_copy(update={"near": 6})
    for part in range(3):
        ingest([tmp_path / f"{part}"], tmp_path / "parts", near, append=part > 0, workers=1)
    ingest([tmp_path / f"{part}" for part in range(3)], tmp_path / "whole", near, workers=1)
    assert list(stored(tmp_path / "parts" / "train")) == list(stored(tmp_path / "whole" / "train"))
    assert counted(tmp_path / "parts") == counted(tmp_path / "whole") == {"kept": 21, "duplicate": 6}


def test_the_index_of_what_was_kept_is_only_a_cache(tmp_path: Path) -> None:
    """Lost, or made for another threshold: the ledger has all of it, fingerprints of an exact ingest too."""
    image = scene(1, 200, 150)
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    (tmp_path / "one" / "a.jpg").write_bytes(encoded(image, quality=95))
    (tmp_path / "two" / "b.jpg").write_bytes(encoded(image, quality=70))
    (tmp_path / "two" / "c.jpg").write_bytes(encoded(scene(2)))
    ingest([tmp_path / "one"], tmp_path / "out", SMALL, workers=1)
    for path in sorted((tmp_path / "out" / ".ingest" / "known").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    near = SMALL.model_copy(update={"near": 8})
    report = ingest([tmp_path / "two"], tmp_path / "out", near, append=True, workers=1)
    assert report.outcomes == {"kept": 1, "near_duplicate": 1}


@pytest.fixture
def images() -> dict[str, bytes]:
    return {f"/{number}.jpg": encoded(scene(number)) for number in range(10)}


def test_only_what_failed_is_asked_for_again(tmp_path: Path, images: dict[str, bytes], closed_port: int) -> None:
    """Three servers: one that answers, one that fails half of the time, and one that is down at first."""
    out, urls = tmp_path / "out", tmp_path / "urls.txt"
    good = {name: Page(body=data) for name, data in images.items()}
    half = {name: Page(body=data + b"\0") for name, data in images.items()} | {"/9.jpg": Page(404)}
    for name in ("/0.jpg", "/1.jpg", "/2.jpg"):
        half[name] = Page(503)
    with Web(good) as one, Web(half) as two:
        lines = [one.url(name) for name in images] + [two.url(name) for name in images]
        lines += [f"http://127.0.0.1:{closed_port}{name}" for name in list(images)[:4]]
        urls.write_text("\n".join(lines))
        report = ingest([urls], out, URLS, workers=1)
        assert report.inputs == 24
        assert report.outcomes == {"gone": 1, "kept": 16, "no_connection": 4, "server_error": 3}
        before = {name: data for name, data in tree(out).items() if name.endswith(".tar")}
        asked = Counter(one.paths() + two.paths())

        # Nothing has changed: three are asked again and fail again.
        report = ingest([], out, URLS, retry_failed=True, workers=1)
        assert (report.kind, report.inputs) == ("retry", 7)
        assert report.outcomes == {"no_connection": 4, "server_error": 3}
        again = Counter(one.paths() + two.paths()) - asked
        assert set(again) == {"/0.jpg", "/1.jpg", "/2.jpg"}

        # All are well now.
        half |= {name: Page(body=images[name] + b"\0") for name in ("/0.jpg", "/1.jpg", "/2.jpg")}
        two.pages.update(half)
        count = len(one.seen), len(two.seen)
        with Web({name: Page(body=encoded(scene(50 + i))) for i, name in enumerate(images)}, port=closed_port) as three:
            report = ingest([], out, URLS, retry_failed=True, workers=1)
            assert report.outcomes == {"kept": 7}
            assert (len(one.seen) - count[0], len(two.seen) - count[1]) == (0, 3)
            assert sorted(three.paths()) == sorted(list(images)[:4])
            with pytest.raises(IngestError, match="nothing to retry"):
                ingest([], out, URLS, retry_failed=True, workers=1)
    assert outcomes(out) == {"kept": 23, "gone": 1}
    assert counted(out, 0).total() == 24
    assert [row["input"] for row in ledger(out, 1)] == [row["input"] for row in ledger(out, 2)]
    assert before.items() <= tree(out).items()
    assert verify(out / "train", deep=True) == []
    more = tmp_path / "more"
    scenes(more, 4, 900)
    ingest([more], out, URLS, append=True, workers=1)
    assert [row["input"] for row in ledger(out, 3)] == [24, 25, 26, 27], "numbers go on behind the first ones"


def test_failures_of_an_append_are_retried_with_its_own_inputs(tmp_path: Path, images: dict[str, bytes]) -> None:
    pages = {name: Page(body=data) for name, data in images.items()}
    with Web(pages) as web:
        for part in range(2):
            lines = [web.url(name) for name in list(images)[5 * part : 5 * part + 5]]
            (tmp_path / f"{part}.txt").write_text("\n".join(lines))
        failing = {"/1.jpg": Page(500), "/8.jpg": Page(500)}
        web.pages.update(failing)
        ingest([tmp_path / "0.txt"], tmp_path / "out", URLS, workers=1)
        ingest([tmp_path / "1.txt"], tmp_path / "out", URLS, append=True, workers=1)
        web.pages.update(pages)
        report = ingest([], tmp_path / "out", URLS, retry_failed=True, workers=1)
    assert report.outcomes == {"kept": 2}
    rows = ledger(tmp_path / "out", 2)
    assert [(row["input"], row["locator"].rpartition("/")[2]) for row in rows] == [(1, "1.jpg"), (8, "8.jpg")]
    assert set(stored(tmp_path / "out" / "train")) == {key(data) for data in images.values()}


def test_workers_share_the_turns_at_a_host(tmp_path: Path, images: dict[str, bytes]) -> None:
    """Two worker processes, three requests at a time: never more than that reach the server."""
    config = URLS.model_copy(update={"fetch": QUICK.model_copy(update={"per_host": 3})})
    with Web({name: Page(body=data) for name, data in images.items()}) as web:
        (tmp_path / "urls.txt").write_text("\n".join([web.url(name) for name in images] * 3))
        gate = web.gate = threading.Event()
        web.hold = 0.005

        def open_once_several_wait() -> None:
            until = time.monotonic() + 30  # the workers start in seconds, or in many
            while web.peak < 2 and time.monotonic() < until:
                time.sleep(0.02)
            time.sleep(0.3)  # for others to come, if they could
            gate.set()

        threading.Thread(target=open_once_several_wait, daemon=True).start()
        report = ingest([tmp_path / "urls.txt"], tmp_path / "out", config, workers=2)
    assert report.outcomes == {"kept": 10, "duplicate": 20}
    assert 1 < web.peak <= 3
