"""Which shards were meant by a folder, a list, a pattern or a url."""

from pathlib import Path

import pytest
from gristmill.shards.places import PlacesError, find_shards

from .tars import tar


def test_places(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tar(folder / "sub" / "a:b.tar", [])
    (folder / "loop").symlink_to(folder)
    (folder / "linked.tar").symlink_to(folder / "000.tar")
    (folder / "notes.txt").write_text("x")
    names = ["000.tar", "001.tar", "002.tar", "linked.tar", "sub/a:b.tar"]
    assert find_shards([folder]) == [str(folder / name) for name in names]
    listed = tmp_path / "list.txt"
    listed.write_text("# shards\nset/{001..002}.tar\n\n https://host/x-{0..1}.tar \ns3://bucket/y.tar\n")
    expected = [str(folder / "001.tar"), str(folder / "002.tar"), "https://host/x-0.tar", "https://host/x-1.tar"]
    assert find_shards([listed]) == [*expected, "s3://bucket/y.tar"]
    monkeypatch.chdir(tmp_path)
    assert find_shards(["set/00{0,2}.tar", f"file://{folder}/001.tar"]) == [
        str(folder / name) for name in ("000.tar", "002.tar", "001.tar")
    ]
    (tmp_path / "empty").mkdir()
    for sources, message in [
        (["nowhere"], "nowhere is not there: name a folder"),
        (["empty"], "no shard"),
        (["set/{000..005}.tar"], r"003\.tar, out of .* is not there"),
        (["set", "set/001.tar"], "named twice"),
        (["https://user:secret@host/{0..99999999}.tar"], "more than"),
        (["https://host/" + "{a,b}" * 40], "more than"),
        (["https://user:secret@host/{0..9.tar"], "not closed: close it"),
        ([b"set/\xff.tar".decode("utf-8", "surrogateescape")], "is not there|cannot be written down"),
    ]:
        with pytest.raises(PlacesError, match=message) as caught:
            find_shards(sources)
        assert "secret" not in str(caught.value)
    listed.write_text("set/001.tar\nlist.txt\n")
    with pytest.raises(PlacesError, match=r"list\.txt, line 2"):
        find_shards([listed])
