"""ruff and pyright are clean (DESIGN 7)."""

import subprocess
import sys
from pathlib import Path

import pytest

from .typing_check import TYPING

ROOT = Path(__file__).parent.parent
TOOLS = Path(sys.executable).parent


def run(*command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([TOOLS / str(command[0]), *map(str, command[1:])], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]])
def test_ruff(command: list[str]):
    answer = run("ruff", *command)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert "No source files" not in answer.stdout + answer.stderr


def test_pyright(pytestconfig: pytest.Config):
    code, said = pytestconfig.stash[TYPING].answer()
    assert code == 0, said
    assert "No source files" not in said
