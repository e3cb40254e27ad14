"""The line of imports (DESIGN 2): shards <- pipeline <- ops and models <- objectives <- ops; DALI in one place only."""

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Counter-based draws depend on nothing; objectives select by them, as the stream does.
LEAVES = {("objectives", "gristmill.pipeline.philox")}
ALLOWED = {
    "shards": {"shards"},
    "pipeline": {"pipeline", "shards"},
    "models": {"models"},
    "objectives": {"objectives", "models"},
    "ops": {"ops", "pipeline", "shards", "models", "objectives"},
}
FILES = sorted(path for package in ALLOWED for path in (ROOT / package).rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Dotted names that a file imports; relative ones resolved to `gristmill.<package>...`."""
    package = ("gristmill", *path.relative_to(ROOT).parent.parts)
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) + "." if node.level else ""
            module = base + (node.module or "")
            names |= {module} | {f"{module.rstrip('.')}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path: Path):
    package = path.relative_to(ROOT).parts[0]
    for name in imported(path):
        parts = name.split(".")
        if any(package == who and f"{name}.".startswith(f"{leaf}.") for who, leaf in LEAVES):
            continue
        if parts[0] == "gristmill" and len(parts) > 1 and parts[1] in ALLOWED:
            assert parts[1] in ALLOWED[package], f"{package} must not import {name}"
        if parts[:2] == ["nvidia", "dali"]:
            assert package == "pipeline", "only pipeline/ imports DALI"
        if parts[0] == "deepspeed":
            assert path.name in ("engine.py", "launch.py"), "only ops/engine and ops/launch touch DeepSpeed"


def test_the_walk_sees_relative_imports():
    assert "gristmill.shards.manifest.Manifest" in imported(ROOT / "pipeline" / "reader.py")


def test_nothing_but_gristmill_becomes_importable():
    for name in ALLOWED:
        code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({name!r}) is not None)"
        assert subprocess.run([sys.executable, "-c", code], cwd="/").returncode == 0, f"`import {name}` must fail"


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["trian"], ["demo", "--imges", "x"]])
def test_the_command_line_imports_nothing_heavy(arguments: list[str]):
    """Answering at once means importing little; counted in modules, since a timed assertion fails on a busy machine."""
    code = (
        "import sys; from gristmill.ops.cli import main\n"
        f"try: main({arguments!r})\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'pyarrow', 'nvidia', 'deepspeed', 'timm', 'pydantic', 'rich', 'yaml'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    start = time.perf_counter()
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    print(f"{time.perf_counter() - start:.2f} s")
    assert answer.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    "package",
    sorted({path.parent for path in FILES if path.name == "__init__.py"}),
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_no_module_takes_the_name_of_what_its_package_gives_out(package: Path):
    """The first to import the module would put it in the function's place, for everybody."""
    tree = ast.parse((package / "__init__.py").read_text())
    given = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        # `from . import name` is the module itself; and what comes at once from the module of its name stays in its place.
        if node.module and not (node in tree.body and node.module == alias.name)
    }
    assert not [name for name in given if (package / f"{name}.py").exists() or (package / name).is_dir()]
