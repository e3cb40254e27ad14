"""ruff and pyright are clean (DESIGN 7)."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TOOLS = Path(sys.executable).parent


def run(*command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([TOOLS / str(command[0]), *map(str, command[1:])], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]])
def test_ruff(command: list[str]):
    answer = run("ruff", *command)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert "No source files" not in answer.stdout + answer.stderr


def test_pyright(tmp_path: Path):
    """An editable install maps `gristmill` by a finder that pyright cannot run, so it is shown a folder instead."""
    (tmp_path / "typing").mkdir()
    (tmp_path / "typing" / "gristmill").symlink_to(ROOT)
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pyright"]
    settings["include"] = [f"typing/gristmill/{folder}" for folder in settings["include"]]
    settings["extraPaths"] = ["typing"]
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    answer = run("pyright", "--project", tmp_path, "--pythonpath", sys.executable, "--level", "error", "--stats")
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert "No source files" not in answer.stdout + answer.stderr
