"""A whole ingest of folders: nothing is lost without a word, and the same source gives the same bytes."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from gristmill.shards import GristmillError, Labels, Manifest, check_image, verify
from gristmill.shards.ingest import IngestConfig, IngestError, IngestReport, ingest, ingest_folder, outcomes
from pydantic import ValidationError

from .sets import SMALL, counted, encoded, key, ledger, scene, scenes, stored, tree

Picture = Callable[..., bytes]


def test_every_image_goes_in_untouched_and_in_order(pictures: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    report = ingest_folder(pictures, tmp_path / "out", shard_samples=7, progress=lambda *step: seen.append(step))
    assert (report.accepted, report.train, report.probe, report.shards) == (24, 24, 0, 4)
    assert (report.inputs, report.outcomes, report.changed, report.details) == (24, {"kept": 24}, {}, {})
    assert seen[-1] == (24, 24)

    train = tmp_path / "out" / "train"
    manifest = Manifest.open(train)
    assert manifest.counts.tolist() == [7, 7, 7, 3]
    assert manifest.urls == [f"{i:06d}.tar" for i in range(4)]
    paths = sorted(pictures.rglob("*.*"))
    sources = [path.read_bytes() for path in paths]
    assert list(stored(train)) == [key(data) for data in sources]
    assert list(stored(train).values()) == sources
    assert report.bytes == manifest.bytes == sum(path.stat().st_size for path in train.glob("*.tar"))
    assert report.summary() == f"24 images taken ({report.bytes / 1e6:.1f} MB): 24 to train, 0 to probe"
    assert json.loads(json.dumps(report.as_dict()))["train"] == 24
    for shard in range(4):
        rows = manifest.rows(shard)
        assert rows.deep
        for row, name in enumerate(rows.keys):
            image = check_image(stored(train)[name])
            found = (rows.crc32[row], rows.width[row], rows.height[row], rows.format[row])
            assert (image.crc32, image.width, image.height, image.format) == found
    labels = Labels.open(train)
    assert labels is not None
    assert labels.names == ["coarse", "fine"]
    assert labels.classes("fine") == ["a/c0", "a/c2", "b/c1", "b/c3"]
    assert labels.codes(manifest.rows(0).keys, "coarse").tolist() == [0] * 7
    assert verify(train, deep=True) == []

    rows = ledger(tmp_path / "out")
    assert [row["input"] for row in rows] == list(range(24))
    assert [row["locator"] for row in rows] == [str(path) for path in paths]
    assert [row["key"] for row in rows] == [key(data) for data in sources]
    assert [row["shard"] for row in rows] == [f"train/{i // 7:06d}.tar" for i in range(24)]
    assert [row["bytes"] for row in rows] == [row["received"] for row in rows] == [len(data) for data in sources]
    assert (tmp_path / "out" / ".ingest").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("workers", [1, 3])
def test_the_same_source_gives_the_same_bytes(pictures: Path, tmp_path: Path, workers: int) -> None:
    """Another place, other times, another order of creation, another number of workers: the ledger's paths apart."""
    again = tmp_path / "again"
    for path in sorted(pictures.rglob("*.*"), reverse=True):
        (again / path.relative_to(pictures)).parent.mkdir(parents=True, exist_ok=True)
        (again / path.relative_to(pictures)).write_bytes(path.read_bytes())
    os.utime(again / "a", (1, 1))
    config = SMALL.model_copy(update={"holdout": 0.3, "seed": 4, "shard_bytes": 4000})
    ingest([pictures], tmp_path / "one", config, workers=1)
    pictures.rename(tmp_path / "moved")
    again.rename(pictures)
    ingest([pictures], tmp_path / "two", config, workers=workers)
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    assert len(tree(tmp_path / "one")) > 12


def test_the_size_of_units_decides_on_no_sample(pictures: Path, tmp_path: Path) -> None:
    for unit in (1, 5, 1000):
        ingest([pictures], tmp_path / str(unit), SMALL.model_copy(update={"unit": unit, "near": 4}), workers=1)
    trees = [{k: v for k, v in tree(tmp_path / str(n)).items() if k[:6] == "train/"} for n in (1, 5, 1000)]
    assert trees[0] == trees[1] == trees[2]
    assert ledger(tmp_path / "1") == ledger(tmp_path / "1000")


def test_doubles_and_broken_files_are_counted_and_in_the_ledger(
    pictures: Path, picture: Picture, tmp_path: Path
) -> None:
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
    report = ingest([pictures], tmp_path / "out", SMALL, workers=1)
    rows = {Path(row["locator"]).relative_to(pictures).as_posix(): row for row in ledger(tmp_path / "out")}
    assert {name: row["outcome"] for name, row in rows.items() if row["outcome"] != "kept"} == {
        "a/copy.JPEG": "duplicate",
        "zz.jpg": "duplicate",
        "b/cut.jpg": "broken",
        "b/cut-again.jpg": "broken",
        "b/page.png": "not_an_image",
        "b/tab\there.png": "not_an_image",
        "gone.webp": "unreadable",
    }
    assert rows["zz.jpg"]["duplicate_of"] == key(first.read_bytes())
    assert rows["gone.webp"]["detail"] == "No such file or directory"
    assert report.outcomes == {"kept": 25, "duplicate": 2, "broken": 2, "not_an_image": 2, "unreadable": 1}
    assert sum(report.outcomes.values()) == report.inputs == 32
    assert outcomes(tmp_path / "out") == report.outcomes == counted(tmp_path / "out")
    assert "2 left out: duplicate" in report.summary()
    assert rows["really-a-png.jpg"]["format"] == "png"
    assert stored(tmp_path / "out" / "train")[rows["really-a-png.jpg"]["key"]] == picture("PNG", seed=50)


def test_what_dali_misreads_is_encoded_anew_and_counted(pictures: Path, picture: Picture, tmp_path: Path) -> None:
    cmyk, cut = picture(mode="CMYK", seed=90), picture("PNG", seed=91)[:-12]
    (pictures / "ink.jpg").write_bytes(cmyk)
    (pictures / "ink2.jpg").write_bytes(picture(mode="CMYK", seed=92))
    (pictures / "open.png").write_bytes(cut)
    report = ingest([pictures], tmp_path / "out", SMALL, workers=1)
    assert report.accepted == 27
    assert sum(report.changed.values()) == 3
    assert [count for reason, count in report.changed.items() if "CMYK" in reason] == [2]
    found = stored(tmp_path / "out" / "train")
    assert check_image(found[key(cmyk)]).reencoded is None  # the key names the source, the bytes are new
    assert check_image(found[key(cut)]).reencoded is None
    assert verify(tmp_path / "out" / "train", deep=True) == []


def test_the_holdout_depends_on_content_and_seed_alone(pictures: Path, tmp_path: Path) -> None:
    report = ingest_folder(pictures, tmp_path / "whole", holdout=0.4)
    assert report.train + report.probe == report.accepted == 24
    train = set(stored(tmp_path / "whole" / "train"))
    probe = set(stored(tmp_path / "whole" / "probe"))
    assert not train & probe
    assert 4 <= len(probe) <= 16
    assert all((row["shard"][:5] == "probe") == (row["key"] in probe) for row in ledger(tmp_path / "whole"))
    labels = Labels.open(tmp_path / "whole" / "probe")
    assert labels is not None
    assert (labels.codes(sorted(probe | train), "fine") >= 0).all()

    ingest_folder(pictures / "a", tmp_path / "part", holdout=0.4)
    assert set(stored(tmp_path / "part" / "probe")) < probe
    ingest_folder(pictures, tmp_path / "seed", holdout=0.4, seed=-3)
    assert set(stored(tmp_path / "seed" / "probe")) != probe


def test_shards_are_closed_by_bytes_too(tmp_path: Path) -> None:
    sources = scenes(tmp_path / "in", 12)
    ingest([tmp_path / "in"], tmp_path / "out", IngestConfig(shard_bytes=6000, unit=5), workers=1)
    manifest = Manifest.open(tmp_path / "out" / "train")
    assert len(manifest.urls) > 2
    assert list(stored(tmp_path / "out" / "train").values()) == sources
    largest = max(map(len, sources)) + 1024
    sizes = [path.stat().st_size for path in sorted((tmp_path / "out" / "train").glob("*.tar"))]
    assert all(size < 6000 + largest + 10240 for size in sizes)


def test_a_percent_sign_in_the_folders_name(pictures: Path, tmp_path: Path) -> None:
    ingest_folder(pictures, tmp_path / "100% %06d" / "out")
    assert Manifest.open(tmp_path / "100% %06d" / "out" / "train").samples == 24


@pytest.mark.parametrize(
    "settings",
    [{"shard_samples": 0}, {"holdout": 1.0}, {"holdout": -0.1}, {"near": 32}, {"filter": "x"}, {"unit": 0}, {"x": 1}],
)
def test_impossible_settings_are_refused_by_name(settings: dict) -> None:
    with pytest.raises(ValidationError, match=next(iter(settings))):
        IngestConfig(**settings)


@pytest.mark.parametrize(
    ("sources", "how", "message"),
    [
        ([], {}, "name at least one source"),
        (["{pictures}"], {"append": True}, "holds no data set"),
        ([], {"retry_failed": True}, "holds no data set"),
        (["{pictures}"], {"retry_failed": True}, "takes no sources"),
        (["{tmp}/nowhere"], {}, "nowhere"),
        (["{pictures}", "{tmp}/nowhere"], {}, "nowhere"),
        (["{tmp}/texts"], {}, "no image, tar, table or list"),
        (["ftp://example.org/x"], {}, "ftp"),
    ],
)
def test_impossible_wishes_leave_nothing(
    pictures: Path, tmp_path: Path, sources: list[str], how: dict, message: str
) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "x.md").write_text("hello")
    named = [source.format(pictures=pictures, tmp=tmp_path) for source in sources]
    with pytest.raises(GristmillError, match=message):
        ingest(named, tmp_path / "out", SMALL, workers=1, **how)
    assert not (tmp_path / "out").exists()


def test_a_source_without_a_usable_image(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "1.jpg").write_bytes(b"no")
    for _ in range(2):
        with pytest.raises(IngestError, match=r"none of the 1 inputs goes to train \(1 not_an_image.*--restart"):
            ingest([tmp_path / "x"], tmp_path / "out", SMALL, workers=1)
        assert tree(tmp_path / "out") == {}
    (tmp_path / "x" / "1.jpg").write_bytes(encoded(scene(1)))
    report: IngestReport = ingest([tmp_path / "x"], tmp_path / "out", SMALL, workers=1, restart=True)
    assert report.accepted == 1


def test_an_output_in_use_is_not_touched(pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "train").mkdir(parents=True)
    (out / "train" / "thesis.tex").write_text("dear")
    with pytest.raises(IngestError, match=r"train is there already"):
        ingest_folder(pictures, out)
    assert [path.name for path in out.rglob("*")] == ["train", "thesis.tex"]
    shutil.rmtree(out)

    ingest_folder(pictures, out)
    before = tree(out)
    for _ in range(2):
        with pytest.raises(IngestError, match="holds a data set already: add to it with --append"):
            ingest_folder(pictures / "a", out)
        assert tree(out) == before
