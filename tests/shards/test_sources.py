"""A folder's images are found in one order, whatever links and odd files lie there."""

import os
from pathlib import Path

import pytest
from gristmill.shards.sources import SourceError, find_images, read_candidate


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())


def names(root: Path) -> list[str]:
    return [path.as_posix() for path in find_images(root)]


def test_suffixes_of_any_case_in_the_order_of_folders(tmp_path: Path) -> None:
    touch(tmp_path, "b.JPG", "a/2.png", "a/10.jpeg", "a-b/1.WebP", "a/x.gif", "notes.txt", "a/jpg", ".hidden/h.jpg")
    assert names(tmp_path) == [".hidden/h.jpg", "a/10.jpeg", "a/2.png", "a-b/1.WebP", "b.JPG"]


def test_links_are_followed_once_and_loops_end(tmp_path: Path) -> None:
    source = tmp_path / "source"
    touch(tmp_path, "source/real/1.jpg", "source/real/deep/2.jpg", "outside/3.jpg")
    (source / "alias").symlink_to("real")  # sorts before the real folder, whose own path is kept all the same
    (source / "real" / "loop").symlink_to(source)
    (source / "real" / "self").symlink_to(".")
    (source / "away").symlink_to(tmp_path / "outside")
    (source / "away2").symlink_to(tmp_path / "outside")
    (source / "link.jpg").symlink_to(source / "real" / "1.jpg")
    (source / "broken.jpg").symlink_to("nowhere")
    (source / "broken").symlink_to("nowhere")
    assert names(source) == ["away/3.jpg", "broken.jpg", "link.jpg", "real/1.jpg", "real/deep/2.jpg"]


def test_a_folder_named_like_an_image_is_a_folder(tmp_path: Path) -> None:
    touch(tmp_path, "album.jpg/1.png")
    assert names(tmp_path) == ["album.jpg/1.png"]


def test_errors_name_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="is no folder"):
        find_images(tmp_path / "nowhere")
    touch(tmp_path, "x.gif")
    with pytest.raises(SourceError, match=r"\.jpg, \.jpeg, \.png, \.webp"):
        find_images(tmp_path)


def test_a_candidate_knows_its_folders(tmp_path: Path) -> None:
    touch(tmp_path, "a/b/1.jpg")
    candidate = read_candidate(tmp_path, Path("a/b/1.jpg"))
    assert candidate.data == b"a/b/1.jpg"
    assert candidate.label == ("a", "b")


def test_what_is_no_plain_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    for path in find_images(tmp_path):
        with pytest.raises(OSError, match="no plain file"):
            read_candidate(tmp_path, path)
