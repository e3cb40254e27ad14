"""What a run folder says of itself, and what it must not say: no secret of a url, a command or the environment is in any file."""

import json
from pathlib import Path

import pytest
import yaml
from gristmill.ops.about import CONTENTS
from gristmill.ops.bench.endings import TINY, tiny_data
from gristmill.ops.recipe import RECIPES, load_recipe
from gristmill.ops.redacted import bare, command_line, without_secrets

from ..command import Command
from ..faulty_http import FaultyServer
from ..workers import Workers

SECRETS = ("hunter2", "5ca1ab1e", "0123456789abcdef0123456789abcdef01234567", "AKIAIOSFODNN7")
START = """
os.environ.update(WANDB_API_KEY=secrets[2], AWS_ACCESS_KEY_ID=secrets[3], AWS_SECRET_ACCESS_KEY=secrets[0])
import sys
sys.argv = ["/somewhere/bin/gristmill", *arguments]
main(prog_name="gristmill")
"""


@pytest.fixture(scope="module")
def folder(workers: Workers, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two starts of a run whose data come with a password and a presigned query, with trackers, probes and metrics."""
    root = tmp_path_factory.mktemp("about")
    train = tiny_data(root)
    query = f"X-Amz-Credential={SECRETS[3]}&X-Amz-Signature={SECRETS[1]}"
    files = {f"/set/{path.relative_to(train)}": path.read_bytes() for path in train.rglob("*") if path.is_file()}
    with FaultyServer(files) as server:
        place = server.url("/set").replace("://", f"://me:{SECRETS[0]}@") + f"?{query}"
        given = ["train", "demo", "--out", root / "run", *TINY, f"data={place}", "images=64", "metrics.port=0"]
        given += ["checkpoint.every=16", "probes.at=[1]", "probes.names=[knn]", "log.tensorboard=true"]
        given += [
            "log.wandb={project: mills, mode: offline}",
            f"stream.cache={{folder: {root / 'cache'}, bytes: 9000000}}",
        ]
        for images in (32, 64):
            start = workers.start(START, arguments=[*map(str, given), f"probes.every={images}"], secrets=SECRETS)
            assert start.join() == 0, start.output()
            for secret in SECRETS:
                assert secret not in start.output()
        assert any("authorization" in asked.headers for asked in server.log), "they were used"
    return root / "run"


def test_no_file_holds_a_secret(folder: Path):
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {"recipe.yaml", "starts.jsonl", "metrics.jsonl", "state.json", "README.md"} <= {path.name for path in files}
    assert any("wandb" in str(path) for path in files)
    for path in files:
        text = path.read_bytes()
        for secret in SECRETS:
            assert secret.encode() not in text, f"{path} holds {secret}"


def test_the_recipe_still_says_where(folder: Path):
    kept = yaml.safe_load((folder / "recipe.yaml").read_text())
    assert kept["data"].startswith("http://127.0.0.1:")
    assert kept["data"].endswith("/set")
    load_recipe(folder / "recipe.yaml")


def test_a_line_for_each_start(folder: Path):
    lines = [json.loads(line) for line in (folder / "starts.jsonl").read_text().splitlines()]
    assert [line["position"] for line in lines] == [0, 64]
    first = lines[0]
    assert first["command"][:3] == ["gristmill", "train", "demo"]
    assert first["directory"] == str(Path.cwd())
    assert first["topology"]["world"] == 1
    assert first["data"][0]["images"] > 0
    cursor = json.loads((folder / "checkpoints" / "000000000064" / "state.json").read_text())["state"]["cursor"]
    assert first["data_digest"] == json.loads(cursor)["data"]
    assert {"gristmill", "torch", "deepspeed"} <= first["versions"].keys()
    assert {"host", "system", "python", "launcher", "devices", "commit", "time"} <= first.keys()


def test_the_page_says_what_it_is_and_how_to_go_on(folder: Path):
    page = (folder / "README.md").read_text()
    first = json.loads((folder / "starts.jsonl").read_text().splitlines()[0])
    for word in ("instance, local_group, group", "on 64 images", first["data_digest"], "gristmill train demo --out"):
        assert word in page
    known = {name.strip().rstrip("/") for names in CONTENTS for name in names.split(",")}
    there = {path.name for path in folder.iterdir()} - {".lock"}
    assert there <= known, there - known


def test_a_page_that_somebody_wrote_stays(workers: Workers, tmp_path: Path):
    data = tiny_data(tmp_path)
    run = tmp_path / "run"
    run.mkdir()
    (run / "README.md").write_text("mine")
    code, _, err = Command(
        tmp_path, ("train", "demo", "--out", run, *TINY, f"data={data}", "images=8"), workers
    ).finish()
    assert code == 0, err
    assert (run / "README.md").read_text() == "mine"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("s3://key:secret@bucket/set", "s3://bucket/set"),
        ("s3://b/set?endpoint_override=h:1&scheme=http&access_key=1", "s3://b/set?endpoint_override=h:1&scheme=http"),
        ("https://me:pass@host/set", "https://host/set"),
        ("https:/me:pass@host/set", "https:/host/set"),  # as a path has it
        ("https://host/set?X-Amz-Signature=abc&X-Amz-Date=1", "https://host/set"),
        ("s3://b/set?endpoint_override=http://me:pass@host", "s3://..."),
        ("/plain/path", "/plain/path"),
        ("cannot read https://me:pass@host/set: 404", "cannot read https://host/set: 404"),
        ("{path: s3://k:s@b/set, weight: 1}", "{path: s3://b/set, weight: 1}"),
    ],
)
def test_urls(text: str, shown: str):
    assert bare(text) == shown


def test_values_under_a_telling_name():
    tree = {"engine": {"comet": {"api_key": "abc", "samples": 3}}, "tokens": 5, "data": ["s3://k:s@b"]}
    shown = {"engine": {"comet": {"api_key": "...", "samples": 3}}, "tokens": 5, "data": ["s3://b"]}
    assert without_secrets(tree) == shown
    assert command_line(["engine.comet.api_key=abc", "a=https://u:p@h/x"]) == [
        "engine.comet.api_key=...",
        "a=https://h/x",
    ]


@pytest.mark.parametrize("name", sorted(path.stem for path in RECIPES.glob("*.yaml")))
def test_shipped_recipes_lose_nothing(name: str):
    tree = load_recipe(name).model_dump(mode="json")
    assert without_secrets(tree) == tree
