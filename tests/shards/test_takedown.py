"""Takedowns: found by key, address and hash, removed at once; erased to the last byte."""

import hashlib
import json
import os
import shutil
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from gristmill.shards import rewrite
from gristmill.shards.cutting import cut_shard
from gristmill.shards.dali import write_idx
from gristmill.shards.foreign import index_dataset
from gristmill.shards.forgetting import FORGOTTEN
from gristmill.shards.index import sample_shard
from gristmill.shards.ingest.ledger import generations, outcomes, rows_of
from gristmill.shards.ingest.plan import Plan
from gristmill.shards.ingest.run import ingest
from gristmill.shards.ingest.sources import plan, read_unit
from gristmill.shards.labels import Labels
from gristmill.shards.manifest import Manifest
from gristmill.shards.rewrite import RewriteError
from gristmill.shards.takedown import TakedownError, Wanted, parse_hash, parse_lines, take_down
from gristmill.shards.tombstones import TombstoneError, Tombstones
from gristmill.shards.verify import verify
from webdataset.writer import TarWriter

from .takedowns import blake, holds, make_set, source, stored, tree
from .tars import tar

Picture = Callable[..., bytes]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_set(tmp_path_factory.mktemp("takedown"))


@pytest.fixture
def out(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made / "out", tmp_path / "out")
    return tmp_path / "out"


def test_what_is_left_of_a_tar_is_what_the_writer_makes_of_the_rest(tmp_path: Path, picture: Picture) -> None:
    """Byte for byte, whichever samples go: the first, the last, neighbours."""

    def write(path: Path, keep: Iterable[int]) -> Path:
        with path.open("wb") as file, TarWriter(file, mtime=0, encoder=False, compress=False) as out:
            for number in keep:
                key = "long/" + "x" * 120 * (number % 4 == 3) + f"k{number:02d}"
                out.write({"__key__": key, "jpg": picture("JPEG", 20 + number), "json": b"{}", "cls": b"3"})
        return path

    whole = write(tmp_path / "whole.tar", range(12))
    for gone in ([0], [11], [3], [0, 1, 2, 7, 11], [5, 6]):
        found = cut_shard(whole, gone, tmp_path / "cut.tar")
        left = [number for number in range(12) if number not in gone]
        assert (tmp_path / "cut.tar").read_bytes() == write(tmp_path / "left.tar", left).read_bytes()
        assert found.rows.digest() == sample_shard(tmp_path / "left.tar").rows.digest()


@pytest.mark.parametrize("kind", ["ustar", "gnu", "pax"])
def test_tars_of_others_lose_nothing_but_the_sample(tmp_path: Path, picture: Picture, kind: str) -> None:
    name = "folder/" + "y" * 95
    entries = [("a.txt", b"a"), ("a.jpg", picture(seed=1)), ("loose", b"?"), (f"{name}.jpg", picture(seed=2))]
    entries += [(f"{name}.json", b"{}"), ("c.png", picture("PNG", seed=3)), ("c.txt", b"c")]
    whole = tar(tmp_path / "whole.tar", entries, kind, links={"link": tarfile.SYMTYPE})
    cut_shard(whole, [1], tmp_path / "cut.tar")
    with tarfile.open(tmp_path / "cut.tar") as file:
        left = {member.name: member.isreg() and file.extractfile(member).read() for member in file}  # type: ignore[union-attr]
    assert left == {"link": False, **{name: data for name, data in entries if "y" not in name}}


def test_removed_by_key_by_address_and_by_hash(made: Path, out: Path) -> None:
    key = blake(source(made, "b/01.png")[1])
    sha256 = hashlib.sha256(source(made, "a/02.png")[1]).hexdigest()
    md5 = hashlib.md5(source(made, "b/03.png")[1]).hexdigest()
    lines = [key, "", f"sha256:{sha256}", f"md5:{md5}", f"blake2b:{blake(source(made, 'b/05.png')[1])}"]
    wanted = parse_lines(lines)
    wanted.addresses += [source(made, "a/00.png")[0], source(made, "b/again.png")[0]]
    report = take_down(out, wanted, "asked")
    assert (report.removed, report.total, report.samples) == (6, 6, 24)
    names = ("b/01.png", "a/02.png", "b/03.png", "b/05.png", "a/00.png", "a/04.png")
    found = {key for part in ("train", "probe") for _, key, _ in Tombstones.of(Manifest.open(out / part))}
    assert found == {blake(source(made, name)[1]) for name in names}
    assert take_down(out, wanted, "asked").removed == 0
    assert take_down(out / "train", Wanted(), "", erase=False).total < 6


def test_one_that_is_not_known_and_nothing_happens(made: Path, out: Path) -> None:
    key = blake(source(made, "b/01.png")[1])
    before = tree(out)
    for wanted, said in (
        (Wanted(keys=[key, "nobody"]), "no sample nobody: nothing was removed"),
        (Wanted(keys=[key], addresses=["https://nowhere.example/x.jpg"]), "no input of .* came from https://nowhere"),
        (Wanted(keys=[key], hashes=[("sha256", "0" * 64)]), "no sample with sha256 0000"),
        (Wanted(keys=[key], hashes=[("blake2b", "0" * 32)]), "no sample with blake2b 0000"),
    ):
        with pytest.raises((TombstoneError, TakedownError), match=said):
            take_down(out, wanted, "asked", erase=True)
    shutil.rmtree(out / "train" / ".rewrite", ignore_errors=True)
    assert tree(out) == before
    for text in ("12", "g" * 32, "sha256:" + "0" * 63, "crc:" + "0" * 32):
        with pytest.raises(TakedownError, match="is no hash"):
            parse_hash(text)


def test_erased_to_the_last_byte(made: Path, out: Path) -> None:
    """No byte of the image and no word of its origin is left; everything else is as it was; it never comes in again."""
    place, data = source(made, "a/04.png")
    key, middle = blake(data), data[len(data) // 3 : len(data) // 3 + 48]
    assert holds(out, middle)
    before = {part: Manifest.open(out / part) for part in ("train", "probe")}
    kept = {k: v for part in before.values() for k, v in stored(part).items() if k != key}
    report = take_down(out, Wanted(addresses=[place]), "ticket 17", erase=True)
    assert (report.removed, report.erased, report.shards, report.total) == (1, 1, 1, 0)
    assert report.forgotten == 2  # it came twice
    assert not holds(out, middle)
    rows = [row for table in rows_of(out, 0) for row in table.to_pylist()]
    assert [(row["locator"], row["labels"], row["detail"]) for row in rows if row["key"] == key] == [
        (None, None, FORGOTTEN)
    ] * 2
    assert not [row for row in rows if row["locator"] == place]
    assert outcomes(out).total() == 25
    after = {part: Manifest.open(out / part) for part in ("train", "probe")}
    assert {k: v for part in after.values() for k, v in stored(part).items()} == kept
    changed = [part for part in after if after[part].digest != before[part].digest]
    assert [pair[1] for pair in report.digests] == [after[part].digest for part in changed]
    assert len(changed) == 1
    assert [verify(out / part, deep=True) for part in after] == [[], []]
    assert [one["reason"] for one in rewrite.removed(out / changed[0])] == ["ticket 17"]
    labels = Labels.open(out / "train")
    assert labels is not None
    assert key not in labels._keys.to_pylist()
    (made.parent / "more").mkdir(exist_ok=True)
    shutil.copy(made / "source" / "a" / "04.png", made.parent / "more" / "new.png")
    again = ingest([str(made.parent / "more")], out, append=True)
    assert again.outcomes == {"duplicate": 1}
    assert take_down(out, Wanted(keys=[key]), "once more").notes == [f"{key} was erased before"]


def test_all_of_a_shard_and_tombstones_from_before(made: Path, out: Path) -> None:
    """A shard of which nothing is left goes; DALI's index of a shard follows it; what was removed earlier goes along."""
    manifest = Manifest.open(out / "train")
    for shard in range(len(manifest.urls)):
        write_idx(manifest.path(shard).with_suffix(".idx"), sample_shard(manifest.path(shard)))
    Tombstones.of(manifest).remove(manifest, manifest.rows(1).keys, "earlier")
    report = take_down(out / "train", Wanted(keys=[manifest.rows(0).keys[2]]), "now", erase=True)
    assert (report.erased, report.shards) == (len(manifest.rows(1)) + 1, 2)
    after = Manifest.open(out / "train")
    assert after.urls == [manifest.urls[0], *manifest.urls[2:]]
    assert after.rows(0).keys == [key for row, key in enumerate(manifest.rows(0).keys) if row != 2]
    assert not (out / "train" / "000001.tar").exists()
    assert not (out / "train" / "000001.idx").exists()
    assert (out / "train" / "000000.idx").read_text().startswith("v1.2 4\n")
    assert not (out / "train" / "tombstones.jsonl").exists()
    assert {one["reason"] for one in rewrite.removed(out / "train")} == {"earlier", "now"}
    rest = [key for shard in range(len(after.urls)) for key in after.rows(shard).keys]
    with pytest.raises(RewriteError, match="left without a sample"):
        take_down(out / "train", Wanted(keys=rest), "all", erase=True)


def test_tombstones_of_others_move_with_their_samples(out: Path) -> None:
    """Somebody removes a sample between the writing of new shards and the moment when they are put in place."""
    part = out / "train"
    manifest = Manifest.open(part)
    keys = manifest.rows(0).keys
    Tombstones.of(manifest).remove(manifest, [keys[1]], "first")
    decided = rewrite.stage(part, "")
    assert decided is not None
    rewrite.commit(part)
    Tombstones.of(manifest).remove(manifest, [keys[0], keys[3]], "late")
    for _ in range(2):
        rewrite.finish(part, decided)
        stones = Tombstones.of(Manifest.open(part))
        assert [(place, key) for place, key, _ in stones] == [
            (("000000.tar", 0), keys[0]),
            (("000000.tar", 2), keys[3]),
        ]
    rewrite.release(part)


def test_an_address_whose_query_was_hidden(tmp_path: Path, made: Path) -> None:
    """The ledger shows no queries; the frozen inputs know them, and forget the one that is asked for. Nothing else moves."""
    urls = [f"https://photos.example/view?id={number}" for number in range(3)] + ["https://photos.example/plain.jpg"]
    root = published_by_hand(tmp_path / "crawl", urls, made)
    with pytest.raises(TakedownError, match=r"3 inputs .* with other queries: .*view\?\.\.\. \("):
        take_down(root, Wanted(addresses=["https://photos.example/view?..."]), "which?")
    key = Manifest.open(root / "train").rows(0).keys[1]
    report = take_down(root, Wanted(addresses=[urls[1]]), "asked", erase=True)
    assert report.erased == 1
    assert key not in Manifest.open(root / "train").rows(0).keys
    found = Plan.open(root / ".ingest" / "000" / "inputs")
    left = [candidate.url for candidate in read_unit(found.unit(0), root / ".ingest" / "000" / "inputs")]
    assert left == [urls[0], None, urls[2], urls[3]]
    assert not holds(root, b"id=1")
    assert (root / ".ingest" / "000" / "inputs" / "urls-00000.parquet").stat().st_mode & 0o777 == 0o600
    (root / ".ingest" / "000" / "inputs" / "urls-00000.parquet").unlink()
    with pytest.raises(Exception, match="name the locator instead"):
        take_down(root, Wanted(addresses=[urls[2]]), "asked")
    locator = next(row["locator"] for table in rows_of(root, 0) for row in table.to_pylist() if row["input"] == 2)
    assert take_down(root, Wanted(addresses=[locator]), "asked").removed == 1


def test_an_address_that_brought_nothing_is_not_asked_again(tmp_path: Path, made: Path) -> None:
    urls = [f"https://photos.example/{number}.jpg" for number in range(4)]
    root = published_by_hand(tmp_path / "crawl", urls, made, failed={1: "timed_out", 2: "near_duplicate"})
    report = take_down(root, Wanted(addresses=urls[1:3]), "asked", erase=True)
    assert (report.removed, report.erased, report.forgotten) == (0, 0, 2)
    assert "was never taken in (timed_out)" in report.notes[0]
    assert "looks like" in report.notes[1]
    assert outcomes(root) == {"kept": 2, "opted_out": 1, "near_duplicate": 1}
    assert generations(root)[0].about["outcomes"] == outcomes(root)
    assert not holds(root, b"photos.example/1.jpg")


def published_by_hand(root: Path, urls: list[str], made: Path, failed: dict[int, str] | None = None) -> Path:
    """What an ingest of a list of urls leaves, without a server that would have to be asked."""
    from gristmill.shards.ingest.candidate import Outcome
    from gristmill.shards.ingest.ledger import FIELDS
    from gristmill.shards.writer import write_manifest

    root.mkdir()
    (root.parent / "list.txt").write_text("\n".join(urls) + "\n")
    found = plan([str(root.parent / "list.txt")], root / ".ingest" / "000" / "inputs")
    candidates = list(read_unit(found.unit(0), root / ".ingest" / "000" / "inputs"))
    images = [path.read_bytes() for path in sorted((made / "source" / "a").iterdir())][: len(urls)]
    keys = [blake(data) for data in images]
    kept = [number for number in range(len(urls)) if number not in (failed or {})]
    (root / "train").mkdir()
    shard = tar(root / "train" / "000000.tar", [(f"{keys[number]}.png", images[number]) for number in kept])
    write_manifest(root / "train", [("000000.tar", shard.stat().st_size, sample_shard(shard).rows)])
    rows = []
    for number, candidate in enumerate(candidates):
        outcome = (failed or {}).get(number, str(Outcome.KEPT))
        row = {"input": number, "locator": candidate.locator, "outcome": outcome}
        if outcome != "timed_out":
            row |= {"key": keys[number], "meta": '{"caption":"x"}', "labels": ["a"]}
        if outcome == "near_duplicate":
            row |= {"duplicate_of": keys[0], "distance": 4}
        rows.append({name: row.get(name) for name in FIELDS.names})
    (root / "ledger" / "000").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=FIELDS), root / "ledger" / "000" / "00000.parquet")
    counts = {outcome: sum(row["outcome"] == outcome for row in rows) for outcome in {row["outcome"] for row in rows}}
    about = {"base": 0, "inputs": len(rows), "kind": "new", "outcomes": counts}
    (root / "ledger" / "000.json").write_text(json.dumps(about))
    return root


def test_what_cannot_be_written_anew_stays_removed(out: Path, tmp_path: Path, folder: Path) -> None:
    index_dataset([str(path) for path in sorted(folder.glob("*.tar"))], tmp_path / "index")
    manifest = Manifest.open(tmp_path / "index")
    with pytest.raises(RewriteError, match=r"lies outside of .* their bytes are still there"):
        take_down(tmp_path / "index", Wanted(keys=[manifest.rows(0).keys[0]]), "asked", erase=True)
    assert Tombstones.of(manifest).count == 1
    whole = Manifest.open(out / "train")
    os.truncate(whole.path(0), 3000)
    with pytest.raises(RewriteError, match=r"cannot be written anew .*cut short.* --repair"):
        take_down(out / "train", Wanted(keys=[whole.rows(0).keys[0]]), "asked", erase=True)
    assert Tombstones.of(whole).count == 1
    (out / ".ingest" / "001").mkdir()
    (out / ".ingest" / "001" / "request").write_text("{}")
    with pytest.raises(TakedownError, match="is not finished"):
        take_down(out, Wanted(), "asked", erase=True)


def test_other_names_of_a_shard_are_said(out: Path) -> None:
    manifest = Manifest.open(out / "train")
    os.link(manifest.path(0), out / "elsewhere")
    report = take_down(out / "train", Wanted(keys=[manifest.rows(0).keys[0]]), "asked", erase=True)
    assert any("hard links" in note for note in report.notes)
