"""One check in a process of its own: `python -m gristmill.ops.doctor.apart NAME`, questions in, findings out, as JSON."""

from __future__ import annotations

import json
import os
import signal
import sys

from .finding import Asked
from .runner import CHECKS, guarded


def main() -> None:
    """Libraries print what they like to stdout: it goes to stderr, of which the last line is told if this dies."""
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    asked = Asked.from_json(sys.stdin.read())
    signal.alarm(int(asked.seconds * 1.5) + 5)  # an orphan ends by itself; a thread for that would not survive a fork
    (check,) = (check for check in CHECKS if check.name == sys.argv[1])
    found = guarded(check, asked)
    json.dump([finding.as_dict() for finding in found], answer)
    answer.flush()
    sys.stderr.flush()
    os._exit(0)  # threads and drivers that would not end by themselves are nobody's business any more


if __name__ == "__main__":
    main()
