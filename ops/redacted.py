"""What of a recipe and of a command may be written into a run folder: everything but what opens a door.

A url may bring a user, a password or a presigned query; the run needs them, the folder is given to others. Of a query
only the options stay that say where an object store is. A run that is read without its secrets finds its data again by
`data=URL`, or by the keys in the environment.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from ..shards.addresses import redact

# Options of s3:// and gs:// urls as pyarrow and we write them: places, no keys.
PLACES = {"endpoint_override", "scheme", "region", "profile", "anonymous", "allow_bucket_creation", "path_style"}
SECRET = re.compile(r"(?i)password|passwd|secret|token|credential|api_?key|access_?key|signature")
URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+(\S*)")  # a path of a url that was taken for one has lost a slash
LEFT_OUT = "..."


def without_secrets(tree: Any) -> Any:
    """The same nested values; texts without secrets, those under a telling name (`api_key`) left out."""
    if isinstance(tree, dict):
        return {
            key: LEFT_OUT if isinstance(value, str) and value and SECRET.search(str(key)) else without_secrets(value)
            for key, value in tree.items()
        }
    if isinstance(tree, list | tuple):
        return [without_secrets(value) for value in tree]
    return bare(tree) if isinstance(tree, str) else tree


def bare(text: str) -> str:
    """A text whose urls say where, and not how one gets in."""
    return URL.sub(lambda found: _bare(found[0], found[1], found[2]), text)


def _bare(url: str, scheme: str, rest: str) -> str:
    place, _, query = rest.partition("?")
    slashes = url[len(scheme) + 1 : len(url) - len(rest)]
    shown = redact(f"{scheme}://{rest if '@' in query else place}").partition("://")[2]
    options = [] if "@" in query else [each for each in query.split("&") if each.partition("=")[0] in PLACES]
    return f"{scheme}:{slashes}{shown.partition('?')[0]}" + (f"?{'&'.join(options)}" if options else "")


def command_line(arguments: Sequence[str]) -> list[str]:
    """Arguments of a program as they may be shown."""
    found = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        secret = equals and SECRET.search(key.rpartition(".")[2]) and "/" not in key
        found.append(f"{key}={LEFT_OUT}" if secret and value else bare(argument))
    return found
