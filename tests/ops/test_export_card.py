"""Cards of exports: what they say is so, nothing secret is on them, and one that was edited stays."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from gristmill.ops.card import write_card
from gristmill.ops.export import ExportError, export_checkpoint
from huggingface_hub import ModelCard

from .test_export import call, checkpoint, recipe_of


def log(run: Path, *lines: dict[str, Any]) -> None:
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def probe(who: str, position: int, **values: float) -> dict[str, Any]:
    return {"kind": "probe", "who": who, "position": position, "seconds": 7.0, **values}


def exported(run: Path, out: Path, **more: Any) -> str:
    _, about = export_checkpoint(str(run), out, **more)
    return Path(about["gristmill.card"]).read_text()


def test_what_a_card_says(tmp_path: Path):
    run, out = tmp_path / "run", tmp_path / "x.safetensors"
    checkpoint(run, recipe_of(), 1)
    baselines = [probe("chance", 0, fine_knn=0.0125), probe("pixels", 0, fine_knn=0.125), probe("random", 0, fine_knn=0.25)]  # fmt: skip
    log(
        run,
        {"kind": "event", "event": "initial", "position": 0, "sha256": "abc123"},
        *baselines,
        probe("teacher", 32, fine_knn=0.375, linear_top1=0.5),
        probe("teacher", 64, fine_knn=0.4375, linear_top1=0.5625),
        probe("teacher", 96, fine_knn=0.999),  # later than the checkpoint
    )
    text = exported(run, out)
    read = ModelCard.load(out.with_name("x.safetensors.md"))
    assert (read.data.library_name, read.data.pipeline_tag) == ("timm", "image-feature-extraction")
    assert "gristmill" in (read.data.tags or [])
    assert read.data.license is None
    table = [line for line in text.splitlines() if line.startswith("| ")]
    assert table == [
        "| | fine knn | linear top1 |", "| --- | ---: | ---: |", "| chance | 0.0125 | – |", "| raw pixels | 0.125 | – |",
        "| untrained network | 0.25 | – |", "| **teacher after 64 images** | 0.4375 | 0.5625 |",
    ]  # fmt: skip
    for said in (
        "after 64 of ",
        "Checkpoint `run/checkpoints/000000000064`",
        "timm.create_model('vit_tiny_patch16_224', checkpoint_path='x.safetensors', ",
        "Images are RGB of 32 x 32 pixels",
        "sha256 `abc123`",
        "- detection\n",
        "## Licence",
    ):
        assert said in text, said
    assert "linear probe" not in text  # was measured
    assert "these weights are the student's" not in text
    recipe = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    assert recipe["student"]["embed_dim"] == 32
    assert "these weights are the student's" in exported(run, out, who="student")
    log(run, *baselines, probe("teacher", 32, fine_knn=0.375))
    assert "The last probe is 32 images older" in exported(run, out)
    log(run)
    assert "None up to this position." in exported(run, out)
    # Data of a real run are in its checkpoint.
    assert "identity (digest of the manifest): `not recorded`" in text


def test_nothing_secret(tmp_path: Path):
    secrets = ("hunter2", "sesame", "alice", "home")
    recipe = recipe_of(
        "data=https://alice:hunter2@images.example/train?token=sesame",
        "probes.query=/home/alice/probe",
        "stream.cache={folder: /home/alice/cache, bytes: 1000000}",
        "checkpoint.store=/home/alice/store",
        "engine.deepspeed={comms_logger: {enabled: false, api_key: sesame}}",
    )
    checkpoint(tmp_path / "run", recipe, 1)
    text = exported(tmp_path / "run" / "checkpoints" / "000000000064", tmp_path / "x.safetensors")
    assert not [secret for secret in secrets if secret in text]
    assert "https://images.example/train?..." in text
    recipe = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    assert (recipe["probes"]["query"], recipe["engine"]["deepspeed"]["comms_logger"]["api_key"]) == (".../probe", "...")


def test_a_card_alone_and_one_that_was_edited(tmp_path: Path):
    run, out = tmp_path / "run", tmp_path / "README.md"
    checkpoint(run, recipe_of(), 1)
    code, text = call("export", run, "--format", "card", "--out", out)
    assert (code, f"written: {out}" in text) == (0, True), text
    assert "checkpoint_path='FILE.safetensors'" in out.read_text()
    assert call("export", run, "--format", "card", "--out", out)[0] == 0  # over its own
    assert call("export", run, "--out", tmp_path / "x.safetensors")[0] == 0
    for card, arguments in (
        (out, ("--format", "card", "--out", out)),
        (tmp_path / "x.safetensors.md", ("--student", "--out", tmp_path / "x.safetensors")),
    ):
        edited = card.read_text().replace("Not stated.", "Apache-2.0.")
        card.write_text(edited)
        before = (tmp_path / "x.safetensors").read_bytes()
        code, text = call("export", run, *arguments)
        assert (code, "was edited" in text) == (2, True), text
        assert card.read_text() == edited
        assert (tmp_path / "x.safetensors").read_bytes() == before
    code, text = call("export", run, "--format", "card", "--out", tmp_path / "card.txt")
    assert (code, "let its name end in .md" in text) == (2, True), text
    with pytest.raises(ExportError, match="there is no folder"):
        write_card(tmp_path / "no" / "x.md", "")
