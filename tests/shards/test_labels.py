"""Labels: the folders' names, coarse to fine, found again by key."""

from pathlib import Path, PurePath

import numpy as np
import pytest
from gristmill.shards.labels import Labels, LabelsError, write_labels


def labelled(root: Path, *paths: str) -> Labels:
    write_labels(root, [f"key{i}" for i in range(len(paths))], [PurePath(path) for path in paths])
    labels = Labels.open(root)
    assert labels is not None
    return labels


@pytest.mark.parametrize(
    ("path", "names"),
    [
        ("x.jpg", []),
        ("cat/x.jpg", ["class"]),
        ("pet/cat/x.jpg", ["coarse", "fine"]),
        ("pet/cat/tom/x.jpg", ["coarse", "fine", "instance"]),
        ("pet/cat/tom/2020/x.jpg", ["coarse", "fine", "instance"]),
    ],
)
def test_levels_follow_the_depth_of_the_folders(tmp_path: Path, path: str, names: list[str]) -> None:
    assert labelled(tmp_path, path).names == names


def test_a_class_is_its_whole_path(tmp_path: Path) -> None:
    labels = labelled(tmp_path, "b/x/1.jpg", "a/x/2.jpg", "a/y/3.jpg", "b/x/4.jpg")
    assert labels.classes("coarse") == ["a", "b"]
    assert labels.classes("fine") == ["a/x", "a/y", "b/x"]
    codes = labels.codes(["key3", "key0", "key1", "key2", "key1"], "fine")
    assert codes.dtype == np.int64
    assert codes.tolist() == [2, 2, 0, 1, 0]
    assert labels.codes([], "fine").tolist() == []


def test_an_image_above_a_level_has_no_class_there(tmp_path: Path) -> None:
    labels = labelled(tmp_path, "top.jpg", "a/1.jpg", "a/b/2.jpg")
    keys = ["key0", "key1", "key2"]
    assert labels.codes(keys, "coarse").tolist() == [-1, 0, 0]
    assert labels.codes(keys, "fine").tolist() == [-1, -1, 0]


def test_folders_with_names_of_any_bytes(tmp_path: Path) -> None:
    raw = bytes([0x66, 0xFF]).decode("utf-8", "surrogateescape")  # a file system's name that is no UTF-8
    labels = labelled(tmp_path, f"{raw}/1.jpg", "größe/2.jpg")
    assert labels.classes("class") == ["f\\xff", "größe"]


def test_found_from_the_data_set_beside_it(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    assert Labels.open(tmp_path / "train") is None
    labelled(tmp_path, "a/1.jpg")
    beside = Labels.open(tmp_path / "train")
    assert beside is not None
    assert beside.classes("class") == ["a"]


def test_errors_name_the_thing(tmp_path: Path) -> None:
    labels = labelled(tmp_path, "a/1.jpg")
    with pytest.raises(LabelsError, match=r"no level 'fine'; it has class"):
        labels.classes("fine")
    with pytest.raises(LabelsError, match="does not know sample stranger"):
        labels.codes(["key0", "stranger"], "class")
    (tmp_path / "labels.parquet").write_bytes(b"junk")
    with pytest.raises(LabelsError, match="cannot be read"):
        Labels.open(tmp_path)
    flat = labelled(tmp_path, "1.jpg")
    with pytest.raises(LabelsError, match="none, since its source had no subfolders"):
        flat.codes(["key0"], "class")
