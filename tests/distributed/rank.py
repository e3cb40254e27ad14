"""What a process is before it is a rank of one of zygote.py's groups: everything slow is imported, once for all of them."""

import faulthandler
import gc
import importlib
import os
import sys

from gristmill.ops.cli import main
from gristmill.ops.launch import quiet_deepspeed
from gristmill.ops.train import train
from gristmill.pipeline.augment import cpu, dali
from pyarrow import dataset, pandas_compat

# What a run imports on its way; Arrow's are those that it imports at its first look into a table.
PRELOADED = (main, train, cpu, dali, dataset, pandas_compat)
quiet_deepspeed()
gc.collect()
gc.freeze()  # ranks need not look through all of this again


def become(script: str, arguments: list[str], environment: dict[str, str], errors: str, seconds: float) -> None:
    """Be a rank: its environment as torchrun sets it, its stderr in a file of its own, then the script's `main`."""
    file = os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(file, 2)
    os.close(file)
    faulthandler.dump_traceback_later(seconds, exit=True)
    os.environ.update(environment)
    sys.argv = [script, *arguments]
    importlib.import_module(script).main()
