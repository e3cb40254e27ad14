"""Every image's embedding in the order of its number: what it is held to, and what leaves a row of zeros."""

import io
import shutil
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gristmill.ops import refresh
from gristmill.ops.bench.endings import tiny_data
from gristmill.ops.launch import join
from gristmill.ops.recipe import RecipeError, load_recipe
from gristmill.ops.refresh import BORDER, embed_all
from gristmill.ops.run import Run
from gristmill.shards.manifest import Manifest
from gristmill.shards.tombstones import Tombstones
from PIL import Image
from torch import Tensor

SMALL = [
    "batch=8", "images=64", "threads=1", "metrics.port=off", "probes.at=[]", "probes.size=16", "watchdog=0",
    "student.image_size=16", "student.patch_size=8", "student.embed_dim=32", "student.depth=1", "student.heads=2",
    "views.global.size=16", "views.local.size=8", "stream.take_up=never",
    "objectives={hierarchy: {levels: [24, 12, 6], queue: 64, iterations: 3, attempts: 1, exclusion_batch: 4}}",
    "student.projections={hierarchy: {layers: 2, hidden: 32, out: 16}}",
]  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def begin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    rank, world, device = join()
    runs: list[Run] = []

    def start(data: object, *more: str) -> Run:
        run = Run(
            load_recipe("demo", [f"data={data}", *SMALL, *more]), tmp_path_factory.mktemp("run"), rank, world, device
        )
        run.restore()
        runs.append(run)
        return run

    yield start
    for run in runs:
        run.close()


@pytest.fixture(scope="module")
def run(begin: Any, made: Path) -> Run:
    return begin(made)


@pytest.fixture(scope="module")
def rows(run: Run) -> Tensor:
    return embed_all(run, "hierarchy")


def by_hand(run: Run, data: Path) -> Tensor:
    """From the tars by Pillow: resized in proportion, the middle cut out, through backbone and head."""
    manifest, pictures = Manifest.open(data), []
    for shard in range(len(manifest.counts)):
        with tarfile.open(manifest.path(shard)) as tar:
            for key in manifest.rows(shard).keys:
                member = next(m for m in tar.getmembers() if Path(m.name).stem == key and not m.name.endswith(".json"))
                body = tar.extractfile(member)
                assert body is not None
                picture = Image.open(io.BytesIO(body.read())).convert("RGB")
                wide = round(16 * BORDER)
                scale = wide / min(picture.size)
                picture = picture.resize(
                    (round(picture.width * scale), round(picture.height * scale)), Image.Resampling.BILINEAR
                )
                left, upper = (picture.width - 16) // 2, (picture.height - 16) // 2
                pictures.append(np.asarray(picture.crop((left, upper, left + 16, upper + 16)), np.float32) / 255)
    images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    network: Any = run.engine.teacher.module
    with torch.no_grad():
        token = network.backbone((images - mean[:, None, None]) / deviation[:, None, None])[:, 0]
        return F.normalize(network.heads["hierarchy"].projector(network.backbone.norm(token)), dim=1)


def test_rows_are_those_of_the_images_by_hand(run: Run, rows: Tensor, made: Path) -> None:
    wanted = by_hand(run, made)
    assert rows.shape == wanted.shape == (run.feed.images, 16)
    cosine = (rows * wanted).sum(1)
    assert cosine.min() > 0.99
    assert (rows @ wanted.T).argmax(1).eq(torch.arange(len(rows))).float().mean() > 0.9


def test_the_teacher_is_left_as_it_was(run: Run, rows: Tensor) -> None:
    network = run.engine.teacher.module
    for training in (True, False):
        network.train(training)
        assert torch.equal(embed_all(run, "hierarchy"), rows)
        assert network.training == training


@pytest.mark.parametrize("world", [2, 3, 7])
def test_ranks_share_whole_batches_and_get_the_same_bits(run: Run, monkeypatch: pytest.MonkeyPatch, world: int) -> None:
    whole = embed_all(run, "hierarchy", batch=64)
    parts: list[list[Tensor]] = []

    def remember(tensor: Tensor) -> Tensor:
        parts[-1].append(tensor)
        return tensor

    monkeypatch.setattr(refresh, "gather", remember)
    for rank in range(world):
        parts.append([])
        monkeypatch.setattr(run, "rank", rank)
        monkeypatch.setattr(run, "world", world)
        embed_all(run, "hierarchy", batch=64)
    assert len({part[0].shape for part in parts}) == 1
    joined = [torch.cat([part[i] for part in parts]) for i in range(2)]
    given = iter(joined)
    monkeypatch.setattr(refresh, "gather", lambda _: next(given))
    assert torch.equal(embed_all(run, "hierarchy", batch=64), whole)


def test_damaged_and_removed_images_leave_zeros_and_the_rest_as_it_is(
    begin: Any, made: Path, rows: Tensor, tmp_path: Path
) -> None:
    shutil.copytree(made, tmp_path / "data")
    manifest = Manifest.open(tmp_path / "data")
    bad = [3, 40, 41]
    for number in bad:
        shard, row = divmod(number, 32)
        offset, length = int(manifest.rows(shard).offset[row]), int(manifest.rows(shard).length[row])
        with manifest.path(shard).open("r+b") as file:
            file.seek(offset)
            file.write(bytes(length))
    Tombstones.of(manifest).remove(manifest, [manifest.rows(2).keys[5]], "asked for")
    bad.append(69)
    run = begin(tmp_path / "data")
    found = embed_all(run, "hierarchy")
    assert (found == 0).all(1).nonzero().flatten().tolist() == bad
    good = torch.ones(len(rows), dtype=torch.bool)
    good[bad] = False
    torch.testing.assert_close(found[good], rows[good], rtol=1e-4, atol=1e-5)
    assert run.quarantine.count == 0  # a pass decides nothing about the run's own stream


def test_what_is_filtered_out_is_not_read(begin: Any, made: Path, rows: Tensor) -> None:
    manifest = Manifest.open(made)
    lengths = np.concatenate([manifest.rows(shard).length for shard in range(len(manifest.counts))])
    limit = int(np.median(lengths))
    run = begin(f"[{{path: {made}, where: 'length > {limit}'}}]")
    found = embed_all(run, "hierarchy")
    kept = torch.from_numpy(lengths > limit)
    assert torch.equal((found != 0).any(1), kept)
    torch.testing.assert_close(found[kept], rows[kept], rtol=1e-4, atol=1e-5)


def test_a_run_is_refreshed_and_the_table_filled(run: Run, rows: Tensor) -> None:
    objective: Any = run.mixture.objectives["hierarchy"]
    info = replace(run.info(), progress=0.5)
    assert objective.stale(info)
    objective.refresh(rows, info)
    assert objective.table.min() >= 0
    assert len(objective.table.unique()) > 12


def test_an_objective_without_a_head_is_named(run: Run) -> None:
    with pytest.raises(RecipeError, match="no head instance"):
        embed_all(run, "instance")


def test_looking_whether_there_is_something_to_do_draws_nothing(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks of a batch take a good part of a second, and it is looked twice a step."""
    monkeypatch.setattr(run.inputs, "masks", lambda *_: pytest.fail("masks were drawn for no step"))
    assert run.refit() == {}
    assert not run.refresh()


def test_a_rank_without_images_knows_the_width_of_its_rows(
    begin: Any, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = begin(made, "precision=bf16")
    monkeypatch.setattr(refresh, "gather", lambda rows: rows)
    monkeypatch.setattr(run, "rank", 6)
    monkeypatch.setattr(run, "world", 7)
    rows = embed_all(run, "hierarchy", batch=64)
    assert rows.shape == (run.feed.images, 16)
    assert rows.dtype == torch.float32
    assert not rows.any()
