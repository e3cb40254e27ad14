"""The whole evaluation from the command line: columns, rows, reasons, files, and the same numbers twice."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from gristmill.ops.cli import main
from gristmill.ops.evaluate.battery import options_of
from gristmill.ops.evaluate.exam import Request, examine
from gristmill.ops.evaluate.finetune import FinetuneOptions
from gristmill.ops.evaluate.presets import FINETUNE, LINEAR, presets_of
from gristmill.ops.evaluate.results import shown
from gristmill.ops.evaluate_commands import parse_settings

from .sets import folders

VIT = "timm:vit_tiny_patch16_224"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("exam")
    folders(root / "set" / "train", each=12)
    folders(root / "set" / "val", each=8, seed=1)
    return root


def ask(*words: object) -> tuple[int, str]:
    answer = CliRunner().invoke(main, ["eval", *map(str, words)], catch_exceptions=False)
    return answer.exit_code, answer.output


def asked(data: Path, *words: object) -> dict:
    code, text = ask(VIT, "--data", data / "set", "--size", 32, "--cache", data / "kept", "--json", *words)
    assert code == 0, text
    return json.loads(text.splitlines()[-1])


def test_a_network_of_random_weights_gives_the_same_table_twice(data: Path):
    results = [asked(data) for _ in range(2)]
    shutil.rmtree(data / "kept")
    results.append(asked(data))
    assert results[0]["probes"] == results[1]["probes"] == results[2]["probes"]
    assert asked(data, "--seed", 1)["subject"]["identity"] != results[0]["subject"]["identity"]


def test_the_table_has_who_and_what_and_says_what_was_left_out(data: Path):
    found = asked(data)
    assert list(found["probes"]) == ["chance", "pixels", "network"]
    assert found["data"]["reference"]["pictures"] == 36
    assert found["data"]["query"]["pictures"] == 24
    for name in ("knn_top1", "logistic_top1", "semi_10_top1", "retrieval_map", "retrieval_recall_1", "purity_class",
                 "clustering_nmi", "clustering_ari"):  # fmt: skip
        assert all(0.0 <= scores[name] <= 1.0 or name == "clustering_ari" for scores in found["probes"].values()), name
    # The pictures are of one colour a class: there is little to learn.
    assert found["probes"]["pixels"]["knn_top1"] == 1.0
    assert found["probes"]["chance"]["knn_top1"] == pytest.approx(1 / 3)
    assert {"rank_me", "uniformity", "alignment"} <= set(found["probes"]["network"])
    assert "segmentation" in found["skipped"]
    assert "linear" not in found["seconds"]
    assert found["settings"]["evaluators"]["knn"]["neighbour"] == 20
    assert set(found["seconds"]["knn"]) == {"pixels", "network"}


def test_people_get_a_table_and_machines_a_file(data: Path, tmp_path: Path):
    code, text = ask(
        VIT, "--data", data / "set" / "train", "--size", 32, "--cache", data / "kept", "--only", "knn", "--holdout", 0.25,
        "--out", tmp_path / "table.json",
    )  # fmt: skip
    assert code == 0
    assert "asked about: 9 pictures" in text
    assert "chosen by the queries themselves" in text
    written = json.loads((tmp_path / "table.json").read_text())
    row = next(line for line in text.splitlines() if line.strip().startswith("knn top1 "))
    assert shown("knn_top1", written["probes"]["network"]["knn_top1"]) in row


def test_settings_reach_their_evaluators(data: Path):
    found = asked(data, "--only", "linear", "--set", "linear.epochs=3", "--set", "linear.rates=[0.1]", "--set", "linear.blocks=2", "--no-baselines")  # fmt: skip
    assert list(found["probes"]) == ["network"]
    assert found["probes"]["network"]["linear_lr"] == 0.1
    assert found["settings"]["evaluators"]["linear"]["epochs"] == 3
    for words, said in (
        (["linear.epoch=3"], "epochs"),
        (["lineal.epochs=3"], "linear"),
        (["linear.epochs=few"], "valid integer"),
        (["linear"], "linear.epochs=20"),
        (["linear.preset=dino"], "dino_s"),
        (["knn.preset=dino_s"], "none for it"),
    ):
        code, text = ask(VIT, "--data", data / "set", *(f"--set={word}" for word in words))
        assert code == 2
        assert said in text


def test_a_papers_settings_are_a_start():
    given = parse_settings(("finetune.preset=vit_s", "finetune.epochs=3", "video.preset=mugs", "linear.preset=dino_b"))
    assert options_of(given, "finetune") == replace(FINETUNE["vit_s"], epochs=3)
    assert options_of(given, "video").frames == 20
    assert options_of(given, "linear") == LINEAR["dino_b"]
    assert options_of(given, "semi_finetune") == FinetuneOptions()
    assert set(presets_of("detection")) == {"mugs", "densecl"}


def test_unlabelled_pictures_are_asked_what_needs_no_labels(data: Path, tmp_path: Path):
    for path in sorted((data / "set").glob("train/*/0[0-5].jpg")):
        shutil.copy(path, tmp_path / f"{path.parent.name}-{path.name}")
    found = examine(Request(VIT, str(tmp_path), size=32, cache=tmp_path / "kept", quiet=True))
    assert found is not None
    assert "no labels" in found["skipped"]["knn"]
    assert set(found["probes"]["network"]) >= {"rank_me", "alignment"}
    code, text = ask(VIT, "--data", tmp_path, "--size", 32, "--only", "knn")
    assert code == 2
    assert "folders of classes" in text


def test_damaged_pictures_are_left_out_and_said(data: Path, tmp_path: Path):
    shutil.copytree(data / "set", tmp_path / "set")
    (tmp_path / "set" / "train" / "blue" / "03.jpg").write_bytes(b"\xff\xd8\xff no")
    code, text = ask(VIT, "--data", tmp_path / "set", "--size", 32, "--cache", tmp_path / "kept", "--only", "purity")
    assert code == 0
    assert "1 do not decode and were left out: blue/03.jpg" in text


def test_random_features_are_at_chance_for_pictures_of_noise(tmp_path: Path):
    draw = torch.Generator().manual_seed(0)
    from PIL import Image

    for part, each in (("train", 60), ("val", 40)):
        for kind in range(4):
            (tmp_path / "set" / part / str(kind)).mkdir(parents=True)
            for number in range(each):
                pixels = torch.randint(0, 256, (32, 32, 3), generator=draw, dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(tmp_path / "set" / part / str(kind) / f"{number:02d}.png")
    only = ("knn", "logistic", "semi", "retrieval", "purity", "clustering")
    found = examine(Request(VIT, str(tmp_path / "set"), size=32, cache=tmp_path / "kept", only=only, quiet=True))
    assert found is not None
    chance, network = found["probes"]["chance"], found["probes"]["network"]
    for name, value in chance.items():
        assert network[name] == pytest.approx(value, abs=5 * (0.25 * 0.75 / 160) ** 0.5), name
    assert {name.split("_")[0] for name in chance} == {"knn", "logistic", "semi", "retrieval", "purity", "clustering"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([VIT], "give --data"),
        (["timm:vit_tny"], "give --data"),
        (["nowhere.safetensors", "--data", "x"], "no such file"),
        ([VIT, "--data", "nowhere"], "no such folder"),
        ([VIT, "--only", "nkk"], "Invalid value for '--only'"),
    ],
)
def test_errors_name_the_remedy(words, said):
    code, text = ask(*words)
    assert code == 2
    assert said in text
