"""What comes along with an image, as JSON values without secrets: columns of a table, the sidecars in a tar.

Values go into samples and ledgers, so a url in any of them loses what may be a key (`redact`), NaN and infinity, which
are no JSON, become null, and times become text.
"""

from __future__ import annotations

import datetime
import decimal
import json
import math
import re
from collections.abc import Mapping
from typing import Any

from ..addresses import redact

MAX_SIDECAR = 1 << 20  # bytes
SIDECARS = ("json", "txt", "cls")
_URL, _BLANK = re.compile(r"\s*[A-Za-z][A-Za-z0-9+.-]*://"), re.compile(r"\s")


def plain(value: Any) -> Any:
    """A value as JSON knows it. Bytes, and what has no other form, become text."""
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, str):
        return _without_secrets(text(value)) if "://" in value else text(value)
    if isinstance(value, Mapping):
        return {str(plain(str(key))): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    if isinstance(value, decimal.Decimal):
        return str(value)
    if isinstance(value, (bytes, bytearray)):
        return plain(bytes(value).decode("utf-8", "backslashreplace"))
    return plain(str(value))


def _without_secrets(value: str) -> str:
    if _URL.match(value) and ("?" in value or "@" in value):
        value = _BLANK.sub("%20", value)  # the blank in a url would end it for `redact`, before its query does
    return redact(value)


def text(value: str) -> str:
    """Text that can be written down: half a character, or a byte that was no UTF-8, becomes `\\xNN` or `\\uNNNN`."""
    try:
        value.encode()
        return value
    except UnicodeEncodeError:
        return value.encode("utf-8", "backslashreplace").decode()


def parse(raw: str | bytes) -> Any:
    """JSON, with null for NaN and infinity. Raises ValueError for what is none, however deep it nests."""
    try:
        return plain(json.loads(raw))
    except RecursionError:
        raise ValueError("nested too deep") from None


def merge_sidecars(found: Mapping[str, bytes | None]) -> dict[str, Any]:
    """What the sidecars of a sample say, by suffix; None for one that was too large, which is told in `sidecar_problem`."""
    meta: dict[str, Any] = {}
    problems = []
    for suffix in SIDECARS:
        if suffix not in found:
            continue
        raw = found[suffix]
        if raw is None:
            problems.append(f"{suffix}: larger than {MAX_SIDECAR >> 20} MiB")
        elif suffix == "json":
            try:
                value = parse(raw)
                meta |= value if isinstance(value, dict) else {"json": value}
            except ValueError:
                problems.append("json: is none")
        else:
            said = plain(raw.decode("utf-8", "backslashreplace").strip())
            meta["caption" if suffix == "txt" else suffix] = int(said) if _is_class(suffix, said) else said
    if problems:
        meta["sidecar_problem"] = "; ".join(problems)
    return meta


def _is_class(suffix: str, said: str) -> bool:
    return suffix == "cls" and said.isascii() and said.isdigit() and len(said) < 19
