"""What a real run tells its metrics: two attempts at a tiny multigrain, the second from a server through a cache.

No metric of the catalogue is dead: each row is fed here, but for a few that want what these attempts lack, with the reason.
"""

import os
import re
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from gristmill.ops import train as training
from gristmill.ops.launch import join
from gristmill.ops.monitor import observer
from gristmill.ops.monitor.catalogue import CATALOGUE
from gristmill.ops.monitor.goodput import FILE, Ledger, read_ledger
from gristmill.ops.monitor.labels import SPENT
from gristmill.ops.monitor.metrics import Metrics
from gristmill.ops.monitor.row import Row
from gristmill.ops.recipe import load_recipe
from gristmill.shards.demo import make_demo_images
from gristmill.shards.ingest import ingest_folder
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from ..faulty_http import FaultyServer
from .test_report_page import BATCH, STEPS, TINY

CLOCK = 0.5  # seconds by which the wall clock may be set while the ledger's runs on
STOP = 3  # steps after which SIGTERM comes in the first attempt
GPU = "only a GPU has it: tests/ops/test_device.py"
ALONE = "between processes: tests/distributed/test_communication.py"
NOT_FED = {
    "device/peak_flops": GPU,
    "cuda/{cuda}": GPU,
    "rollbacks": "no step is bad here: tests/distributed/test_guard.py goes back for real",
    "memory/{memory}/bytes": "of the objective `bank`: tests/objectives/test_bank.py",
    "{centred}/hidden_ratio": "of the objective `patch`: tests/ops/test_metrics.py",
    "{centred}/koleo": "an option that multigrain leaves off: tests/ops/test_metrics.py",
    "communication/calls/{operation}": ALONE,
    "communication/bytes/{operation}": ALONE,
    "ignored": "nothing is ignored",
}


class Noting(Metrics):
    """The real metrics, which remember under what names values came."""

    def __init__(self, *args: Any, **more: Any) -> None:
        self.names: set[str] = set()
        super().__init__(*args, **more)

    def _put(self, prefix: str, values: Any) -> None:
        self.names |= {f"{prefix}{name}" for name in values}
        super()._put(prefix, values)


@dataclass
class Attempt:
    """What one attempt left behind."""

    metrics: Noting
    ending: training.Ending
    began: float
    ended: float
    ledger: Ledger  # as it was in the run folder then
    states: list[str]
    served: dict[tuple[str, tuple[tuple[str, str], ...]], float] = field(init=False)

    def __post_init__(self) -> None:
        families = text_string_to_metric_families(generate_latest(self.metrics.registry).decode())
        self.served = {(s.name, tuple(sorted(s.labels.items()))): s.value for f in families for s in f.samples}

    def value(self, name: str, **labels: str) -> float | None:
        return self.served.get((name, tuple(sorted(labels.items()))))


def attempt(recipe: Any, folder: Path, *, stop: int | None = None) -> Attempt:
    kept: list[Noting] = []
    states: list[str] = []

    class Kept(Noting):
        def __init__(self, *args: Any, **more: Any) -> None:
            super().__init__(*args, **more)
            kept.append(self)

        def observe_state(self, state: str) -> None:
            states.append(state)
            super().observe_state(state)

        def observe_step(self, values: Any) -> None:
            super().observe_step(values)
            if stop is not None and values["step"] == stop:
                os.kill(os.getpid(), signal.SIGTERM)

    began = time.time()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "Metrics", Kept)
        patch.setattr(observer, "PACE", 0.0)  # these steps are few
        patch.setattr(observer, "SHARE", float("inf"))  # and each is looked at, however long the last look took
        ending = training.train(recipe, folder, quiet=True)
    ledger = read_ledger(folder / FILE)
    assert ledger is not None
    return Attempt(kept[0], ending, began, time.time(), ledger, states)


@pytest.fixture(scope="module")
def attempts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Attempt, Attempt]:
    root = tmp_path_factory.mktemp("observed")
    make_demo_images(root / "images", images=96, instances=2, size=48)
    ingest_folder(root / "images", root / "data", holdout=0.2)
    train = root / "data" / "train"
    more = ("metrics.port=0", "checkpoint.every=16", "probes.names=[knn]", f"probes.reference={train}")
    names = [*TINY, f"probes.query={root / 'data' / 'probe'}", *more]
    files = {f"/set/{path.relative_to(train)}": path.read_bytes() for path in train.rglob("*") if path.is_file()}
    join()
    try:
        first = attempt(load_recipe("multigrain-vits16", [*names, f"data={train}"], tiny=True), root / "run", stop=STOP)
        with FaultyServer(files) as server:
            place = f"data={server.url('/set')}"
            cache = f"stream.cache={{folder: {root / 'cache'}, bytes: 10000000}}"
            recipe = load_recipe("multigrain-vits16", [*names, place, cache], tiny=True)
            for path in files:
                if path.endswith(".tar"):
                    server.fault("status", path=path, code=503)
            second = attempt(recipe, root / "run")
    finally:
        join()
    return first, second


def names_of(row: Row, metrics: Noting) -> set[str]:
    pattern = re.sub(r"\\\{\w+\\\}", r"[^/]+", re.escape(row.name))
    return {name for name in metrics.names if re.fullmatch(pattern, name)}


def test_no_metric_is_dead(attempts: tuple[Attempt, Attempt]):
    fed = {
        row.name for row in CATALOGUE for each in attempts if names_of(row, each.metrics) & each.metrics._places.keys()
    }
    dead = {row.name for row in CATALOGUE} - fed
    assert dead == set(NOT_FED), {"dead": dead - set(NOT_FED), "alive after all": set(NOT_FED) - dead}
    for each in attempts:
        assert each.metrics.unknown == set()
        assert each.value("gristmill_ignored_values_total") == 0


def test_what_a_first_attempt_serves(attempts: tuple[Attempt, Attempt]):
    first, _ = attempts
    assert first.ending.code == training.REQUEUE
    assert len(first.served) <= 250  # a multigrain run on one process
    assert first.value("gristmill_step") == first.value("gristmill_steps_total") == STOP + 1
    assert first.value("gristmill_images_total") == (STOP + 1) * BATCH
    assert first.value("gristmill_run_images") == STEPS * BATCH
    assert first.value("gristmill_attempts") == 1
    assert first.value("gristmill_teacher_updates_total") == STOP + 1
    assert first.value("gristmill_fetched_bytes_total", source="local")
    assert first.value("gristmill_cache_hits_total") is None
    assert first.value("gristmill_storage_requests_total") is None
    assert first.value("gristmill_cuda_memory_bytes", kind="peak") is None
    assert first.value("gristmill_checkpoint_last_position_samples") == (STOP + 1) * BATCH
    tokens, crops = 2 * 17 + 2 * 5, 4  # two of 32 pixels and two of 16 for the student, in patches of 8
    assert first.value("gristmill_tokens_total") == (STOP + 1) * BATCH * tokens
    assert first.value("gristmill_crops_total") == (STOP + 1) * BATCH * crops
    for name in ("model_flops_total", "teacher_distance_ratio", "rank_own_seconds_total", "teacher_fingerprint"):
        assert (first.value(f"gristmill_{name}") or 0) > 0, name
    for place in ("run", "checkpoints"):
        free, size = (first.value(f"gristmill_disk_{what}_bytes", place=place) for what in ("free", "size"))
        assert 0 < (free or 0) < (size or 0)
    assert first.value("gristmill_memory_expected_age_steps", memory="instance.queue") == 1.5
    assert first.value("gristmill_memory_nonfinite_rows", memory="instance.queue") == 0


def test_states_come_in_their_order(attempts: tuple[Attempt, Attempt]):
    first, second = attempts
    entered = ["starting", "restoring", "probing", "checkpointing", "training"]
    assert [state for state in dict.fromkeys(first.states) if state != "ending"] == entered
    assert first.states[-1] == second.states[-1] == "ending"
    assert first.value("gristmill_state", state="ending") == 1


def test_the_second_attempt_goes_on_counting(attempts: tuple[Attempt, Attempt]):
    first, second = attempts
    assert second.ending.code == 0
    assert second.value("gristmill_attempts") == 2
    assert second.value("gristmill_interruptions_total", cause="signal") == 1
    assert second.value("gristmill_interruptions_total", cause="killed") == 0
    assert second.value("gristmill_step") == STEPS
    name = "gristmill_wall_seconds_total"
    spent = {state: [each.served[name, (("state", state),)] for each in attempts] for state in SPENT}
    assert all(before <= after for before, after in spent.values()), spent
    for number, each in enumerate(attempts):
        ledger, last = each.ledger, each.value("gristmill_last_step_timestamp_seconds")
        assert {state: told[number] for state, told in spent.items()} == pytest.approx(ledger.spent)
        assert sum(ledger.spent.values()) == pytest.approx(ledger.until - ledger.began)
        # Of the run's whole time, from its first attempt's beginning to this one's end.
        assert first.began - CLOCK <= ledger.began == first.ledger.began
        assert last is not None
        assert each.began - CLOCK < last < ledger.until + CLOCK < each.ended + 2 * CLOCK
    assert spent["checkpoint"][0] > 0 < spent["probe"][0]
    assert spent["lost"] == [0.0, 0.0]
    assert second.value("gristmill_cache_limit_bytes") == 10_000_000
    turns = (second.value("gristmill_cache_hits_total") or 0) + (second.value("gristmill_cache_misses_total") or 0)
    assert turns >= STEPS - STOP - 1
    assert second.value("gristmill_storage_retries_total", reason="throttled")
    assert second.value("gristmill_storage_retries_total", reason="broken") == 0
