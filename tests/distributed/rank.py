"""Be a rank: what a fork of tests/command.py does before it runs a script of this folder (zygote.py)."""

import faulthandler
import importlib
import os
import sys

import torch


def become(script: str, arguments: list[str], environment: dict[str, str], errors: str, seconds: float) -> None:
    """Be a rank: its environment as torchrun sets it, its stderr in a file of its own, then the script's `main`."""
    file = os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(file, 2)
    os.close(file)
    faulthandler.dump_traceback_later(seconds, exit=True)
    os.environ.update(environment)
    # What a process that torch was imported into with this environment would have.
    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", torch.get_num_threads())))
    sys.argv = [script, *arguments]
    importlib.import_module(script).main()
