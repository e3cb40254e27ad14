"""What a process of the tests does: a training loop over the stand-alone stream, until it ends or is killed.

As a loop would, it writes its state after each batch, by rename; and before that, to a log of its own, what it consumed.
"""

from __future__ import annotations

import faulthandler
import json
import os
import time
from pathlib import Path
from typing import Any

from gristmill.pipeline import images, loader
from gristmill.pipeline.views import CacheConfig
from gristmill.shards.retry import RetryPolicy

from ..pipeline.pictures import VIEWS, ours
from .streams import CONFIG, Place, Slot, plain, slots_of


class _Patient(RetryPolicy, frozen=True, extra="forbid"):
    first_pause: float = 0.005
    longest_pause: float = 0.05
    stall_timeout: float = 5.0


def live(
    data: str, folder: str, *, number: int, batch: int, until: int, cache: int = 0, rank: int = 0, world: int = 1,
    step: float = 0.0, start: str = "", quarantine: str = "",
) -> None:  # fmt: skip
    """Consume batches from the state in `folder` (or `start`) on, up to position `until`; `step` seconds each."""
    faulthandler.dump_traceback_later(600, exit=True)  # a life that hangs says where
    loader.RetryPolicy = _Patient
    home = Path(folder)
    place = home / f"state-{rank}.json"
    state = start or (place.read_text() if place.exists() else None)
    config = CONFIG.model_copy(update={"cache": CacheConfig(folder=home / "cache", bytes=cache) if cache else None})
    with (
        images(data, batch, views=VIEWS, executor=plain(), config=config, state=state, quarantine=quarantine or home / "quarantine.jsonl",
               rank=rank, world=world) as stream,
        (home / f"log-{number:03d}-{rank}").open("a") as log,
    ):  # fmt: skip
        print("begun at", stream.position, flush=True)
        while stream.position < until:
            before = stream.loader.stats.substituted
            position, got = stream.position, slots_of(next(stream), batch // world)
            log.write(json.dumps([position, got, stream.loader.stats.substituted - before]) + "\n")
            log.flush()
            time.sleep(step)
            beside = place.with_suffix(".beside")
            beside.write_text(stream.state())
            os.replace(beside, place)
    print("left", *(thread.name for thread in ours()), flush=True)
    os._exit(0)  # taking torch down takes longer than all of this


def consumed(home: Path, number: int, rank: int = 0) -> list[tuple[int, list[Slot], int]]:
    """What one life logged: (position of the batch, its slots of this rank, substitutes among them); whole lines only."""
    path = home / f"log-{number:03d}-{rank}"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [(position, [_slot(raw) for raw in got], count) for position, got, count in map(json.loads, lines)]


def position_of(home: Path, rank: int = 0) -> int:
    """Position in the state that was written last; 0 before the first."""
    path = home / f"state-{rank}.json"
    return int(json.loads(path.read_text())["position"]) if path.exists() else 0


def _slot(raw: list[Any]) -> Slot:
    place: Place = (int(raw[0][0]), int(raw[0][1]))
    return Slot(place, *raw[1:])
