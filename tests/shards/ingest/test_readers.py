"""Others read what an ingest wrote, and an ingest takes in what others wrote: equal bytes both ways."""

import importlib.util
import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from gristmill.shards import Manifest, verify
from gristmill.shards.foreign import index_dataset
from gristmill.shards.ingest import IngestConfig, RefineConfig, ingest

from ..test_interop import WRITERS, by_img2dataset, of_dali, of_webdataset, samples
from .sets import SMALL, encoded, key, ledger, scene, scenes, stored

Picture = Callable[..., bytes]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes], dict[str, dict]]:
    """Shards with a json beside each image: their folder, the images and what was told of them, by key."""
    folder = tmp_path_factory.mktemp("made")
    data = [encoded(scene(n), ("JPEG", "PNG", "WEBP")[n % 3]) for n in range(20)]
    rows = {"image": data, "caption": [f"Nummer {n} – ü" for n in range(20)]}
    pq.write_table(pa.table(rows), folder / "t.parquet")
    ingest([folder / "t.parquet"], folder / "out", SMALL.model_copy(update={"keep": ("caption",)}), workers=1)
    images = {key(one): one for one in data}
    told = {name: {"caption": caption} for name, caption in zip(images, rows["caption"], strict=True)}
    return folder / "out" / "train", images, told


def test_webdataset(made: tuple[Path, dict[str, bytes], dict[str, dict]]) -> None:
    root, images, told = made
    found = of_webdataset([str(path) for path in sorted(root.glob("*.tar"))])
    assert [name for name, _ in found] == list(images)
    for name, members in found:
        assert len(members) == 2
        assert json.loads(members.pop("json")) == told[name]
        assert list(members.values()) == [images[name]]


def test_dali(made: tuple[Path, dict[str, bytes], dict[str, dict]], tmp_path: Path) -> None:
    root, images, told = made
    places = [str(path) for path in sorted(root.glob("*.tar"))]
    index_dataset(places, tmp_path, idx=True)
    found = of_dali(places, [str(path) for path in sorted((tmp_path / "idx").iterdir())], 20, ["jpg;png;webp", "json"])
    assert [image for image, _ in found] == list(images.values())
    assert [json.loads(text) for _, text in found] == list(told.values())


def test_tar(made: tuple[Path, dict[str, bytes], dict[str, dict]], tmp_path: Path) -> None:
    root, images, told = made
    for path in sorted(root.glob("*.tar")):
        subprocess.run(["tar", "-xf", path, "-C", tmp_path], check=True)
        listing = subprocess.run(["tar", "-tvf", path], check=True, capture_output=True, text=True).stdout
        assert all("gristmill/gristmill" in line and "1970-01-01" in line for line in listing.splitlines())
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert {name.partition(".")[0]: data for name, data in files.items() if name[-5:] != ".json"} == images
    assert {name[:-5]: json.loads(data) for name, data in files.items() if name[-5:] == ".json"} == told


@pytest.mark.skipif(
    importlib.util.find_spec("datasets") is None, reason="needs datasets: `pip install datasets` brings it"
)
def test_hugging_face_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It wants the same suffixes in every sample, so one format: `--reencode jpg` where a crawl has several."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import datasets  # pyright: ignore[reportMissingImports]

    scenes(tmp_path / "in", 12)
    config = SMALL.model_copy(update={"refine": RefineConfig(reencode="jpg")})
    ingest([tmp_path / "in"], tmp_path / "out", config, workers=1)
    tars = [str(path) for path in sorted((tmp_path / "out" / "train").glob("*.tar"))]
    read = datasets.load_dataset("webdataset", data_files={"train": tars}, split="train", streaming=True)
    found = {row["__key__"]: row["jpg"]["bytes"] for row in read.cast_column("jpg", datasets.Image(decode=False))}
    assert found == stored(tmp_path / "out" / "train")


@pytest.mark.parametrize("writer", [name for name in WRITERS if name != "img2dataset"])
def test_shards_of_others_are_taken_in(tmp_path: Path, picture: Picture, writer: str) -> None:
    write, folders = WRITERS[writer]
    folder = tmp_path / "shards"
    folder.mkdir()
    made = samples(picture, folders=folders)
    write(folder, made)
    ingest([folder], tmp_path / "out", SMALL, workers=1)
    images = [next(data for name, data in members.items() if name in ("jpg", "png", "webp")) for _, members in made]
    found = stored(tmp_path / "out" / "train")
    assert sorted(found.values()) == sorted(images)
    rows = {row["key"]: json.loads(row["meta"]) for row in ledger(tmp_path / "out")}
    assert {rows[key(image)]["cls"] for image in images} == set(range(len(images)))


def test_img2datasets_output_is_taken_in(tmp_path: Path, picture: Picture) -> None:
    """Tars, a report on each in Parquet, statistics in JSON: the tars' images are inputs, and the reports are none."""
    folder = tmp_path / "crawl"
    folder.mkdir()
    made = [(name, {"jpg": encoded(scene(n))}) for n, (name, _) in enumerate(samples(picture, folders=False))]
    by_img2dataset(folder, made)
    for path in folder.glob("*.parquet"):  # its reports have these columns too
        table = pq.read_table(path)
        count = table.num_rows
        table = table.append_column("url", pa.array([f"https://e.example/{i}?sig=c4nary" for i in range(count)]))
        pq.write_table(table.append_column("error_message", pa.nulls(count, pa.string())), path)
    report = ingest([folder], tmp_path / "out", IngestConfig(unit=4, keep=("*",)), workers=1)
    assert report.inputs == len(made)
    assert report.outcomes == {"kept": len(made)}
    manifest = Manifest.open(tmp_path / "out" / "train")
    images = [members["jpg"] for _, members in made]
    assert list(stored(tmp_path / "out" / "train").values()) == images
    assert list(manifest.rows(0).keys) == [key(image) for image in images]
    told = [json.loads(row["meta"]) for row in ledger(tmp_path / "out")]
    assert [one["caption"] for one in told][:5] == [f"picture {n}" for n in range(5)]
    assert all(one["status"] == "success" for one in told)
    locators = [row["locator"] for row in ledger(tmp_path / "out")]
    assert locators[0].startswith(str(folder / "00000.tar"))
    assert "000000000.jpg" in locators[0]
    assert verify(tmp_path / "out" / "train", deep=True) == []
