"""What is left out and what goes along: near duplicates, other data sets, a user's own filter, columns of the source."""

import io
import json
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from gristmill.shards import Manifest
from gristmill.shards.ingest import IngestConfig, IngestError, RefineConfig, ingest
from PIL import Image

from .sets import SMALL, counted, encoded, key, ledger, scene, scenes, stored, tree

FILTERS = '''
import os

def odd(offered):
    """Images of odd number are left out, every fourth one with a reason."""
    return [_say(int(os.path.basename(one.locator)[:5])) for one in offered]

def _say(number):
    return True if number % 2 == 0 else "looks odd" if number % 4 == 1 else False

class Scores:
    def __init__(self):
        with open("made.txt", "a") as file:
            file.write("made\\n")

    def __call__(self, offered):
        for one in offered:
            assert one.data[:2] and one.format in ("jpg", "png", "webp") and (one.width, one.height) == (64, 48)
        return [{"score": len(one.data), "who": {"a": [1, None]}} for one in offered]

def fails(offered):
    raise ZeroDivisionError("no reason")

def few(offered):
    return [True] * (len(offered) - 1)

def odd_ones(offered):
    return [3.5] * len(offered)
'''


def members(root: Path, suffix: str) -> dict[str, bytes]:
    found = {}
    for path in sorted(root.glob("*.tar")):
        with tarfile.open(path) as file:
            for member in file:
                if member.name.endswith(suffix):
                    data = file.extractfile(member)
                    assert data is not None
                    found[member.name[: -len(suffix)]] = data.read()
    return found


def test_near_duplicates_within_the_threshold(tmp_path: Path) -> None:
    source = tmp_path / "in"
    scenes(source, 10)
    image = Image.open(io.BytesIO((source / "a" / "00000.jpg").read_bytes()))
    (source / "c.jpg").write_bytes(encoded(image, quality=40))
    (source / "d.webp").write_bytes(encoded(image.resize((48, 36)), "WEBP", quality=60))
    report = ingest([source], tmp_path / "near", SMALL.model_copy(update={"near": 12}), workers=1)
    assert report.outcomes == {"kept": 10, "near_duplicate": 2}
    rows = [row for row in ledger(tmp_path / "near") if row["outcome"] == "near_duplicate"]
    assert {row["duplicate_of"] for row in rows} == {key((source / "a" / "00000.jpg").read_bytes())}
    assert all(0 <= row["distance"] <= 12 and row["shard"] is None for row in rows)
    assert ingest([source], tmp_path / "exact", SMALL, workers=1).outcomes == {"kept": 12}
    assert {len(row["fingerprint"]) for row in ledger(tmp_path / "exact")} == {32}


@pytest.mark.parametrize("against", ["root", "train", "plain", "tars"])
def test_what_another_data_set_holds_is_left_out(tmp_path: Path, against: str) -> None:
    """A data set of ours by its ledger, given as a whole or as one half; a folder of images; shards without a ledger."""
    scenes(tmp_path / "other", 10)
    scenes(tmp_path / "in", 12, 6)  # four of them there too
    image = Image.open(io.BytesIO((tmp_path / "other" / "a" / "00000.jpg").read_bytes()))
    (tmp_path / "in" / "z.jpg").write_bytes(encoded(image, quality=50))
    near = SMALL.model_copy(update={"near": 12})
    ingest([tmp_path / "other"], tmp_path / "ours", SMALL, workers=1)
    (tmp_path / "tars").mkdir()
    for path in (tmp_path / "ours" / "train").glob("*.tar"):
        (tmp_path / "tars" / path.name).write_bytes(path.read_bytes())
    place = {"root": "ours", "train": "ours/train", "plain": "other", "tars": "tars"}[against]
    before = tree(tmp_path / place)
    config = near.model_copy(update={"against": (str(tmp_path / place),)})
    report = ingest([tmp_path / "in"], tmp_path / "out", config, workers=1)
    assert report.outcomes == {"duplicate": 4, "kept": 8, "near_duplicate": 1}
    assert report.inputs == 13, "what it was compared with is no input"
    assert tree(tmp_path / place) == before
    # It counts for that one alone.
    report = ingest([tmp_path / "other"], tmp_path / "out", near, append=True, workers=1)
    assert report.outcomes["kept"] >= 5


@pytest.fixture
def filters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """The module's name, new for every test: modules are imported once."""
    name = f"filters_{abs(hash(request.node.name))}"
    (tmp_path / f"{name}.py").write_text(FILTERS)
    monkeypatch.chdir(tmp_path)
    return name


@pytest.mark.parametrize("workers", [1, 2])
def test_a_function_filters(tmp_path: Path, filters: str, workers: int) -> None:
    scenes(tmp_path / "in", 24)
    config = SMALL.model_copy(update={"filter": f"{filters}:odd", "unit": 10})
    report = ingest([tmp_path / "in"], tmp_path / "out", config, workers=workers)
    assert report.outcomes == {"filtered": 12, "kept": 12}
    assert report.details == {"filtered: looks odd": 6, "filtered": 6}
    rows = {int(Path(row["locator"]).name[:5]): row for row in ledger(tmp_path / "out")}
    assert [n for n in rows if rows[n]["outcome"] == "kept"] == [n for n in rows if n % 2 == 0]
    assert {rows[n]["detail"] for n in rows if n % 4 == 1} == {"looks odd"}
    assert Manifest.open(tmp_path / "out" / "train").samples == 12


def test_a_class_scores_and_is_made_once_a_worker(tmp_path: Path, filters: str) -> None:
    scenes(tmp_path / "in", 12)
    config = SMALL.model_copy(update={"filter": f"{filters}:Scores"})
    ingest([tmp_path / "in"], tmp_path / "out", config, workers=1)
    assert (tmp_path / "made.txt").read_text() == "made\n"
    images = stored(tmp_path / "out" / "train")
    told = {name: json.loads(data) for name, data in members(tmp_path / "out" / "train", ".json").items()}
    assert told == {name: {"score": len(data), "who": {"a": [1, None]}} for name, data in images.items()}
    assert {row["key"]: json.loads(row["meta"]) for row in ledger(tmp_path / "out")} == told


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fails", r"failed on a batch of 6 images, the first .*/0000\d\.\w+ \(ZeroDivisionError: no reason\)"),
        ("few", "gave 5 verdicts on 6 images"),
        ("odd_ones", "gave 3.5: give True, False"),
        ("missing", r"cannot be loaded .*importable from"),
    ],
)
@pytest.mark.parametrize("workers", [1, 2])
def test_a_filter_that_fails_stops_the_ingest_resumably(
    tmp_path: Path, filters: str, name: str, message: str, workers: int
) -> None:
    scenes(tmp_path / "in", 12)
    config = SMALL.model_copy(update={"filter": f"{filters}:{name}", "unit": 6})
    for _ in range(2):
        with pytest.raises(IngestError, match=f"filter {filters}:{name} {message}"):
            ingest([tmp_path / "in"], tmp_path / "out", config, workers=workers)
        assert counted(tmp_path / "out") == {}


@pytest.mark.parametrize("keep", [("caption", "score"), ("*",)])
def test_columns_of_a_table_go_into_each_samples_json(tmp_path: Path, keep: tuple[str, ...]) -> None:
    """As Hugging Face lays it out: image: struct<bytes, path>."""
    data = [encoded(scene(number)) for number in range(6)]
    images = pa.array(
        [{"bytes": one, "path": f"{i}.jpg"} for i, one in enumerate(data)],
        pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
    )
    captions = [f"picture {number} ü" for number in range(6)]
    columns = {"image": images, "caption": captions, "score": [0.5, 1.5, None, 3.0, float("nan"), 5.0]}
    pq.write_table(pa.table(columns), tmp_path / "train-00000.parquet", row_group_size=4)
    config = IngestConfig(unit=4, shard_samples=4, keep=keep)
    ingest([tmp_path / "train-00000.parquet"], tmp_path / "out", config, workers=1)
    assert list(stored(tmp_path / "out" / "train").values()) == data
    told = [json.loads(one) for one in members(tmp_path / "out" / "train", ".json").values()]
    assert [one["caption"] for one in told] == captions
    assert [one["score"] for one in told] == [0.5, 1.5, None, 3.0, None, 5.0]
    assert [json.loads(row["meta"]) for row in ledger(tmp_path / "out")] == told
    assert Manifest.open(tmp_path / "out" / "train").counts.tolist() == [4, 2]


def test_sizes_formats_and_resizing(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name, size in {"small": (20, 30), "wide": (400, 60), "large": (300, 200), "plain": (64, 64)}.items():
        (tmp_path / "in" / f"{name}.png").write_bytes(encoded(scene(len(name), *size), "PNG"))
    settings = RefineConfig(min_side=32, max_aspect=4.0, resize=100, reencode="jpg")
    report = ingest([tmp_path / "in"], tmp_path / "out", SMALL.model_copy(update={"refine": settings}), workers=1)
    assert report.outcomes == {"aspect": 1, "kept": 2, "too_small": 1}
    rows = {Path(row["locator"]).stem: row for row in ledger(tmp_path / "out")}
    assert (rows["large"]["width"], rows["large"]["height"], rows["large"]["format"]) == (150, 100, "jpg")
    assert (rows["plain"]["width"], rows["plain"]["height"], rows["plain"]["format"]) == (64, 64, "jpg")
    assert sum(report.changed.values()) == 2
    image = Image.open(io.BytesIO(stored(tmp_path / "out" / "train")[rows["large"]["key"]]))
    assert image.size == (150, 100)
