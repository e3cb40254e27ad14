"""The one entry point: `gristmill COMMAND`. It answers at once: a command's own imports happen when it runs.

Exit codes: 0 all went well; 1 the thing that was checked is not in order; 2 a user can mend it (the message says how);
75 stopped by SIGTERM with a checkpoint written, start the same command again; 130 the same after Ctrl-C; 76 a rank was
lost or stands still, start the same command again. torchrun itself always ends with 1 when a rank did not end with 0.
"""

from __future__ import annotations

from . import (
    bench_commands,
    data_commands,
    doctor_commands,
    evaluate_commands,
    ingest_commands,
    keeping_commands,
    look_commands,
    monitor_commands,
    plan_commands,
    run_commands,
)
from .commands import main

__all__ = [
    "bench_commands",
    "data_commands",
    "doctor_commands",
    "evaluate_commands",
    "ingest_commands",
    "keeping_commands",
    "look_commands",
    "main",
    "monitor_commands",
    "plan_commands",
    "run_commands",
]  # importing them is what adds their commands

if __name__ == "__main__":
    main()
