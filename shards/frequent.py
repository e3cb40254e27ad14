"""Names and how often they came, where there may be more of them than memory should hold."""

from __future__ import annotations

from collections import Counter
from typing import Any

_NAMES = 100_000


class Frequent:
    """The most frequent of many names, in bounded memory: the rare ones are dropped when there are too many."""

    def __init__(self, most: int = _NAMES) -> None:
        self.counts: Counter[str] = Counter()
        self._most = most
        self.cut = False  # whether any was dropped, so that counts may be low

    def update(self, names: Any) -> None:
        """Count names."""
        self.counts.update(names)
        if len(self.counts) > self._most:
            self.counts = Counter(dict(self.counts.most_common(self._most // 2)))
            self.cut = True
