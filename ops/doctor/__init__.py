"""The machine check: what is there, whether a training would go well on it, and what to do where not.

Each check is a small function that gives findings (finding.py). What could hang, crash or take the interpreter along
(GPU drivers, DALI, file systems of dead servers, groups of processes) runs in a process of its own that is given up after
a while (runner.py, apart.py). Inside torchrun, srun and the like all ranks look, meet and are judged together (group.py).
"""

from .finding import Asked, Finding, State, worst

__all__ = ["Asked", "Finding", "State", "worst"]
