"""Files that a checkpoint of many ranks would have, held to those that two real ranks write under every ZeRO stage."""

import json
from pathlib import Path
from typing import Any

import pytest
from gristmill.ops.bench import scale_checkpoints as bench
from gristmill.ops.checkpoint import Content, Image, Saved, compose, lay_out
from gristmill.ops.recipe import load_recipe
from gristmill.ops.stores import LocalStore
from gristmill.ops.writer import _named

from ..distributed.zygote import Zygote
from ..workers import Workers

WORLD = 2
CASES = [(0, "fp32"), (1, "fp32"), (1, "bf16"), (2, "fp32"), (3, "fp32")]
RANK = """
import os, sys
sys.argv = ["scale"]
os.environ.update(environment)
import torch, torch.distributed as dist
import engine_cases
from gristmill.ops.checkpoint import Content
from gristmill.ops.engine import Engine
from gristmill.ops.launch import join, leave
from gristmill.ops.stores import LocalStore
from gristmill.ops.writer import Writer
from pathlib import Path
torch.set_num_threads(1)
rank, world, _ = join()

def total(values):
    vector = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(vector)
    return vector.tolist()

for stage, precision in cases:
    engine = Engine(*engine_cases.networks(), engine_cases.recipe_of(stage, precision), rank, world)
    engine.set_rates(0.5, 0.1)
    engine.backward(engine_cases.loss_of(engine([engine_cases.data(0)[rank::world]], {})))
    squares = engine.squares()
    if not engine.segments.replicated:
        dist.all_reduce(squares)
    assert engine.step(squares.sqrt())
    writer = Writer(LocalStore(Path(folder) / f"{stage}{precision}"), rank, world, keep=1)
    total([0.0])
    writer.begin(7, Content(list(engine.parts()), {"steps": engine.steps()} if rank == 0 else {}, {}))
    writer.finish(total)
    engine.close()
leave()
"""


@pytest.fixture(scope="module")
def written(workers: Workers, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One real step of the toy network of tests/distributed on two ranks, and a checkpoint of each stage."""
    folder = tmp_path_factory.mktemp("written")
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment = {
        "WORLD_SIZE": str(WORLD), "LOCAL_WORLD_SIZE": str(WORLD), "GROUP_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0",
        "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo",
    }  # fmt: skip
    own = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} | environment for rank in range(WORLD)]
    zygote = Zygote(workers)
    ranks = [zygote.start(RANK, environment=each, cases=CASES, folder=str(folder)) for each in own]
    for rank in ranks:
        rank.join()
    assert [rank.poll() for rank in ranks] == [0] * WORLD, [rank.output() for rank in ranks]
    return folder


def toy(stage: int, precision: str) -> bench.Hollow:
    from ..distributed import engine_cases

    student, _ = engine_cases.networks()
    groups = bench.parameter_groups(student, engine_cases.recipe_of(stage, precision).optimizer)
    names = {id(p): name for name, p in student.named_parameters()}
    return bench.Hollow(student, groups, names, {n: p.shape for n, p in student.named_parameters()}, 0)


def laid_out(hollow: bench.Hollow, stage: int, rank: int) -> tuple[Image, list[list[Any]]]:
    content = list(bench.parts(hollow, stage, rank, WORLD))
    return lay_out(_named(Content(content))), bench.note(content, rank)["index"]


@pytest.mark.parametrize(("stage", "precision"), CASES)
def test_files_are_those_that_real_ranks_write_byte_for_byte_of_their_headers(
    written: Path, stage: int, precision: str
):
    hollow, folder = toy(stage, precision), written / f"{stage}{precision}" / f"{7:012d}"
    index = []
    for rank in range(WORLD):
        image, rows = laid_out(hollow, stage, rank)
        file = (folder / f"rank-{rank:05d}.safetensors").read_bytes()
        assert file[: len(image.header)] == image.header
        assert len(file) == len(image.header) + image.body
        index += rows
    state = json.loads((folder / "state.json").read_text())
    assert sorted(state["index"]) == sorted(index)
    found = bench.measure(hollow, stage, WORLD)
    assert found["index_rows"] == len(index)
    assert found["bytes"] == sum(path.stat().st_size for path in folder.glob("rank-*"))
    assert Saved(LocalStore(folder.parent), 7).groups()


def test_a_layout_with_another_alignment_is_seen(written: Path, monkeypatch: pytest.MonkeyPatch):
    """The comparison above is worth something: shards that are longer by two numbers are other files."""
    hollow, plain = toy(2, "fp32"), bench._flat
    monkeypatch.setattr(bench, "_flat", lambda numbers: plain(numbers + 2))
    image, _ = laid_out(hollow, 2, 1)
    file = (written / "2fp32" / f"{7:012d}" / "rank-00001.safetensors").read_bytes()
    assert file[: len(image.header)] != image.header


@pytest.mark.parametrize("stage", [0, 1, 3])
@pytest.mark.parametrize("world", [8, 64, 1000])
def test_any_number_of_ranks_covers_everything_once(stage: int, world: int):
    hollow = toy(stage, "fp32")
    notes = [bench.note(list(bench.parts(hollow, stage, rank, world)), rank) for rank in range(world)]
    compose(0, notes, "{}")  # which refuses gaps and overlaps
    with pytest.raises(Exception, match="held by no rank"):
        compose(0, notes[:-1] if notes[-1]["index"] else notes[1:], "{}")


def test_the_bytes_of_a_large_recipe_are_its_weights_moments_and_average():
    recipe = load_recipe("multigrain-vits16")
    hollow = bench.Hollow.of(recipe)
    trained = sum(shape.numel() for shape in hollow.shapes.values())
    averaged = sum(p.numel() for group in hollow.groups if group["teacher"] for p in group["params"])
    body = 4 * (3 * trained + averaged)
    for stage in (0, 1, 3):
        files = [lay_out(_named(Content(list(bench.parts(hollow, stage, rank, 8))))) for rank in range(8)]
        assert sum(image.body for image in files) == body
    cost = {"compose_s": 1.0, "parse_s": 1.0}
    found = bench.measure(hollow, 3, 8)
    told = bench.times(found, recipe, bench.Assumed(), 8, cost, 0.5)
    assert found["files"] == 13
    assert told["interval_s"] == recipe.checkpoint.every / 400
    assert told["writing_s"] >= body / 2e9
    assert told["publishing_s"] == 0.5 + 8 * 0.001 + found["index_rows"] / 1e6
