"""The data side of a run: what a recipe may name as data, one stream on all ranks, the cache's working set."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from gristmill.ops.feed import Feed
from gristmill.ops.recipe import RecipeError, dump_recipe, load_recipe
from gristmill.pipeline.cursor import CursorError
from gristmill.pipeline.quality import WorkingSetError
from gristmill.shards.demo import make_demo_images
from gristmill.shards.ingest import ingest_folder
from gristmill.shards.manifest import Manifest
from gristmill.shards.tombstones import Tombstones

from ..faulty_http import FaultyServer


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("made")
    make_demo_images(root / "images", images=400, size=32)
    ingest_folder(root / "images", root / "few", shard_samples=100)
    make_demo_images(root / "more", images=400, size=32, seed=1)
    ingest_folder(root / "more", root / "other", shard_samples=100)
    return root


@pytest.fixture
def data(made, tmp_path):
    shutil.copytree(made / "few" / "train", tmp_path / "data")
    return tmp_path / "data"


def recipe(data, *overrides):
    return load_recipe("demo", [f"data={data}", *overrides], tiny=True)


def alone(texts):
    return texts


def test_data_may_be_a_path_a_url_or_a_list(data, made, tmp_path):
    plain = recipe(data)
    assert plain.data == data
    assert [(source.path, source.weight, source.where) for source in plain.sources] == [(data, 1.0, "")]
    url = recipe("s3://bucket/train?region=eu")
    assert url.sources[0].path == "s3://bucket/train?region=eu"
    several = recipe(f"[{{path: {data}, weight: 3}}, {{path: 'https://host/set', where: 'width > 9'}}]")
    assert [source.path for source in several.sources] == [data, "https://host/set"]
    for some in (plain, url, several):
        path = tmp_path / "again.yaml"
        path.write_text(dump_recipe(some))
        assert load_recipe(path).data == some.data


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("[{path: a, weigth: 3}]", r"data\.0\.weigth: unknown key; did you mean 'weight'"),
        ("[{path: a, weight: -1}]", r"data\.0\.weight: .*greater than or equal to 0"),
        ("[{weight: 1}]", r"data\.0\.path: it has to be given"),
        ("[{path: 7}]", r"data\.0\.path: "),
    ],
)
def test_what_is_no_data_is_said_by_name(value, said):
    with pytest.raises(RecipeError, match=said):
        recipe(value)


def test_a_resumed_run_goes_on_in_the_same_stream(data):
    first = Feed(recipe(data), 0, 1)
    cursor = first.begin(None, alone).advance(96, committed=True)
    second = Feed(recipe(data), 0, 1)
    assert second.begin(cursor, alone) == cursor
    assert first.stream is not None
    assert second.stream is not None
    assert (first.stream.locate(range(96, 200))[1] == second.stream.locate(range(96, 200))[1]).all()
    with pytest.raises(CursorError, match="seed"):
        Feed(recipe(data, "stream.seed=5"), 0, 1).begin(cursor, alone)


def exchange(world, told):
    """What `Run.everyones` does, for ranks that begin one after the other: rank 0's text is what counts."""

    def everyones(texts):
        told.setdefault("first", texts[0])
        return [told["first"]] * world

    return everyones


def test_rank_0_decides_when_data_changed_between_two_openings(data):
    """Rank 0 opened before a removal, rank 1 after it: both go on with what rank 0 saw."""
    told = {}
    feeds = [Feed(recipe(data, "batch=32"), 0, 2)]
    manifest = Manifest.open(data)
    Tombstones.of(manifest).remove(manifest, [manifest.rows(0).keys[0]], "asked for")
    feeds.append(Feed(recipe(data, "batch=32"), 1, 2))
    cursors = [feed.begin(None, exchange(2, told)) for feed in feeds]
    assert cursors[0].grown == cursors[1].grown
    assert cursors[0].removed == ()


def test_what_rank_0_refuses_all_ranks_refuse(data):
    told = {}
    wrong = Feed(recipe(data), 0, 2).begin(None, alone).advance(64, committed=True)
    feeds = [Feed(recipe(data, "stream.lanes=7"), rank, 2) for rank in range(2)]
    with pytest.raises(CursorError, match="lanes"):
        feeds[0].begin(wrong, exchange(2, told))
    with pytest.raises(RecipeError, match="lanes"):
        feeds[1].begin(None, exchange(2, told))


def test_too_few_images_are_said(data):
    least = int(np.sort(Manifest.open(data).rows(0).length)[2])
    with pytest.raises(RecipeError, match=r"batch: 32 is more than the .* images of"):
        Feed(recipe(f"[{{path: {data}, where: 'length < {least}'}}]", "batch=32"), 0, 1)


def test_a_cache_that_cannot_hold_the_working_set_is_refused(data, tmp_path):
    total = Manifest.open(data).bytes
    with FaultyServer() as server:
        for path in sorted(data.rglob("*")):
            if path.is_file():
                server.put(f"/set/{path.relative_to(data)}", path.read_bytes())
        url = server.url("/set")

        def cache(size):
            return f"stream.cache={{folder: {tmp_path / 'cache'}, bytes: {size}}}"

        with pytest.raises(WorkingSetError, match=r"keeps \d+ shards open at once on a node .* cache may hold"):
            Feed(recipe(url, cache(total // 2)), 0, 1).begin(None, alone)
        Feed(recipe(url, cache(total + 10_000)), 0, 1).begin(None, alone)
        both = f"[{{path: '{url}'}}, {{path: '{url}/'}}]"
        with pytest.raises(WorkingSetError, match="data sets together keep"):
            Feed(recipe(both, cache(total + 10_000)), 0, 1).begin(None, alone)
    Feed(recipe(data, cache(1)), 0, 1).begin(None, alone)  # local shards need no cache


def test_going_back_keeps_what_was_decided_about_the_data(data):
    feed = Feed(recipe(data), 0, 1)
    start = feed.begin(None, alone)
    then = start.advance(32, committed=True)
    now = then.advance(32, committed=True)
    grown = feed.go_back(now, then)
    assert (grown.position, grown.trained) == (32, 32)
    assert grown.grown == now.grown


def test_the_lanes_of_a_node(data, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    lanes = [Feed(recipe(data, "batch=64", "stream.lanes=64"), rank, 8)._lanes() for rank in range(8)]
    seen = [each.tolist() for each in lanes if each is not None]
    assert len(seen) == 8
    assert seen[0] == seen[1] == list(range(16))
    assert sorted({lane for lanes in seen for lane in lanes}) == list(range(64))
    assert Feed(recipe(data, "batch=64", "stream.lanes=64"), 0, 2)._lanes() is None


def test_commands_for_a_living_data_set(data, tmp_path):
    from click.testing import CliRunner
    from gristmill.ops.cli import main

    key = Manifest.open(data).rows(0).keys[1]
    run = CliRunner().invoke
    answer = run(main, ["remove", str(data), key, "--reason", "asked for", "--json"])
    assert answer.exit_code == 0, answer.output
    assert answer.output.strip() == '{"removed": 1, "total": 1}'
    assert run(main, ["remove", str(data), "nothing", "--reason", "x"]).exit_code == 2
    assert run(main, ["remove", str(data), "--reason", "x"]).exit_code == 2
    assert Tombstones(data / "tombstones.jsonl").count == 1
    answer = run(main, ["order", str(data), "--prove", "--where", "width >= 1"])
    assert answer.exit_code == 0, answer.output
    assert "0 never, 0 more than once" in answer.output
    shards = tmp_path / "shards"
    shards.mkdir()
    for path in sorted(data.glob("*.tar")):
        shutil.copy(path, shards)
    answer = run(main, ["index", str(shards), "--json"])
    assert answer.exit_code == 0, answer.output
    assert Manifest.open(Path(shards)).samples == Manifest.open(data).samples
