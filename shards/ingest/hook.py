"""A user's own filter or score: named `module:name`, called by every worker with batches of images.

A function takes a list of `Offered` and returns as many verdicts; a class is made once a worker, which is where a model
is loaded, and its instance is called. A verdict is True or None (keep), False or a text (leave out; the text is the
reason in the ledger), or a dict of JSON values (keep, and write these into the sample's json and the ledger). Equal
images must get equal verdicts, or the ingest is not the same when it is done again.
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from .errors import IngestError

BATCH = 64  # images, at most, in a call
Verdict = bool | str | dict[str, Any] | None


@dataclass(frozen=True)
class Offered:
    """An image as it would be stored: encoded bytes, upright size in pixels, where it came from, what came along."""

    data: bytes
    format: str
    width: int
    height: int
    locator: str
    meta: dict[str, Any] = field(default_factory=dict)


@lru_cache(maxsize=4)
def load_filter(name: str) -> Callable[[Sequence[Offered]], Sequence[Verdict]]:
    """The filter called `module:name`, ready to be called. Raises IngestError when it is not there."""
    found: Any = find_filter(name)
    ready: Any = found() if inspect.isclass(found) else found
    return ready


def find_filter(name: str) -> Any:
    """The function or class called `module:name`; a module may lie in the folder that the command was started in.

    Raises IngestError when it is not there.
    """
    module, _, attribute = name.partition(":")
    here = os.getcwd()
    added = here not in sys.path
    if added:
        sys.path.insert(0, here)
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise IngestError(
            f"filter {name} cannot be loaded ({error}): write module:function, importable from {here}"
        ) from error
    finally:
        if added:
            sys.path.remove(here)


def ask(name: str, offered: list[Offered]) -> list[Verdict]:
    """The filter's verdicts on a batch. Raises IngestError when it fails or gives what is no verdict."""
    try:
        verdicts = list(load_filter(name)(offered))
    except IngestError:
        raise
    except Exception as error:
        raise IngestError(
            f"filter {name} failed on a batch of {len(offered)} images, the first {offered[0].locator} "
            f"({type(error).__name__}: {error}): mend it and start the same command again"
        ) from error
    if len(verdicts) != len(offered):
        raise IngestError(f"filter {name} gave {len(verdicts)} verdicts on {len(offered)} images: give one for each")
    for verdict in verdicts:
        if verdict is not None and not isinstance(verdict, bool | str | dict):
            raise IngestError(f"filter {name} gave {verdict!r}: give True, False, a reason, a dict of scores or None")
    return verdicts
