"""A bad step kept for later: what the networks were, what the memories held, what each rank was fed.

A capture is a checkpoint in the run's `captures/` without moments but with every rank's views, written by the same code,
so that it is complete or absent, holds no pickle, and has a digest for every byte. The first `guard.captures` bad steps
of a run are kept, counted in the folder, since a run that is started again must not begin to count anew. A disk that
refuses costs the capture, never the run. `replay` feeds it again.
"""

from __future__ import annotations

import importlib.metadata
import socket
from pathlib import Path
from typing import TYPE_CHECKING

from ..pipeline.loader import Batch
from .checkpoint import CheckpointError, Content, Part, Saved
from .guard import Verdict
from .inputs import Origin
from .stores import open_store
from .writer import Writer

if TYPE_CHECKING:
    from .run import Run

KEPT = ("student", "teacher")  # groups of a checkpoint that a forward reads
FOLDER = "captures"
FREE, THERE, FULL, REFUSED = range(4)  # what rank 0 finds in the folder


def capture(run: Run, batch: Batch, verdict: Verdict, keys: list[str]) -> Path | None:
    """Write the step at hand; returns where it lies.

    keys: of the global batch as it was fed. None where enough are kept, or, with a word in the log, where the disk
    refuses. Collective; the networks must still be as they were in the step's forward.
    """
    path = run.folder / FOLDER
    writer, found, why = None, REFUSED, "another process could not write"
    try:
        store = open_store(path)
        writer = Writer(store, run.rank, run.world, keep=None, asynchronous=False)
        held = store.positions() if run.rank == 0 else []
        found = THERE if run.position in held else FULL if len(held) >= run.recipe.guard.captures else FREE
    except (CheckpointError, OSError) as error:  # on rank 0 alone, perhaps: all must hear of it
        why = str(error)
    states = run.total([float(found == state) for state in range(4)])
    if states[THERE] or states[FULL]:
        return path / f"{run.position:012d}" if states[THERE] else None
    if not states[REFUSED]:
        assert writer is not None
        content = _content(run, batch, verdict, keys)
        try:
            writer.begin(run.position, content)
            writer.finish(run.total)
            return path / f"{run.position:012d}"
        except CheckpointError as error:
            why = str(error)
        finally:
            writer.close()
    run.log.write("event", event="capture_failed", position=run.position, why=why)
    return None


def origin_of(saved: Saved, rank: int) -> Origin:
    """Where a rank's share of a captured batch came from."""
    places = saved.assembled(f"origin.{rank}")
    cut = {name.removeprefix("geometry."): t for name, t in places.items() if name.startswith("geometry.")}
    return Origin(places["index"], cut)


def _content(run: Run, batch: Batch, verdict: Verdict, keys: list[str]) -> Content:
    content = run.content()
    views = [
        Part(f"views.{run.rank}", name, 0, tuple(crops.shape), crops.detach().reshape(-1))
        for name, crops in batch.views.items()
    ]
    places = {"index": run.feed.index(batch.ids), **{f"geometry.{name}": cut for name, cut in batch.geometry.items()}}
    views += [Part(f"origin.{run.rank}", n, 0, tuple(t.shape), t.detach().reshape(-1)) for n, t in places.items()]
    noted = {
        "bad": verdict.bad,
        "culprits": verdict.culprits,
        "logs": {name: repr(value) for name, value in verdict.logs.items()},  # JSON knows no NaN
        "keys": keys,
        "hosts": run.everyones([socket.gethostname()]),
        "gristmill": importlib.metadata.version("gristmill"),
    }
    whole = {name: tensors for name, tensors in content.whole.items() if name != "steps"}
    parts = [part for part in content.parts if part.group in KEPT]
    return Content(parts + views, whole, content.state | {"capture": noted})
