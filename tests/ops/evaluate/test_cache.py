"""Features are computed once, kept whole or not at all, and the same bits whoever computed them."""

import errno
import json
from pathlib import Path

import pytest
import torch
from gristmill.ops.evaluate import cache
from gristmill.ops.evaluate.cache import CacheError, features_of
from gristmill.ops.evaluate.pictures import open_pictures
from gristmill.ops.evaluate.subject import open_subject
from gristmill.shards.storage import Draft
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from ...workers import Workers
from .sets import folders

SUBJECT = "timm:vit_tiny_patch16_224"
RANK = """
    import faulthandler, os
    from gristmill.ops.evaluate.cache import features_of
    from gristmill.ops.evaluate.pictures import open_pictures
    from gristmill.ops.evaluate.subject import open_subject
    faulthandler.dump_traceback_later(120, exit=True)
    os.environ.update(ours)
    kept = features_of(open_subject(subject, size=32), open_pictures(where), folder, blocks=2)
    assert len(kept.rows) == 149
"""


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory):
    root = folders(tmp_path_factory.mktemp("pictures") / "set", each=50)
    (root / "blue" / "07.jpg").write_bytes(b"\xff\xd8\xff broken")
    return open_pictures(root)


@pytest.fixture(scope="module")
def subject():
    return open_subject(SUBJECT, size=32)


@pytest.fixture(scope="module")
def wanted(subject, pictures):
    return features_of(subject, pictures, blocks=2)


def same(one, other) -> bool:
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in ("rows", "classes", "means"))


def test_features_are_the_subject_s(subject, pictures, wanted):
    assert wanted.classes.shape == wanted.means.shape == (149, 2, 192)
    assert set(range(150)) - set(wanted.rows.tolist()) == {57} == set(wanted.damaged)
    rows, images = next(pictures.batches(32, cache.BATCH))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        seen = subject.blocks(images, 2)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(wanted.rows[: len(rows)], rows)
    assert torch.equal(wanted.classes[: len(rows)], torch.stack([first for first, _ in seen], 1))
    assert torch.equal(wanted.features, wanted.classes[:, -1])


@pytest.mark.parametrize("processes", [1, 3])  # 2 are ranks, below
def test_any_number_of_processes_gives_the_same_bits(processes, subject, pictures, wanted, tmp_path: Path):
    assert same(features_of(subject, pictures, tmp_path, blocks=2, processes=processes), wanted)
    assert len(list(tmp_path.iterdir())) == 1  # parts are gone


def test_ranks_of_torchrun_give_the_same_bits(pictures, wanted, tmp_path: Path, workers: Workers):
    """Forks with the environment of torchrun's ranks, whose launcher keeps the store; torchrun itself: test_endings.py."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    group = {
        "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "GLOO_SOCKET_IFNAME": "lo",
        "TORCHELASTIC_USE_AGENT_STORE": "True", "LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    values = {"subject": SUBJECT, "where": pictures.where, "folder": str(tmp_path / "kept")}
    ranks = [workers.start(RANK, ours=group | {"RANK": str(n), "LOCAL_RANK": str(n)}, **values) for n in (0, 1)]
    codes = [rank.join() for rank in ranks]
    assert codes == [0, 0], [rank.output() for rank in ranks]
    (file,) = (tmp_path / "kept").iterdir()
    subject = open_subject(SUBJECT, size=32)
    found = cache.read_features(file, cache._about(subject, pictures, 2))
    assert found is not None
    assert same(found, wanted)


def test_what_is_kept_is_read_and_not_computed_again(subject, pictures, wanted, tmp_path: Path, monkeypatch):
    features_of(subject, pictures, tmp_path, blocks=2)
    monkeypatch.setattr(cache, "_compute", None)
    kept = features_of(subject, pictures, tmp_path, blocks=2)
    assert same(kept, wanted)
    assert kept.damaged == wanted.damaged


def test_a_damaged_file_is_made_again(subject, pictures, wanted, tmp_path: Path):
    features_of(subject, pictures, tmp_path, blocks=2)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    for spoiled in (whole[:-7], whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:], b""):
        file.write_bytes(spoiled)
        assert same(features_of(subject, pictures, tmp_path, blocks=2), wanted)
        assert file.read_bytes() == whole


def test_other_weights_pictures_or_blocks_have_files_of_their_own(subject, pictures, tmp_path: Path):
    for who in (subject, open_subject(SUBJECT, size=32, seed=1)):
        for what in (pictures, pictures.take(range(5))):
            for blocks in (1, 2):
                features_of(who, what, tmp_path, blocks=blocks)
    assert len(list(tmp_path.iterdir())) == 8
    assert len({json.dumps(cache._about(subject, pictures, n)) for n in (1, 2)}) == 2


def test_a_full_disk_leaves_nothing(subject, pictures, wanted, tmp_path: Path, monkeypatch):
    def full(self: Draft) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Draft, "finish", full)
        with pytest.raises(OSError, match="No space"):
            features_of(subject, pictures, tmp_path, blocks=2)
    assert not list(tmp_path.iterdir())
    (tmp_path / "x.safetensors.partial").write_bytes(b"what a kill leaves")
    assert same(features_of(subject, pictures, tmp_path, blocks=2), wanted)


def test_a_worker_that_dies_is_an_error_and_leaves_nothing(subject, pictures, tmp_path: Path):
    broken = pictures.take(range(150))
    broken.spots[3] = broken.spots[3].__class__(str(tmp_path / "gone.jpg"))
    broken.identity = "another"
    with pytest.raises(CacheError, match="part 0 ended with 1"):
        features_of(subject, broken, tmp_path / "kept", processes=2)
    assert not list((tmp_path / "kept").iterdir())


def test_parts_want_a_folder_and_pictures_that_decode(subject, pictures, tmp_path: Path):
    with pytest.raises(CacheError, match="--cache"):
        features_of(subject, pictures, processes=2)
    with pytest.raises(CacheError, match="none of the 1 pictures"):
        features_of(subject, pictures.take([57]), tmp_path)
