"""Disks that are full for real: a small file system of their own, where this user may mount one."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def mounted(place: Path, size: str) -> Iterator[str]:
    """A tmpfs of `size` ("1m") at `place`, which is made; yields why it could not be mounted, or ""."""
    place.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        yield answer.stderr.strip() or "mount failed" if answer.returncode else ""
    finally:
        if answer.returncode == 0:
            subprocess.run(["umount", "--lazy", place], check=True)  # lazy: a failing test may hold a file open


@contextmanager
def small_disk(place: Path, size: str) -> Iterator[Path]:
    """As `mounted`; the test is skipped where that is not possible."""
    with mounted(place, size) as why:
        if why:
            pytest.skip(f"a small disk cannot be mounted here: {why}")
        yield place
