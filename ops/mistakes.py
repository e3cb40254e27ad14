"""What is wrong with a recipe, in words: a line for each mistake, with its key, what was given and what would do.

pydantic says what it could not do with a value ("unable to parse string as a number"); who wrote the recipe wants to
know which of the values it was.
"""

from __future__ import annotations

import re
import typing
from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel, ValidationError

from ..shards.addresses import redact
from ..shards.errors import nearest

# Of the forms of `data` and weights, and of unions: they stand in pydantic's places, and are no keys.
_TAGS = re.compile(r"<\w+>|int|float|str|bool|path|(literal|list|tuple|dict|function-\w+)\[.*\]")
_WANTED = {
    "float": "a number", "int": "a whole number", "bool": "true or false", "tuple": "a list", "list": "a list",
    "string": "a text", "path": "a path", "model": "a mapping of keys to values", "dict": "a mapping of keys to values",
}  # fmt: skip
_LONG = 60  # characters of a value that are shown


def mistakes(model: type[BaseModel], error: ValidationError) -> list[str]:
    """A line for each key with a mistake in it, in pydantic's order. Urls lose their passwords."""
    told: list[str] = []
    wanted: dict[str, tuple[str, list[str]]] = {}  # by key: what was given, and each thing that would do
    for one in error.errors():
        loc = _keys(model, one["loc"])
        where = ".".join(map(str, loc))
        if one["type"] == "extra_forbidden":
            told.append(f"{where}: unknown key; {_hint(model, loc)}")
        elif one["type"] == "missing":
            told.append(f"{where}: it has to be given")
        elif (kind := one["type"].partition("_")[0]) in _WANTED or one["msg"].startswith("Input should be "):
            wish = _WANTED.get(kind) or one["msg"].removeprefix("Input should be ")
            if where not in wanted:
                told.append(where)
                wanted[where] = _shown(one["input"]), []
            wanted[where][1].append(wish)
        else:
            message = one["msg"].removeprefix("Value error, ").replace("Tuple should", "the list should")
            message = message.replace(" after validation", "")
            told.append(f"{where}: {message}" if where else message)
    return [f"{line}: {_unlike(*wanted[line])}" if line in wanted else line for line in told]


def _unlike(given: str, wishes: list[str]) -> str:
    if len(wishes) == 1 and wishes[0].startswith("a "):
        return f"{given} is no {wishes[0][2:]}"
    return f"{given} should be {', or '.join(dict.fromkeys(wishes))}"


def _shown(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list"
    text = repr(redact(value)) if isinstance(value, str) else str(value)
    return text if len(text) <= _LONG else f"{text[:_LONG]}..."


def _keys(model: Any, loc: Iterable[int | str]) -> tuple[int | str, ...]:
    """pydantic's place without what is no key of the recipe."""
    found: list[int | str] = []
    for part in loc:
        if isinstance(part, int) or not _TAGS.fullmatch(part) or part in _fields(model, found):
            found.append(part)
    return tuple(found)


def _hint(model: Any, loc: tuple[int | str, ...]) -> str:
    fields = _fields(model, loc[:-1])
    return nearest(loc[-1], fields).strip() or f"known here: {', '.join(fields)}"


def _fields(model: Any, loc: Iterable[int | str]) -> list[str]:
    """Names of the fields at `loc`, found by walking the annotations (list items and unions included)."""
    for part in loc:
        if part not in getattr(model, "model_fields", {}):  # an item's number, or a key of a mapping
            continue
        annotation = model.model_fields[part].annotation
        found = [a for a in _flatten(annotation) if isinstance(a, type) and issubclass(a, BaseModel)]
        if not found:
            return []
        model = found[0]
    return list(model.model_fields)


def _flatten(annotation: Any) -> list[Any]:
    inner = [a for arg in typing.get_args(annotation) for a in _flatten(arg)]
    return inner or [annotation]
