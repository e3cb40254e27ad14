"""Ingest: nothing is lost without a word, the same source gives the same bytes, and a failure leaves nothing behind."""

import fcntl
import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gristmill.shards import (
    IngestError,
    Labels,
    Manifest,
    ManifestError,
    SourceError,
    TarsError,
    check_image,
    ingest,
    verify,
)

Picture = Callable[..., bytes]


def key(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def stored(manifest: Manifest) -> dict[str, bytes]:
    """Every sample of a data set by key, cut out of the tars at the manifest's places."""
    found = {}
    for shard in range(len(manifest.urls)):
        rows, data = manifest.rows(shard), manifest.path(shard).read_bytes()
        places = zip(rows.keys, rows.offset, rows.length, strict=True)
        found |= {name: data[offset : offset + length] for name, offset, length in places}
    return found


def tree(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_every_image_goes_in_untouched_and_in_order(pictures: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    report = ingest(pictures, tmp_path / "out", shard_samples=7, progress=lambda *step: seen.append(step))
    assert (report.accepted, report.train, report.probe, report.duplicates, report.skipped) == (24, 24, 0, 0, [])
    assert report.reencoded == {}
    assert seen == [(i + 1, 24) for i in range(24)]

    manifest = Manifest.open(tmp_path / "out" / "train")
    assert manifest.counts.tolist() == [7, 7, 7, 3]
    assert manifest.urls == [f"{i:06d}.tar" for i in range(4)]
    sources = [path.read_bytes() for path in sorted(pictures.rglob("*.*"))]
    assert list(stored(manifest)) == [key(data) for data in sources]
    assert list(stored(manifest).values()) == sources
    assert report.bytes == sum(map(len, sources))
    assert report.summary() == f"24 images taken ({report.bytes / 1e6:.1f} MB): 24 to train, 0 to probe"
    assert json.loads(json.dumps(report.as_dict()))["accepted"] == 24
    for shard in range(4):
        rows = manifest.rows(shard)
        assert rows.deep
        for row, name in enumerate(rows.keys):
            image = check_image(stored(manifest)[name])
            assert (image.crc32, image.width, image.height, image.format) == (
                rows.crc32[row],
                rows.width[row],
                rows.height[row],
                rows.format[row],
            )
    labels = Labels.open(tmp_path / "out" / "train")
    assert labels is not None
    assert labels.names == ["coarse", "fine"]
    assert labels.classes("fine") == ["a/c0", "a/c2", "b/c1", "b/c3"]
    assert labels.codes(manifest.rows(0).keys, "coarse").tolist() == [0] * 7
    assert verify(tmp_path / "out" / "train", deep=True) == []


def test_the_webdataset_library_reads_the_shards(pictures: Path, tmp_path: Path) -> None:
    import webdataset

    ingest(pictures, tmp_path / "out", shard_samples=10)
    manifest = Manifest.open(tmp_path / "out" / "train")
    urls = [str(manifest.path(shard)) for shard in range(len(manifest.urls))]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False))
    expected = stored(manifest)
    assert [sample["__key__"] for sample in samples] == list(expected)
    formats = [name for shard in range(len(urls)) for name in manifest.rows(shard).format]
    for sample, name in zip(samples, formats, strict=True):
        assert sample[name] == expected[sample["__key__"]]


def test_dalis_own_reader_reads_the_shards(pictures: Path, tmp_path: Path) -> None:
    from nvidia.dali import fn
    from nvidia.dali.pipeline import pipeline_def

    ingest(pictures, tmp_path / "out", shard_samples=24)
    manifest = Manifest.open(tmp_path / "out" / "train")

    @pipeline_def(batch_size=24, num_threads=1, device_id=None, prefetch_queue_depth=1)  # pyright: ignore
    def graph():
        return fn.readers.webdataset(paths=[str(manifest.path(0))], ext=["jpg;png;webp"], dont_use_mmap=True)

    pipeline = graph()
    pipeline.build()
    (output,) = pipeline.run()
    assert [np.array(output.at(i)).tobytes() for i in range(24)] == list(stored(manifest).values())


def test_the_same_source_gives_the_same_bytes(pictures: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"  # another place, other times, other order of creation
    for path in sorted(pictures.rglob("*.*"), reverse=True):
        (again / path.relative_to(pictures)).parent.mkdir(parents=True, exist_ok=True)
        (again / path.relative_to(pictures)).write_bytes(path.read_bytes())
    os.utime(again / "a", (1, 1))
    ingest(pictures, tmp_path / "one", shard_samples=5, holdout=0.3, seed=4, threads=1)
    ingest(again, tmp_path / "two", shard_samples=5, holdout=0.3, seed=4, threads=5)
    assert tree(tmp_path / "one") == tree(tmp_path / "two")


def test_doubles_and_broken_files_are_counted_and_listed(pictures: Path, picture: Picture, tmp_path: Path) -> None:
    first = sorted(pictures.rglob("*.jpg"))[0]
    shutil.copy(first, pictures / "zz.jpg")
    shutil.copy(first, pictures / "a" / "copy.JPEG")
    broken = picture(seed=77)[:-40]
    (pictures / "b" / "cut.jpg").write_bytes(broken)
    (pictures / "b" / "cut-again.jpg").write_bytes(broken)
    (pictures / "b" / "page.png").write_bytes(b"<html>")
    (pictures / "b" / "tab\there.png").write_bytes(b"")
    (pictures / "gone.webp").symlink_to("nowhere")
    (pictures / "really-a-png.jpg").write_bytes(picture("PNG", seed=50))
    report = ingest(pictures, tmp_path / "out")
    assert (report.accepted, report.duplicates) == (25, 2)
    reasons = {str(path): reason for path, reason in report.skipped}
    assert list(reasons) == ["b/cut-again.jpg", "b/cut.jpg", "b/page.png", "b/tab\there.png", "gone.webp"]
    assert reasons["b/page.png"] == "neither JPEG nor PNG nor WebP"
    assert reasons["b/tab\there.png"] == "empty file"
    assert reasons["gone.webp"] == "cannot be read: No such file or directory"
    assert "2 exact duplicates left out\n5 files skipped, listed in skipped.tsv; the first: b/cut-a" in report.summary()
    assert report.as_dict()["skipped"][2] == ["b/page.png", "neither JPEG nor PNG nor WebP"]
    lines = (tmp_path / "out" / "skipped.tsv").read_text().splitlines()
    assert lines[0] == "path\treason"
    assert [line.split("\t")[0] for line in lines[1:]] == [name.replace("\t", "\\t") for name in reasons]
    assert "png" in Manifest.open(tmp_path / "out" / "train").rows(0).format[-2:]


def test_what_dali_misreads_is_encoded_anew_and_counted(pictures: Path, picture: Picture, tmp_path: Path) -> None:
    cmyk, cut = picture(mode="CMYK", seed=90), picture("PNG", seed=91)[:-12]
    (pictures / "ink.jpg").write_bytes(cmyk)
    (pictures / "ink2.jpg").write_bytes(picture(mode="CMYK", seed=92))
    (pictures / "open.png").write_bytes(cut)
    report = ingest(pictures, tmp_path / "out")
    assert report.accepted == 27
    assert report.reencoded == {"CMYK": 2, "PNG without its end": 1}
    assert "\n2 of them re-encoded: CMYK\n1 of them re-encoded: PNG without its end" in report.summary()
    found = stored(Manifest.open(tmp_path / "out" / "train"))
    assert check_image(found[key(cmyk)]).reencoded is None  # the key names the source, the bytes are new
    assert check_image(found[key(cut)]).reencoded is None
    assert verify(tmp_path / "out" / "train", deep=True) == []


def test_the_holdout_depends_on_content_and_seed_alone(pictures: Path, tmp_path: Path) -> None:
    report = ingest(pictures, tmp_path / "whole", holdout=0.4)
    assert report.train + report.probe == report.accepted == 24
    train = set(stored(Manifest.open(tmp_path / "whole" / "train")))
    probe = set(stored(Manifest.open(tmp_path / "whole" / "probe")))
    assert not train & probe
    assert 4 <= len(probe) <= 16
    labels = Labels.open(tmp_path / "whole" / "probe")
    assert labels is not None
    assert (labels.codes(sorted(probe | train), "fine") >= 0).all()

    ingest(pictures / "a", tmp_path / "part", holdout=0.4)
    assert set(stored(Manifest.open(tmp_path / "part" / "probe"))) < probe
    ingest(pictures, tmp_path / "seed", holdout=0.4, seed=-3)
    assert set(stored(Manifest.open(tmp_path / "seed" / "probe"))) != probe


def test_a_percent_sign_in_the_folders_name(pictures: Path, tmp_path: Path) -> None:
    ingest(pictures, tmp_path / "100% %06d" / "out")
    assert Manifest.open(tmp_path / "100% %06d" / "out" / "train").samples == 24


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shard_samples": 0}, "at least 1"),
        ({"holdout": 1.0}, "share from 0"),
        ({"holdout": -0.1}, "share from 0"),
        ({"holdout": 1e-12}, "leaves no image to probe"),
    ],
)
def test_impossible_wishes_leave_nothing(pictures: Path, tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(IngestError, match=message):
        ingest(pictures, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_sources_without_a_usable_image(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="is no folder"):
        ingest(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "1.jpg").write_bytes(b"no")
    with pytest.raises(IngestError, match=r"none of the 1 images .* 1\.jpg: neither JPEG"):
        ingest(tmp_path / "x", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_output_in_use_is_not_touched(pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "train").mkdir(parents=True)
    (out / "train" / "thesis.tex").write_text("dear")
    with pytest.raises(TarsError, match=r"thesis\.tex is none of Gristmill's files"):
        ingest(pictures, out)
    assert [path.name for path in out.rglob("*")] == ["train", "thesis.tex"]
    shutil.rmtree(out)

    ingest(pictures, out)
    before = tree(out)
    with pytest.raises(IngestError, match="holds a data set already"):
        ingest(pictures / "a", out)
    assert tree(out) == before
    shutil.rmtree(out / "train")

    handle = os.open(out, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(IngestError, match="another ingest"):
        ingest(pictures, out)
    os.close(handle)
    ingest(pictures, out)
    assert tree(out) == before


def test_a_break_takes_everything_back(pictures: Path, tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        if done == 15:
            raise KeyboardInterrupt

    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(KeyboardInterrupt):
        ingest(pictures, tmp_path / "out", shard_samples=4, holdout=0.5, progress=stop)
    assert tree(tmp_path / "out") == {"notes.txt": b"mine"}


def noise(root: Path, count: int, size: int) -> None:
    """JPEGs of noise, which fill a disk fast: about 3 bytes for each of size x size pixels."""
    from PIL import Image

    root.mkdir()
    raw = np.random.Philox(key=5)
    for number in range(count):
        pixels = raw.random_raw(size * size).view(np.uint8)[: size * size * 3].reshape(size, size, 3)
        Image.fromarray(pixels).save(root / f"{number:03d}.jpg", quality=98, subsampling=0)


@pytest.mark.parametrize("shard_samples", [3, 100])
def test_a_full_disk_is_said_and_leaves_nothing(small_disk: Path, tmp_path: Path, shard_samples: int) -> None:
    noise(tmp_path / "noise", 24, 128)
    free = shutil.disk_usage(small_disk).free
    with pytest.raises(IngestError, match=rf"no space in {small_disk}.* needs about [\d,]+ bytes and [\d,]+ are free"):
        ingest(tmp_path / "noise", small_disk / "out", shard_samples=shard_samples, holdout=0.2)
    assert list(small_disk.iterdir()) == []
    assert shutil.disk_usage(small_disk).free == free
    shutil.rmtree(tmp_path / "noise")
    noise(tmp_path / "noise", 6, 96)
    assert ingest(tmp_path / "noise", small_disk / "out").accepted == 6  # there is room for these


def test_a_disk_that_fills_at_any_moment(small_disk: Path, tmp_path: Path, picture: Picture) -> None:
    """From "no room for anything" to "room for all": each time either a whole data set or nothing."""
    (tmp_path / "source").mkdir()
    for number in range(6):
        (tmp_path / "source" / f"{number}.png").write_bytes(picture("PNG", 300, 300, number))

    def attempt() -> str:
        try:
            ingest(tmp_path / "source", small_disk / "out", shard_samples=2, holdout=0.3, seed=1)
        except IngestError as error:
            return str(error)
        return ""

    outcomes = []
    for ballast in range(1_040_000, 900_000, -8192):
        (small_disk / "ballast").write_bytes(bytes(ballast))
        failure = attempt()
        outcomes.append(not failure)
        if failure:
            assert "no space" in failure
            assert [path.name for path in small_disk.iterdir()] == ["ballast"]
        else:
            assert verify(small_disk / "out" / "train", deep=True) == []
            assert verify(small_disk / "out" / "probe", deep=True) == []
            shutil.rmtree(small_disk / "out")
    assert outcomes == sorted(outcomes)
    assert not outcomes[0]
    assert outcomes[-1]


def test_a_limit_on_file_sizes_is_said_too(tmp_path: Path) -> None:
    noise(tmp_path / "noise", 8, 128)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, hard))  # Python ignores SIGXFSZ, so that writing fails
    try:
        with pytest.raises(IngestError, match=r"no space in .* \(File too large\)"):
            ingest(tmp_path / "noise", tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (tmp_path / "out").exists()


KILLED = """
import os, signal, sys, time
import webdataset
from gristmill.shards import ingest

def child(out):
    pid = os.fork()
    if pid == 0:
        ingest(sys.argv[1], out, shard_samples=4, holdout=0.3)
        os._exit(0)
    return pid

start = time.monotonic()
os.waitpid(child(sys.argv[2] + "/warm"), 0)
whole = time.monotonic() - start
for step in range(12):
    pid = child(f"{sys.argv[2]}/{step:02d}")
    time.sleep(whole * step / 10)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
"""


def test_killed_at_any_moment_then_again(pictures: Path, tmp_path: Path) -> None:
    sound = tmp_path / "sound"
    ingest(pictures, sound, shard_samples=4, holdout=0.3)
    expected = tree(sound)
    (tmp_path / "killed").mkdir()
    subprocess.run([sys.executable, "-c", KILLED, str(pictures), str(tmp_path / "killed")], check=True, timeout=120)
    assert tree(tmp_path / "killed" / "warm") == expected
    for step in range(12):
        out = tmp_path / "killed" / f"{step:02d}"
        # What has a file's final name is that file, whole.
        found = {name: data for name, data in tree(out).items() if ".partial" not in name}
        assert found.items() <= expected.items()
        if not (out / "train" / "dataset.json").exists():
            with pytest.raises(ManifestError):
                Manifest.open(out / "train")
            ingest(pictures, out, shard_samples=4, holdout=0.3)
        assert tree(out) == expected
