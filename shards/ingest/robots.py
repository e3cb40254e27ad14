"""What an X-Robots-Tag header forbids: noai and noimageai (training), noindex and noimageindex (keeping at all).

A header holds rules between commas, and may begin with the name of the robot that it is for: `otherbot: noindex`. Rules
with values (`max-snippet: 20`) look the same and are told apart by their names. `none` stands for noindex and nofollow.
Source: Google Search Central, "Robots meta tag, data-nosnippet, and X-Robots-Tag specifications"; img2dataset's rules.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

FORBIDDING = frozenset({"noai", "noimageai", "noindex", "noimageindex", "none"})
_VALUED = frozenset({"unavailable_after", "max-snippet", "max-image-preview", "max-video-preview"})
_NAMED = re.compile(r"\s*([A-Za-z0-9*_.-]+)\s*:(.*)", re.DOTALL)


def token_of(user_agent: str) -> str:
    """The name by which headers call a robot: `gristmill` of `gristmill/1.0 (+mailto:...)`."""
    return re.split(r"[/\s]", user_agent.strip(), maxsplit=1)[0].lower()


def forbidden(headers: Iterable[str], token: str) -> str:
    """The first rule in all X-Robots-Tag headers that forbids us to take the image; empty if none does."""
    for header in headers:
        ours = True
        for part in header.split(","):
            named = _NAMED.fullmatch(part)
            if named and named[1].lower() not in _VALUED:
                ours, part = named[1].lower() in (token, "*"), named[2]
            rule = part.strip().lower()
            if ours and rule in FORBIDDING:
                return rule
    return ""
