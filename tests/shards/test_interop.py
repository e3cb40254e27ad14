"""One shard, three readers: the webdataset library, DALI's own with our `.idx`, and ours give the same bytes.

Whoever wrote the tar: webdataset's writer, GNU tar in its three formats, or img2dataset, whose layout is laid down here as
its release 1.47 was seen to write it (it wants another webdataset than ours, so it cannot be a dependency): tar, Parquet
and statistics side by side; jpg, txt and json in each sample, each behind a PAX header for its time's fraction.
"""

import io
import json
import os
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from gristmill.pipeline.order import Sequential
from gristmill.pipeline.reader import Reader
from gristmill.shards import Manifest, Quarantine, verify
from gristmill.shards.foreign import index_dataset
from gristmill.shards.places import find_shards

Picture = Callable[..., bytes]
Sample = dict[str, bytes]  # suffix -> bytes
COUNT = 9


def samples(picture: Picture, *, folders: bool) -> list[tuple[str, Sample]]:
    """Keys and members: three formats, members before and after the image, text of any length."""
    made = []
    for number in range(COUNT):
        kind, suffix = [("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp")][number % 3]
        key = f"{number % 2}/{'deep/' * 25 if number % 4 == 3 else ''}same" if folders else f"{number:06d}"
        if folders:
            key += f"{number // 2}"
        members = {
            "cls": str(number).encode(),
            suffix: picture(kind, 20 + number, 30, number),
            "json": json.dumps({"n": number}).encode() * number,
            "meta.txt": b"" if number == 4 else b"text\n" * (number * 40),
        }
        made.append((key, members))
    return made


def by_webdataset(folder: Path, made: list[tuple[str, Sample]]) -> None:
    from webdataset.writer import ShardWriter

    with ShardWriter(str(folder / "wds-%05d.tar"), maxcount=4, verbose=0, encoder=False) as sink:
        for key, members in made:
            sink.write({"__key__": key, **members})


def by_tar(form: str, folder: Path, made: list[tuple[str, Sample]]) -> None:
    tree = folder.parent / "tree"
    names = []
    for key, members in made:
        for suffix, data in members.items():
            path = tree / f"{key}.{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            names.append(f"{key}.{suffix}")
    for shard, part in enumerate((names[:16], names[16:])):
        command = ["tar", "-cf", folder / f"{form}.{shard}.tar", f"--format={form}", "--no-recursion", "."]
        subprocess.run([*command, *part], cwd=tree, check=True)


def by_img2dataset(folder: Path, made: list[tuple[str, Sample]]) -> None:
    for shard, part in enumerate((made[:5], made[5:])):
        stem = f"{shard:05d}"
        with tarfile.open(folder / f"{stem}.tar", "w", format=tarfile.PAX_FORMAT) as file:
            for number, (_, members) in enumerate(part):
                key = f"{stem}{number:04d}"
                image = members.get("jpg") or members.get("png") or members["webp"]
                meta = {"key": key, "status": "success", "caption": f"picture {number}", "url": "x", "exif": "{}"}
                parts = {"jpg": image, "txt": meta["caption"].encode(), "json": json.dumps(meta, indent=4).encode()}
                for suffix, data in parts.items():
                    member = tarfile.TarInfo(f"{key}.{suffix}")
                    member.size, member.mode, member.mtime = len(data), 0o444, 1763793660.25 + number  # pyright: ignore
                    member.uname = member.gname = "bigdata"
                    file.addfile(member, io.BytesIO(data))
        keys = pa.table({"key": [f"{stem}{i:04d}" for i in range(len(part))], "status": ["success"] * len(part)})
        pq.write_table(keys, folder / f"{stem}.parquet")
        (folder / f"{stem}_stats.json").write_text(json.dumps({"count": len(part), "successes": len(part)}))


WRITERS = {
    "webdataset": (by_webdataset, True),
    "webdataset flat": (by_webdataset, False),
    "tar ustar": (lambda *rest: by_tar("ustar", *rest), False),
    "tar gnu": (lambda *rest: by_tar("gnu", *rest), True),
    "tar pax": (lambda *rest: by_tar("pax", *rest), True),
    "img2dataset": (by_img2dataset, False),
}
SUFFIXES = ["jpg", "png", "webp"]


def of_webdataset(places: list[str]) -> list[tuple[str, Sample]]:
    import webdataset

    read = webdataset.WebDataset(places, shardshuffle=False, empty_check=False)
    return [(found["__key__"], {k: v for k, v in found.items() if k[:2] != "__"}) for found in read]


def of_dali(places: list[str], idx: list[str], count: int, ext: list[str]) -> list[list[bytes]]:
    from nvidia.dali import fn, types
    from nvidia.dali.pipeline import pipeline_def

    @pipeline_def(batch_size=count, num_threads=1, device_id=None, prefetch_queue_depth=1)  # pyright: ignore
    def graph():
        read = fn.readers.webdataset(
            paths=places,
            index_paths=idx,
            ext=ext,
            dtypes=[types.UINT8] * len(ext),
            missing_component_behavior="empty",
            dont_use_mmap=True,
        )
        return tuple(read)  # pyright: ignore

    pipeline = graph()
    pipeline.build()
    outputs = pipeline.run()
    return [[np.array(output.at(row)).tobytes() for output in outputs] for row in range(count)]


@pytest.mark.parametrize("writer", WRITERS)
def test_three_readers_give_the_same_bytes(tmp_path: Path, picture: Picture, writer: str) -> None:
    write, folders = WRITERS[writer]
    folder = tmp_path / "shards"
    folder.mkdir()
    write(folder, samples(picture, folders=folders))
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}
    places = find_shards([folder])
    report = index_dataset(places, folder, idx=True)
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in before} == before  # in place, untouched
    assert (report.samples, report.shards, report.idx) == (COUNT, len(places), len(places))

    manifest, theirs = Manifest.open(folder), of_webdataset(places)
    rows = [manifest.rows(shard) for shard in range(len(places))]
    keys = [key for row in rows for key in row.keys]
    assert keys == [key for key, _ in theirs]
    images = [next(members[s] for s in SUFFIXES if s in members) for _, members in theirs]

    reader = Reader(manifest, Quarantine(tmp_path / "q.jsonl"), order=Sequential(manifest.counts), seed=0)
    try:
        ours = reader.read(np.arange(COUNT))  # sizes come from the images' headers: the index has none
    finally:
        reader.close()
    assert [data.tobytes() for data in ours.data] == images
    assert ours.keys == keys
    assert not ours.substituted.any()
    assert ours.sizes.tolist() == [[20 + number, 30] for number in range(COUNT)]

    idx = [str(Path(place).with_suffix(".idx")) for place in places]
    ext = ["jpg;png;webp", "json", "cls", "meta.txt", "txt"]
    dali = of_dali(places, idx, COUNT, ext)
    assert [row[0] for row in dali] == images
    for row, (_, members) in zip(dali, theirs, strict=True):
        assert row[1:] == [members.get(suffix, b"") for suffix in ext[1:]]

    assert index_dataset(places, folder, deep=True).digest == report.digest
    assert verify(folder, deep=True) == []
    assert Manifest.open(folder).rows(0).width[0] == 20


@pytest.mark.parametrize("form", ["ustar", "gnu"])
def test_idx_files_are_those_of_dalis_own_tool(tmp_path: Path, picture: Picture, form: str) -> None:
    from wds2idx import IndexCreator

    folder = tmp_path / "shards"
    folder.mkdir()
    by_tar(form, folder, samples(picture, folders=False))
    places = find_shards([folder])
    index_dataset(places, tmp_path / "out", idx=True)
    for number, place in enumerate(places):
        with IndexCreator(place, str(tmp_path / "theirs.idx"), verbose=False) as creator:
            creator.create_index()
        ours = tmp_path / "out" / "idx" / f"{number:06d}-{Path(place).stem}.idx"
        assert ours.read_text() == (tmp_path / "theirs.idx").read_text()


def test_blanks_in_names_do_not_shift_a_line_of_the_idx(tmp_path: Path, picture: Picture) -> None:
    images = [picture(seed=seed) for seed in range(3)]
    with tarfile.open(tmp_path / "a.tar", "w") as file:
        for name, data in [
            ("my cat.jpg", images[0]),
            ("b.j son", b"left away"),
            ("b.jpg", images[1]),
            ("only.json", b"no image: no sample of ours"),
            ("b\tc\n.jpg", images[2]),
        ]:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            file.addfile(member, io.BytesIO(data))
    places = find_shards([tmp_path])
    index_dataset(places, tmp_path, idx=True)
    lines = (tmp_path / "a.idx").read_text().splitlines()
    assert lines[0] == "v1.2 3"
    assert [len(line.split()) for line in lines[1:]] == [4, 4, 4]
    dali = of_dali(places, [os.fspath(tmp_path / "a.idx")], 3, ["jpg", "json"])
    assert dali == [[image, b""] for image in images]
