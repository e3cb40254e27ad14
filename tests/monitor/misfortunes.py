"""What befalls a run from within, in the fork that trains (runs.py): each is wrapped around the product's own parts.

A fork trains slowly on purpose, a step every `pace` seconds, so that a dozen runs share two cores as if each had some.
It meets its fault at the first step after a file has appeared, so that all runs are healthy first.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gristmill.ops.cli import main
from gristmill.ops.monitor import observer
from gristmill.ops.monitor.disks import Disks
from gristmill.ops.run import Run
from gristmill.ops.teacher import EmaTeacher


class Pace:
    """Run.forward, at a walk; from the fault on, `befall` is called before it with the run and the batch."""

    def __init__(self, seconds: float, sign: Path, befall: Callable[[Run, Any], None] | None):
        self.seconds, self.sign, self.befall, self.forward = seconds, sign, befall, Run.forward
        self.struck = False

    def install(self) -> None:
        pace = self

        def forward(run: Run, batch: Any, part: int) -> Any:
            time.sleep(pace.seconds)
            if pace.befall and (pace.struck or pace.sign.exists()):
                pace.struck = True
                pace.befall(run, batch)
            return pace.forward(run, batch, part)

        Run.forward = forward


def freeze(run: Run, batch: Any) -> None:
    """The teacher stays what it is; the loop believes that it moved."""
    EmaTeacher.update = lambda *_: None


def collapse(run: Run, batch: Any) -> None:
    """All prototypes become one, in teacher and student, before every step, and the centre forgets what they were."""
    with torch.no_grad():
        run.mixture.objectives["group"].center.zero_()  # pyright: ignore[reportAttributeAccessIssue]
        for module in (run.engine.teacher.module, run.engine.module):
            for name, weight in module.named_parameters():
                if name.endswith("last_layer.weight_v"):
                    weight.copy_(weight[:1].expand_as(weight))


def poison(run: Run, batch: Any) -> None:
    """Six batches in a row hold a pixel that is no number: these steps are left out, and the run goes on."""
    if run.position - run.cursor.trained < 6 * run.recipe.batch:
        batch.views = {name: crops.clone() for name, crops in batch.views.items()}
        batch.views["global"].view(-1)[0] = float("nan")


def hang(run: Run, batch: Any) -> None:
    """This step does not end."""
    time.sleep(3600)


def straggle(run: Run, batch: Any) -> None:
    """This rank takes its time."""
    if run.rank == run.world - 1:
        time.sleep(1.5)


BEFALL: dict[str, Callable[[Run, Any], None]] = {
    "frozen": freeze,
    "collapsed": collapse,
    "poisoned": poison,
    "hung": hang,
    "straggling": straggle,
}


def train(name: str, arguments: list[str], environment: dict[str, str], said: str, pace: float, sign: str) -> None:
    """Be one rank of the run `name`: `gristmill train demo ...` with its misfortune, if it has one here."""
    file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.update(environment)
    # What is looked at now and then is looked at as often in hurried minutes as it would be in real ones.
    observer.SHARE, Disks.__init__.__defaults__ = 1.0, (0.5,)
    Pace(pace, Path(sign), BEFALL.get(name)).install()
    sys.argv[1:] = arguments
    main(arguments, prog_name="gristmill")
