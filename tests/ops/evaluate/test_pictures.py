"""Every layout becomes the same rows and labels, and the squares are those of the pipeline, to the bit."""

from pathlib import Path

import numpy as np
import pytest
import torch
from gristmill.ops.evaluate.layouts import splits
from gristmill.ops.evaluate.pictures import PicturesError, open_pictures
from gristmill.pipeline.probing import probe_batches
from gristmill.pipeline.views import View
from gristmill.shards.demo import make_demo_images
from gristmill.shards.errors import GristmillError
from gristmill.shards.ingest import ingest
from gristmill.shards.manifest import Manifest
from PIL import Image

from .sets import CLASSES, LAYOUTS, drawn, encoded, folders, tars, voc


def all_of(pictures, size=16, batch=5):
    rows, images = zip(*pictures.batches(size, batch), strict=True)
    return torch.cat(rows), torch.cat(images)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_gives_pictures_and_their_classes(layout, tmp_path: Path):
    pictures = open_pictures(LAYOUTS[layout](tmp_path / "set"))
    assert len(pictures) == 18
    assert pictures.level == "class"
    for row, key in enumerate(pictures.keys):
        kind = next(kind for kind in CLASSES if kind in key)
        code = int(pictures.labels[row])
        if layout == "tars":  # numbers, and one sample without any
            wanted = "" if key == "plum-05" else str(CLASSES.index(kind))
        else:
            wanted = {"amber": "bicycle", "blue": "bird", "plum": "boat"}[kind] if layout == "voc" else kind
        assert (pictures.classes[code] if code >= 0 else "") == wanted
        assert pictures.load(row).size == (48, 40)
    rows, images = all_of(pictures)
    assert rows.tolist() == list(range(18))
    assert images.shape == (18, 3, 16, 16)
    assert images.dtype == torch.float32
    assert open_pictures(tmp_path / "set").identity == pictures.identity


def test_voc_without_masks_goes_by_its_boxes(tmp_path: Path):
    with_masks = open_pictures(voc(tmp_path / "a"), "train")
    by_boxes = open_pictures(voc(tmp_path / "b", masks=False), "train")
    told = [[each.classes[int(code)] for code in each.labels] for each in (with_masks, by_boxes)]
    assert told[0] == told[1]
    with pytest.raises(GristmillError, match="no split 'val'"):
        open_pictures(tmp_path / "b", "val")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("shards")
    make_demo_images(root / "images", images=384, size=32)
    ingest([root / "images"], root / "data")
    return root


@pytest.mark.parametrize("limit", [None, 50])
def test_shards_give_what_the_pipeline_gives_bit_for_bit(shards: Path, limit):
    data = shards / "data"
    pictures = open_pictures(data, limit=limit)
    keys, images = zip(*probe_batches(Manifest.open(data / "train"), 16, 64, limit=limit), strict=True)
    rows, ours = all_of(pictures, batch=40)
    assert [pictures.keys[row] for row in rows] == [key for part in keys for key in part]
    assert torch.equal(ours, torch.cat(images))
    assert pictures.level == "fine"
    assert list(pictures.levels) == ["coarse", "fine", "instance"]


def test_the_folders_that_were_ingested_give_the_same_pictures(shards: Path):
    ingested, plain = open_pictures(shards / "data"), open_pictures(shards / "images")
    assert sorted(map(tuple, all_of(ingested)[1].flatten(1)[:, :9].tolist())) == sorted(
        map(tuple, all_of(plain)[1].flatten(1)[:, :9].tolist())
    )
    assert {n: len(c.unique()) for n, c in ingested.levels.items()} == {
        n: len(c.unique()) for n, c in plain.levels.items()
    }


def test_levels_are_chosen_and_renumbered(shards: Path):
    pictures = open_pictures(shards / "data", level="coarse")
    assert len(pictures.classes) == 4
    few = pictures.take((pictures.labels > 1).nonzero()[:, 0])
    assert few.identity != pictures.identity
    assert few.classes == pictures.classes
    alone = open_pictures(shards / "images" / pictures.classes[2])
    with pytest.raises(PicturesError, match="no labels of level 'kind'; it has coarse, fine"):
        open_pictures(shards / "data", level="kind")
    assert list(alone.levels) == ["coarse", "fine"]  # the names say depth, not meaning


def test_classes_of_queries_are_numbered_as_the_references(tmp_path: Path):
    reference = open_pictures(folders(tmp_path / "a"))
    (folders(tmp_path / "b") / "blue").rename(tmp_path / "b" / "azure")
    query = open_pictures(tmp_path / "b").like(reference)
    assert query.classes == [*CLASSES, "azure"]
    named = [query.classes[int(code)] for code in query.labels]
    assert named == [key.split("/")[0] for key in query.keys]


def test_what_does_not_decode_is_left_out_and_named(tmp_path: Path):
    root = folders(tmp_path / "set")
    (root / "blue" / "03.jpg").write_bytes(b"\xff\xd8\xff broken")
    (root / "plum" / "01.jpg").write_bytes((root / "plum" / "01.jpg").read_bytes()[:200])
    whole = all_of(open_pictures(folders(tmp_path / "whole")))[1]
    pictures = open_pictures(root)
    rows, images = all_of(pictures)
    assert set(range(18)) - set(rows.tolist()) == {9, 13} == set(pictures.damaged)
    assert torch.equal(images, whole[rows])
    with pytest.raises(PicturesError, match=r"blue/03\.jpg .* take it out"):
        pictures.load(9)


def test_formats_that_the_pipeline_has_not_and_turned_pictures(tmp_path: Path):
    (tmp_path / "a").mkdir()
    image = drawn("plum", 1)
    for suffix in ("png", "tif", "bmp"):
        image.save(tmp_path / "a" / f"x.{suffix}")
    exif = Image.Exif()
    exif[0x112] = 6
    image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "a" / "turned.png", exif=exif)
    pictures = open_pictures(tmp_path / "a")
    _, images = all_of(pictures)
    assert (images == images[0]).all()
    assert all(np.array_equal(np.asarray(pictures.load(row)), np.asarray(image)) for row in range(4))


def test_crops_are_drawn_for_their_row(tmp_path: Path):
    pictures = open_pictures(folders(tmp_path / "set"))
    view = View.model_validate({"name": "pair", "count": 2, "size": 12, "augment": "moco"})
    whole = torch.cat([crops for _, crops in pictures.crops(view, 3)])
    some = torch.cat([crops for _, crops in pictures.crops(view, 3, batch=2, rows=[11, 4, 5])])
    assert torch.equal(some, whole[[11, 4, 5]])
    assert not torch.equal(whole[:, 0], whole[:, 1])


def test_a_limit_takes_the_same_from_all_over(tmp_path: Path):
    root = folders(tmp_path / "set", each=20)
    few = open_pictures(root, limit=30)
    assert few.keys == open_pictures(root, limit=30).keys
    assert min(torch.bincount(few.labels).tolist()) > 4
    assert few.identity != open_pictures(root).identity


def test_errors_name_the_remedy(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    for where, said in ((tmp_path / "no", "no such folder"), (tmp_path / "empty", "holds no pictures")):
        with pytest.raises(PicturesError, match=said):
            open_pictures(where)
    folders(tmp_path / "both" / "train")
    folders(tmp_path / "both" / "val")
    with pytest.raises(PicturesError, match="splits train, val; name one"):
        open_pictures(tmp_path / "both")
    assert splits(tmp_path / "both") == ("train", "val")
    assert open_pictures(tmp_path / "both", "val").classes == list(CLASSES)
    with pytest.raises(PicturesError, match="no split 'test'; it holds train, val"):
        open_pictures(tmp_path / "both", "test")
    odd = tars(tmp_path / "tars")
    (odd / "classes.txt").write_text("one\ntwo\n")
    with pytest.raises(PicturesError, match="names 2 classes, but there is a sample of class 2"):
        open_pictures(odd)
    (odd / "classes.txt").write_text("one\ntwo\nthree\n")
    assert open_pictures(odd).classes == ["0: one", "1: two", "2: three"]


def test_a_changed_file_is_another_set(tmp_path: Path):
    root = folders(tmp_path / "set")
    before = open_pictures(root).identity
    (root / "blue" / "00.jpg").write_bytes(encoded(drawn("blue", 0, seed=9)))
    assert open_pictures(root).identity != before
