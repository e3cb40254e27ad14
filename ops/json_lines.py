"""A run as JSON lines on standard output, for programs: what the log is told, notes, and how it ended.

Nothing else may come there: while it is open, file descriptor 1 is the error stream, whatever writes to it (NCCL greets on
standard output, and so do other libraries). A reader that has gone away costs the lines, not the run.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable
from typing import Any

from ..shards.addresses import redact
from .pace import Pace
from .runlog import Line


class JsonLines:
    """Open until `end`. Steps carry what `pace` adds to them; note: takes one line if nobody reads any more."""

    def __init__(self, pace: Pace, note: Callable[[str], object]):
        self.pace, self._note = pace, note
        sys.stdout.flush()
        self._out = os.dup(1)
        os.dup2(2, 1)
        self._gone = False

    def take(self, line: Line) -> None:
        """A line of the run's log, or a note."""
        if line["kind"] == "step":
            pace = self.pace
            more = {
                "end": pace.end,
                "images_per_second": pace.rate,
                "data_wait_ratio": pace.wait,
                "left_seconds": pace.left,
            }
            line = line | more
        self._put(line)

    def end(self, code: int, position: int, error: BaseException | None) -> None:
        """The last line, and standard output is as it was."""
        told: Line = {"kind": "end", "position": position}
        failed = error is not None
        self._put(told | ({"error": redact(f"{type(error).__name__}: {error}")} if failed else {"code": code}))
        sys.stdout.flush()
        os.dup2(self._out, 1)
        os.close(self._out)

    def _put(self, line: Line) -> None:
        if self._gone:
            return
        text = json.dumps(_plain(line)) + "\n"
        try:
            data = text.encode()
            while data:
                data = data[os.write(self._out, data) :]
        except OSError as error:
            self._gone = True
            self._note(f"warning: nobody reads the JSON lines any more ({error.strerror}); training goes on")


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity: null."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
