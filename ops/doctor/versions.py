"""Releases: Python, the packages that were tested together, and a compiler, which nothing needs."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import struct
import sys

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from .finding import Asked, Finding
from .tested import PYTHON, TESTED


def check_python(asked: Asked, version: tuple[int, int] = sys.version_info[:2]) -> Finding:
    """The interpreter, the C library and the system."""
    libc = " ".join(platform.libc_ver()) or "a C library that is not glibc"
    found = f"{platform.python_implementation()} {platform.python_version()}, {platform.system()} {platform.machine()}, {libc}"
    figures = {"version": platform.python_version(), "tested": ".".join(map(str, PYTHON)), "libc": libc}
    why = "packages come as machine code for one Python, one system and glibc"
    tested = ".".join(map(str, PYTHON))
    if version < PYTHON or sys.platform != "linux" or struct.calcsize("P") != 8:
        remedy = f"use Python {tested} on 64-bit Linux: `python{tested} -m venv env`, and install Gristmill there"
        return Finding("python", "bad", found, why, remedy, figures)
    if version > PYTHON:
        remedy = f"it may well work; what was tested is Python {tested}"
        return Finding("python", "warn", f"{found}; tested is {tested}", why, remedy, figures)
    return Finding("python", "ok", found, why, "", figures)


def check_packages(asked: Asked, installed: dict[str, str] | None = None) -> Finding:
    """What is installed against what Gristmill demands and what it was tested with. installed: in place of what is."""
    why = "other releases round, read and fail in other ways than those that were tested"
    here = {name: _installed(name) for name in TESTED} if installed is None else installed
    demands = _demands()
    missing = [name for name in TESTED if not here.get(name)]
    wrong, others = [], []
    for name, tested in TESTED.items():
        version = here.get(name)
        if not version or version == tested:
            continue
        demand = demands.get(canonicalize_name(name))
        if demand and not demand.specifier.contains(version, prereleases=True):
            wrong.append(f"{name} {version} ({demand.specifier} is needed)")
        else:
            others.append(f"{name} {version} (tested: {tested})")
    figures = {"installed": here, "tested": TESTED}
    repair = [*missing, *(text.split()[0] for text in wrong)]
    if repair:
        found = "; ".join([f"missing: {', '.join(missing)}"] * bool(missing) + wrong)
        remedy = "pip install " + " ".join(f'"{name}=={TESTED[name]}"' for name in repair)
        return Finding("packages", "bad", found, why, remedy, figures)
    older = [text for text in others if _older(text.split()[1], TESTED[text.split()[0]])]
    if older:
        remedy = "pip install " + " ".join(f'"{text.split()[0]}=={TESTED[text.split()[0]]}"' for text in older)
        return Finding("packages", "warn", f"older than tested: {', '.join(older)}", why, remedy, figures)
    rest = f", but for {', '.join(others[:4])}" + (f" and {len(others) - 4} more" if len(others) > 4 else "")
    return Finding("packages", "ok", f"all {len(TESTED)} as tested{rest if others else ''}", why, "", figures)


def check_compiler(asked: Asked) -> Finding:
    """Compilers, which only `engine.compile` on a GPU asks for."""
    there = [name for name in ("ninja", "c++", "gcc", "nvcc") if shutil.which(name)]
    found = f"{', '.join(there) or 'none'}; none is needed"
    why = "only engine.compile wants a C compiler (gcc)"
    return Finding("compiler", "ok", found, why, "", {"there": there})


def _installed(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _demands() -> dict[str, Requirement]:
    found: dict[str, Requirement] = {}
    try:
        lines = importlib.metadata.requires("gristmill") or []
    except importlib.metadata.PackageNotFoundError:  # run from a folder that was never installed
        return found
    for line in lines:
        try:
            demand = Requirement(line)
        except InvalidRequirement:
            continue
        if not demand.marker or "extra" not in str(demand.marker):
            found[canonicalize_name(demand.name)] = demand
    return found


def _older(version: str, tested: str) -> bool:
    try:
        return Version(version) < Version(tested)
    except InvalidVersion:
        return False
