"""docs/trouble.md quotes messages that the program prints: each must still stand in the source.

A quoted message is the code span that opens an item of a list. `<...>` and `...` in it stand for what differs; the rest
are its fixed parts, which must occur in the strings of one module. A string with holes (an f-string, or a sum of
strings) counts as one text with a mark at each hole, so that no fixed part reaches over one.
"""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "trouble.md"
FOLDERS = ("shards", "pipeline", "models", "objectives", "ops")
HOLE = "\0"
# Not ours: what torch and DALI print, word for word, and users meet in our commands.
OTHERS = {"CUDA out of memory", "GPU is not available"}


def messages(page: str) -> list[str]:
    """The quoted messages, in order."""
    return re.findall(r"^- `([^`]+)`", page, re.MULTILINE)


def fixed_parts(message: str) -> list[str]:
    """What of a message must stand in the source; blanks and marks beside a hole may belong to what is filled in."""
    return [part.strip(" ") for part in re.split(r"<[^<>]+>|\.\.\.", message) if re.search(r"\w", part)]


def text_of(node: ast.AST) -> str:
    """A string expression with its holes marked; any other expression is one hole."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else HOLE
    if isinstance(node, ast.JoinedStr):
        return "".join(map(text_of, node.values))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return text_of(node.left) + text_of(node.right)
    return HOLE


def strings(source: str) -> str:
    """All strings of a module, docstrings left out: what is only described there is not printed."""
    tree = ast.parse(source)
    docs = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    kinds = (ast.Constant, ast.JoinedStr, ast.BinOp)
    texts = (text_of(node) for node in ast.walk(tree) if isinstance(node, kinds) and id(node) not in docs)
    return f"{HOLE}\n".join(text for text in texts if text.strip(HOLE))


@cache
def modules() -> dict[Path, str]:
    return {path: strings(path.read_text()) for name in FOLDERS for path in sorted((ROOT / name).rglob("*.py"))}


def printed_by(message: str) -> list[Path]:
    """The modules whose strings hold all fixed parts of a message."""
    parts = fixed_parts(message)
    return [path for path, text in modules().items() if all(part in text for part in parts)]


def constant(path: str, name: str) -> object:
    """The value of a constant of a module, which is not imported."""
    for node in ast.parse((ROOT / path).read_text()).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == name:
            return ast.literal_eval(node.value)
    raise AssertionError(f"{path} has no {name}")


def test_messages_of_each_section():
    sections = PAGE.read_text().split("\n## ")[1:]
    assert len(sections) == 8
    for section in sections:
        assert len(messages(section)) >= 5, section.splitlines()[0]


@pytest.mark.parametrize("message", messages(PAGE.read_text()))
def test_message_stands_in_the_source(message: str):
    if message in OTHERS:
        return
    parts = fixed_parts(message)
    assert sum(map(len, parts)) >= 12, "too little of it is fixed to find it"
    assert printed_by(message), f"no module prints {parts}"


def test_messages_are_quoted_once():
    quoted = messages(PAGE.read_text())
    assert len(set(quoted)) == len(quoted)
    assert set(quoted) >= OTHERS


def test_stale_messages_are_found():
    assert printed_by("no recipe <name>: shipped are <names>, or give a YAML file")
    assert not printed_by("no recipe <name>: shipped were <names>, or give a YAML file")
    assert not printed_by("no recipe <name>: did you mean <name>? shipped are <names>")  # a hole cannot be quoted
    # Each part stands somewhere, but not both in one module.
    assert not printed_by("no recipe <name>: the file is empty <n> images cannot be shared equally by")


def test_strings_mark_holes_and_join():
    found = strings('"""doc"""\ndef f():\n    """only told"""\n    raise E(f"a {x} b" " c" + y + "d")\n')
    assert f"a {HOLE} b c{HOLE}d" in found
    assert "only told" not in found
    assert "doc" not in found


def test_exit_codes():
    codes = re.findall(r"^\| ([\d, -]*\d) \|", PAGE.read_text(), re.MULTILINE)
    numbers = {int(number) for code in codes for number in code.split(",")}
    ours = {constant("ops/train.py", "REQUEUE"), constant("ops/watchdog.py", "STALLED")}
    assert constant("ops/ingest.py", "RESUMABLE") == constant("ops/train.py", "REQUEUE") == 75
    told = {int(number) for number in re.findall(r"\b(?:0|1|2|75|76|130)\b", cli_docstring())}
    assert numbers == told | ours | {137, -9}


def cli_docstring() -> str:
    return ast.get_docstring(ast.parse((ROOT / "ops/cli.py").read_text())) or ""


def test_links_lead_somewhere():
    links = re.findall(r"\]\(([^)#]+)\)", PAGE.read_text())
    assert len(links) > 10
    assert not [link for link in links if not (PAGE.parent / link).exists()]
