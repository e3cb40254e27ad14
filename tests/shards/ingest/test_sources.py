"""Inputs are listed once, in one order, and frozen: whatever happens to the folder, the process or the disk meanwhile."""

from __future__ import annotations

import json
import os
import resource
import signal
import stat
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from gristmill.shards.ingest.candidate import Candidate, Outcome
from gristmill.shards.ingest.errors import IngestError
from gristmill.shards.ingest.folders import read_files
from gristmill.shards.ingest.plan import Plan
from gristmill.shards.ingest.sources import plan, read_unit
from hypothesis import given, settings
from hypothesis import strategies as st

from ..tars import tar


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())


def read(found: Plan, work: Path) -> list[Candidate]:
    """All candidates; on the way, that units hold what they say, and numbers have no gap."""
    candidates: list[Candidate] = []
    for number in range(len(found)):
        unit = found.unit(number)
        assert (unit.number, unit.first) == (number, len(candidates))
        candidates += read_unit(unit, work)
        assert len(candidates) == unit.first + unit.count
    assert [one.number for one in candidates] == list(range(found.inputs))
    return candidates


def test_a_folder_in_the_order_of_its_paths_with_its_classes(tmp_path: Path) -> None:
    source, work = tmp_path / "source", tmp_path / "work"
    touch(source, "b.JPG", "a/2.png", "a/10.jpeg", "a-b/1.WebP", "a/x.gif", "notes.txt", "a/jpg", ".hidden/h.jpg")
    found = plan([str(source)], work, unit=2)
    candidates = read(found, work)
    assert [one.data for one in candidates] == [
        b".hidden/h.jpg", b"a/10.jpeg", b"a/2.png", b"a/x.gif", b"a-b/1.WebP", b"b.JPG",
    ]  # fmt: skip
    assert [one.labels for one in candidates] == [(".hidden",), ("a",), ("a",), ("a",), ("a-b",), ()]
    assert candidates[1].locator == str(source / "a" / "10.jpeg")
    assert found.passed == {"files of other kinds": 1, "text files in folders": 1}


NAMES = st.sampled_from(["a", "b", "a-b", "ab", "a.jpg", "B.JPG", "é.png", "1.webp", "x.txt"])


def by_sorting(root: Path) -> list[str]:
    """All images below a folder, each real folder once and by its own path, then sorted: the walk's plain form."""
    found: list[Path] = []
    seen: set[tuple[int, int]] = set()
    folders, links = [root], []
    while folders or links:
        if not folders:  # real folders first, then what links lead to
            links.sort(key=lambda path: str(path.relative_to(root)), reverse=True)
            folders.append(links.pop())
        folder = folders.pop()
        status = folder.stat()
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        for path in folder.iterdir():
            if path.is_dir():
                (links if path.is_symlink() else folders).append(path)
            elif path.suffix.lower() in (".jpg", ".webp", ".png"):
                found.append(path)
    return [str(path) for path in sorted(found, key=lambda path: path.relative_to(root).parts)]


@settings(max_examples=30)
@given(
    files=st.lists(st.lists(NAMES, min_size=1, max_size=4), max_size=8),
    links=st.lists(st.tuples(st.lists(NAMES, min_size=1, max_size=3), st.lists(NAMES, max_size=2)), max_size=3),
)
def test_a_walk_finds_what_a_sort_of_everything_finds(files: list[list[str]], links: list[tuple[list[str], list[str]]]):
    with tempfile.TemporaryDirectory() as folder:
        root, work = Path(folder) / "source", Path(folder) / "work"
        touch(root, "0.jpg")
        for parts in files:
            place = root.joinpath(*parts)
            if not place.exists() and not any(parent.is_file() for parent in place.parents):
                touch(root, "/".join(parts))
        for parts, target in links:
            place = root.joinpath(*parts)
            if place.parent.is_dir() and not os.path.lexists(place):
                place.symlink_to(root.joinpath(*target), target_is_directory=True)
        assert [one.locator for one in read(plan([root], work, unit=3), work)] == by_sorting(root)


def test_links_are_followed_once_and_loops_end(tmp_path: Path) -> None:
    source, work = tmp_path / "source", tmp_path / "work"
    touch(tmp_path, "source/real/1.jpg", "source/real/deep/2.jpg", "outside/3.jpg", "source/album.jpg/4.png")
    (source / "alias").symlink_to("real")  # sorts before the real folder, whose own path is kept all the same
    (source / "real" / "loop").symlink_to(source)
    (source / "real" / "self").symlink_to(".")
    (source / "away").symlink_to(tmp_path / "outside")
    (source / "away2").symlink_to(tmp_path / "outside")
    (source / "broken").symlink_to("nowhere")
    locators = [one.locator for one in read(plan([str(source)], work), work)]
    assert [os.path.relpath(one, source) for one in locators] == [
        "album.jpg/4.png", "away/3.jpg", "real/1.jpg", "real/deep/2.jpg",
    ]  # fmt: skip


def test_a_mixed_folder_in_the_order_of_its_names(tmp_path: Path) -> None:
    source, work = tmp_path / "source", tmp_path / "work"
    touch(source, "a.jpg", "c.jpg", "d/e.jpg")
    tar(source / "b.tar", [("x.jpg", b"x"), ("y.png", b"y")])
    (source / "bad.tar").write_bytes(b"no tar, but long enough to have a header" * 20)
    (source / "old.tar.gz").write_bytes(b"\x1f\x8b")
    tar(source / "d" / "texts.tar", [("x.txt", b"x")])
    found = plan([str(source)], work)
    candidates = read(found, work)
    assert [one.data for one in candidates] == [b"a.jpg", b"x", b"y", None, b"c.jpg", b"d/e.jpg", None]
    assert candidates[1].locator == f"{source}/b.tar::x.jpg"
    bad, old = candidates[3], candidates[6]
    assert bad.locator.startswith(f"{source}/bad.tar")
    assert bad.problem is not None
    assert bad.problem[0] is Outcome.UNREADABLE
    assert old.problem == (
        Outcome.UNREADABLE,
        "a compressed tar: unpack it, for members in the middle of it cannot be reached",
    )
    assert found.passed == {"tars without an image": 1, "members of tars that are no image": 1}


def test_sources_in_the_order_given_and_single_files(tmp_path: Path) -> None:
    touch(tmp_path, "b/1.jpg", "a/1.jpg", "one.png")
    work = tmp_path / "work"
    found = plan([str(tmp_path / "b"), str(tmp_path / "one.png"), f"file://{tmp_path}/a"], work)
    assert [one.data for one in read(found, work)] == [b"b/1.jpg", b"one.png", b"a/1.jpg"]


def test_frozen_inputs_do_not_grow(tmp_path: Path) -> None:
    source, work = tmp_path / "source", tmp_path / "work"
    touch(source, "a.jpg", "c.jpg")
    first = plan([str(source)], work)
    touch(source, "b.jpg")
    again = plan([str(source)], work)
    assert again.digest == first.digest
    assert [one.data for one in read(again, work)] == [b"a.jpg", b"c.jpg"]
    assert plan([str(source)], tmp_path / "fresh").digest != first.digest


def test_the_same_inputs_give_the_same_plan(tmp_path: Path) -> None:
    touch(tmp_path / "source", *(f"{number}.jpg" for number in range(20)))
    plans = [plan([tmp_path / "source"], tmp_path / name, unit=7) for name in ("one", "two")]
    assert plans[0].digest == plans[1].digest
    assert [plans[0].unit(number) for number in range(3)] == [plans[1].unit(number) for number in range(3)]
    with pytest.raises(IndexError, match="no unit 3 in a plan of 3"):
        plans[0].unit(3)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"sources": ["b"]}, r"a is not asked for now; .*b is new"),
        ({"sources": ["a", "a"]}, "another number of times"),
        ({"unit": 5}, "unit 1000 and not 5"),
        ({"keep": ["x"]}, r"keep \[\] and not \['x'\]"),
        ({"url": "link"}, "url None and not 'link'"),
    ],
)
def test_a_folder_of_another_plan_is_refused(tmp_path: Path, change: dict[str, list[str]], said: str) -> None:
    touch(tmp_path, "a/1.jpg", "b/1.jpg")
    asked: dict[str, object] = {"sources": ["a"], **change}
    names = [str(tmp_path / name) for name in asked.pop("sources")]  # type: ignore[attr-defined]
    plan([str(tmp_path / "a")], tmp_path / "work")
    before = sorted((path.name, path.read_bytes()) for path in (tmp_path / "work").iterdir())
    with pytest.raises(IngestError, match=said):
        plan(names, tmp_path / "work", **asked)  # type: ignore[arg-type]
    assert sorted((path.name, path.read_bytes()) for path in (tmp_path / "work").iterdir()) == before


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("pipe:cat /etc/passwd", r"'pipe:\.\.\.' is no source"),
        ("ftp://host/a.tar", r"'ftp:\.\.\.'"),
        ("http:host", r"'http:\.\.\.'"),
        ("file://elsewhere/a.tar", "no file of this machine"),
        ("nowhere", "is not there"),
        ("empty", "no image, tar, table or list in"),
        ("notes.doc", "no source that is known"),
        ("packed.tar.gz", "unpack it"),
        ("gzip.tar", "compressed with gzip"),
        ("texts.tar", "no image, tar, table or list in"),
        ("gs://", "no url of a bucket"),
        ("gs://bucket/x?secret=canary", "option 'secret' that is not known"),
        ("s3://key:canary@bucket/x.tar", "came with keys in it"),
    ],
)
def test_what_is_no_source_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    touch(tmp_path, "notes.doc", "packed.tar.gz")
    (tmp_path / "gzip.tar").write_bytes(b"\x1f\x8b\x08" + bytes(600))
    tar(tmp_path / "texts.tar", [("x.txt", b"x")])
    with pytest.raises(IngestError, match=said) as caught:
        plan([source], tmp_path / "work")
    assert "canary" not in str(caught.value)
    assert "passwd" not in str(caught.value)
    assert not (tmp_path / "work").exists()


def test_files_that_cannot_be_read_are_told_one_by_one(tmp_path: Path) -> None:
    source, work = tmp_path / "source", tmp_path / "work"
    touch(source, "a.jpg", "gone.jpg", "z.jpg")
    os.mkfifo(source / "pipe.jpg")
    (source / "broken.jpg").symlink_to("nowhere")
    (source / "circle.jpg").symlink_to("circle.jpg")
    with (source / "huge.jpg").open("wb") as file:
        file.truncate(300 << 20)
    found = plan([str(source)], work)
    (source / "gone.jpg").unlink()
    by_name = {Path(one.locator).name: one for one in read(found, work)}
    assert by_name["a.jpg"].data == b"a.jpg"
    assert by_name["z.jpg"].data == b"z.jpg"
    assert by_name["gone.jpg"].problem == (Outcome.UNREADABLE, "No such file or directory")
    assert by_name["broken.jpg"].problem == (Outcome.UNREADABLE, "No such file or directory")
    assert by_name["circle.jpg"].problem == (Outcome.UNREADABLE, "Too many levels of symbolic links")
    assert by_name["pipe.jpg"].problem == (Outcome.UNREADABLE, "no plain file")
    assert by_name["huge.jpg"].problem == (Outcome.TOO_LARGE, f"{300 << 20} bytes, more than 256 MiB")


def test_a_machine_without_descriptors_is_no_fault_of_a_file(tmp_path: Path) -> None:
    touch(tmp_path / "source", "a.jpg")
    found = plan([tmp_path / "source"], tmp_path / "work")
    candidates = read_unit(found.unit(0), tmp_path / "work")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    held, said = [], ""
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 256), hard))
        for _ in range(20):  # what an earlier test left open may be closed just now, and make room
            with suppress(OSError):
                while True:
                    held.append(os.open(tmp_path, os.O_RDONLY))
            try:
                list(read_files(str(tmp_path / "source"), ["a.jpg"]))
            except OSError as error:
                said = str(error)
                break
        assert "Too many open files" in said
    finally:
        for handle in held:
            os.close(handle)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert [one.data for one in candidates] == [b"a.jpg"]


def test_names_that_are_no_text(tmp_path: Path) -> None:
    source, work = tmp_path / "source", tmp_path / "work"
    source.mkdir()
    place = os.path.join(os.fsencode(source), b"\xff\xfe.jpg")
    with open(place, "wb") as file:
        file.write(b"bytes")
    tar(Path(os.fsdecode(place + b".tar")), [("x.jpg", b"x")])
    candidates = read(plan([source], work), work)
    assert [one.data for one in candidates] == [b"bytes", b"x"]
    assert [one.locator.removeprefix(str(source)) for one in candidates] == [
        "/\\xff\\xfe.jpg",
        "/\\xff\\xfe.jpg.tar::x.jpg",
    ]


def test_the_inputs_are_for_their_owner_alone(tmp_path: Path) -> None:
    touch(tmp_path / "source", "a.jpg")
    tar(tmp_path / "source" / "b.tar", [("x.jpg", b"x")])
    plan([tmp_path / "source"], tmp_path / "work")
    assert stat.S_IMODE((tmp_path / "work").stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "work").iterdir()} == {0o600}


def test_more_units_than_a_file_of_frozen_rows_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gristmill.shards.ingest.frozen._GROUPS", 5)
    monkeypatch.setattr("gristmill.shards.ingest.frozen._UNIT_ROWS", 4)
    (tmp_path / "urls.txt").write_text("".join(f"http://host/{number}.jpg\n" for number in range(25)))
    work = tmp_path / "work"
    found = plan([tmp_path / "urls.txt"], work, unit=2)
    assert len(found) == 13
    assert [one.url for one in read(found, work)] == [f"http://host/{number}.jpg" for number in range(25)]
    assert len(list(work.glob("urls-*.parquet"))) == 3


def hang_after(renamings: int) -> None:
    """So many files get their names in this process; before the next one it waits, for a kill that may come late."""
    replace, renamed = os.replace, []

    def counted(*names: Any) -> None:
        if len(renamed) == renamings:
            time.sleep(600)
        renamed.append(replace(*names))

    os.replace = counted


def test_killed_at_any_moment_it_begins_again(tmp_path: Path) -> None:
    (tmp_path / "urls.txt").write_text("".join(f"http://host/{number}.jpg\n" for number in range(40_000)))
    expected = plan([tmp_path / "urls.txt"], tmp_path / "whole", unit=50)
    work = tmp_path / "work"
    for whole in (0, 1):  # files that are done, beside the one that is being written, when it is killed
        child = os.fork()
        if not child:
            hang_after(whole)
            plan([tmp_path / "urls.txt"], work, unit=50)
            os._exit(0)
        while len(list(work.glob("urls-*.parquet"))) < whole or not list(work.glob("urls-*.partial")):
            time.sleep(0.001)
        os.kill(child, signal.SIGKILL)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
        assert not (work / "plan.json").exists()
        with pytest.raises(IngestError, match="holds no plan"):
            Plan.open(work)
    assert list(work.glob("*.partial"))
    found = plan([tmp_path / "urls.txt"], work, unit=50)
    assert (found.digest, found.inputs) == (expected.digest, 40_000)
    assert not list(work.glob("*.partial"))


def test_a_full_disk_leaves_nothing(tmp_path: Path, small_disk: Path) -> None:
    lines = (f"http://host/{os.urandom(30).hex()}.jpg\n" for _ in range(60_000))  # what no compression makes small
    (tmp_path / "urls.txt").write_text("".join(lines))
    with pytest.raises(IngestError, match=r"No space left on device.*nothing half-written"):
        plan([tmp_path / "urls.txt"], small_disk / "work")
    assert not (small_disk / "work").exists()


def test_damaged_frozen_inputs_are_told(tmp_path: Path) -> None:
    touch(tmp_path / "source", "a.jpg", "b.jpg")
    work = tmp_path / "work"
    found = plan([tmp_path / "source"], work)
    (work / "files-00000.parquet").write_bytes(b"PAR1 no more PAR1")
    with pytest.raises(IngestError, match="has lost its inputs"):
        list(read_unit(found.unit(0), work))
    (work / "units.parquet").write_bytes(b"")
    with pytest.raises(IngestError, match="cannot be read"):
        Plan.open(work)
    about = json.loads((work / "plan.json").read_text())
    (work / "plan.json").write_text(json.dumps({**about, "version": 99}))
    with pytest.raises(IngestError, match="another version"):
        Plan.open(work)
