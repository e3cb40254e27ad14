"""pyright over the whole tree, started with the tests and asked for at their end: it takes a minute of another core.

Where several processes share the tests, it is started by the one that has its test, and only then.
An editable install maps `gristmill` by a finder that pyright cannot run, so it is shown a folder instead.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


class TypingCheck:
    """`start` once; `answer` waits."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def start(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="gristmill-pyright-")
        folder = Path(self._folder.name)
        (folder / "typing").mkdir()
        (folder / "typing" / "gristmill").symlink_to(ROOT)
        settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pyright"]
        settings["include"] = [f"typing/gristmill/{part}" for part in settings["include"]]
        settings["extraPaths"] = ["typing"]
        (folder / "pyrightconfig.json").write_text(json.dumps(settings))
        command = [Path(sys.executable).parent / "pyright", "--project", folder, "--pythonpath", sys.executable]
        how = {"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        self._process = subprocess.Popen([*map(str, command), "--level", "error", "--stats"], **how)

    def answer(self) -> tuple[int, str]:
        """Exit code and all that it said."""
        if self._process is None:
            self.start()
        assert self._process is not None
        said, _ = self._process.communicate()
        return self._process.returncode, said

    def close(self) -> None:
        """End it if nobody asked for its answer."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.communicate()
        if self._folder is not None:
            self._folder.cleanup()


TYPING = pytest.StashKey[TypingCheck]()  # where a session keeps it
