"""Ranks of a run that was thought up, for tests of whatever reads metrics: what they say at a time, and as series of promtool.

Time begins with the process, at 0. Gauges stand still, counters grow evenly: what an expression over hours sees of such a
process is what one over seconds sees.
"""

import re
from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

Key = tuple[str, tuple[tuple[str, str], ...]]
NOW = 7200.0  # seconds after its beginning at which a process is looked at
BACK = 10.0  # seconds that the look before lies back
STATES = ("starting", "restoring", "training", "probing", "checkpointing", "refreshing", "ending")
COUNTER = re.compile(r".*(_total|_seconds_sum|_seconds_count)")


class Process:
    """One rank that is well. `say` and `grow` change what it says; usable as a collector of a registry, at time NOW."""

    def __init__(self, rank: int = 0, world: int = 2, run: str = "first", node: str = "a"):
        self.rank, self.labels = rank, {"run": run, "rank": str(rank), "node": node}
        self.at = NOW
        self.gauges: dict[Key, float] = {}
        self.rates: dict[Key, float] = {}
        self.say("gristmill_run_info", 1, run="recipe", device="cpu", precision="fp32", zero="1")
        for state in STATES:
            self.say("gristmill_state", state == "training", state=state)
        for name, value in GAUGES.items():
            self.say(name, value)
        self.say("gristmill_world_size", world)
        for (name, label), members in MEMBERS.items():
            for member, value in members.items():
                (self.grow if COUNTER.fullmatch(name) else self.say)(name, value, **{label: member})
        for objective, signs in SIGNS.items():
            for name, value in signs.items():
                self.say("gristmill_objective_health", value, objective=objective, name=name)
        for probe, value in PROBES.items():
            self.say("gristmill_probe_ratio", value, probe=probe, who="teacher")
        for name, value in RATES.items():
            self.grow(name, value)

    def say(self, name: str, value: float, /, **labels: str) -> None:
        """The value of a gauge."""
        self.gauges[name, tuple(sorted(labels.items()))] = float(value)

    def grow(self, name: str, rate: float, /, **labels: str) -> None:
        """What a counter grows by in a second."""
        self.rates[name, tuple(sorted(labels.items()))] = rate

    def value(self, name: str, /, **labels: str) -> float:
        key = name, tuple(sorted(labels.items()))
        return self.gauges[key] if key in self.gauges else self.rates[key] * self.at

    def samples(self, at: float) -> Iterator[tuple[str, dict[str, str], float]]:
        for values, times in ((self.gauges, 1.0), (self.rates, at)):
            for (name, labels), value in values.items():
                yield name, dict(labels), value * times

    def text(self, at: float = NOW) -> str:
        """Its page at a time."""
        lines = []
        for name, labels, value in self.samples(at):
            inside = ",".join(f'{label}="{member}"' for label, member in labels.items())
            lines.append(f"{name}{{{inside}}} {value!r}\n")
        return "".join(lines)

    def series(self, interval: float, **labels: str) -> Iterator[dict[str, str]]:
        """Its series for `promtool test rules` from 0 to NOW, a sample every `interval` seconds. labels: of its target."""
        where = f"{self.labels['node']}:{9464 + self.rank}"
        target = {**self.labels, "job": "gristmill", "instance": where, **labels}
        times = round(NOW / interval)
        up: dict[Key, float] = {("up", ()): 1.0}
        for values, growing in (({**self.gauges, **up}, False), (self.rates, True)):
            for (name, own), value in values.items():
                inside = ",".join(f'{label}="{member}"' for label, member in {**dict(own), **target}.items())
                start, step = (0.0, value * interval) if growing else (value, 0.0)
                yield {"series": f"{name}{{{inside}}}", "values": f"{start!r}+{step!r}x{times}"}

    def collect(self) -> Iterable[Metric]:
        families: dict[str, Metric] = {}
        for name, labels, value in self.samples(self.at):
            plain = name.removesuffix("_total")
            if name not in families:
                kind = CounterMetricFamily if plain != name else GaugeMetricFamily
                families[name] = kind(plain, "As in the catalogue.")
            families[name].add_sample(name, labels, value)
        return families.values()

    def registry(self) -> CollectorRegistry:
        registry = CollectorRegistry()
        registry.register(self)  # pyright: ignore[reportArgumentType]
        return registry


GAUGES = {
    "process_start_time_seconds": 0.0,
    "process_resident_memory_bytes": 2.0**30,
    "gristmill_attempts": 1,
    "gristmill_run_images": 1e6,
    "gristmill_step": 15_625,
    "gristmill_position_samples": 5e5,
    "gristmill_progress_ratio": 0.5,
    "gristmill_last_step_timestamp_seconds": NOW - 0.5,
    "gristmill_mixture_loss": 4.5,
    "gristmill_gradient_norm": 1.5,
    "gristmill_learning_rate": 1e-3,
    "gristmill_teacher_momentum": 0.996,
    "gristmill_teacher_distance_ratio": 0.05,
    "gristmill_data_wait_ratio": 0.02,
    "gristmill_quarantined_samples": 3,
    "gristmill_checkpoint_last_success_timestamp_seconds": NOW - 100,
    "gristmill_checkpoint_last_position_samples": 4.9e5,
    "gristmill_checkpoint_every_samples": 4e4,
    "gristmill_checkpoint_size_bytes": 1e9,
    "gristmill_cache_size_bytes": 9e9,
    "gristmill_cache_limit_bytes": 1e10,
}
MEMBERS = {
    ("gristmill_loss", "objective"): {"instance": 4.0, "group": 3.0, "bootstrap": 0.5, "clusters": 2.0},
    ("gristmill_loss_weight", "objective"): {"instance": 1.0, "group": 0.5},
    ("gristmill_memory_fill_ratio", "memory"): {"instance.queue": 1.0, "bank": 0.5},
    ("gristmill_memory_age_steps", "memory"): {"instance.queue": 8.5},
    ("gristmill_memory_expected_age_steps", "memory"): {"instance.queue": 8.5},
    ("gristmill_memory_norm_mean", "memory"): {"instance.queue": 1.0, "bank": 5.0},
    ("gristmill_memory_nonfinite_rows", "memory"): {"instance.queue": 0},
    ("gristmill_disk_free_bytes", "place"): {"run": 4e11, "checkpoints": 4e11},
    ("gristmill_disk_size_bytes", "place"): {"run": 1e12, "checkpoints": 1e12},
    ("gristmill_buffer_depth_batches", "buffer"): {"ready": 3, "encoded": 2},
    ("gristmill_buffer_capacity_batches", "buffer"): {"ready": 4, "encoded": 8},
    ("gristmill_buffer_starved_seconds_total", "buffer"): {"ready": 0.01, "encoded": 0.1},
    ("gristmill_buffer_blocked_seconds_total", "buffer"): {"ready": 0.6, "encoded": 0.5},
    ("gristmill_step_phase_seconds_total", "phase"): {
        "data_wait": 0.02, "forward": 0.4, "backward": 0.5, "verdict": 0.06, "checkpoint": 0.02,
    },
    ("gristmill_wall_seconds_total", "state"): {"productive": 0.9, "data_wait": 0.02, "probe": 0.08},
    ("gristmill_interruptions_total", "cause"): {"killed": 0, "signal": 0, "error": 0},
    ("gristmill_checkpoints_total", "result"): {"ok": 1 / 600, "failed": 0},
    ("gristmill_storage_retries_total", "reason"): {"timeout": 0, "server": 0.01},
}  # fmt: skip
SIGNS = {
    "instance": {"accuracy": 0.5, "positive_similarity": 0.8},
    "group": {"teacher_entropy_ratio": 0.5, "batch_entropy_ratio": 0.9, "center_norm": 0.5},
    "bootstrap": {"prediction_std": 0.8, "target_std": 0.7},
    "clusters": {"used": 0.98},
    "hierarchy": {"level0_reseeded": 2},
}
PROBES = {"coarse_knn": 0.6, "feature_std": 0.8, "rank_me": 30.0}
RATES = {
    "gristmill_steps_total": 2.0,
    "gristmill_step_seconds_sum": 1.0,
    "gristmill_images_total": 64.0,
    "gristmill_rank_own_seconds_total": 0.42,
    "gristmill_read_seconds_total": 0.2,
    "gristmill_storage_seconds_total": 0.05,
    "gristmill_augment_seconds_total": 0.3,
    "gristmill_read_samples_total": 64.0,
    "gristmill_read_bytes_total": 1e6,
    "gristmill_substituted_samples_total": 0.0,
    "gristmill_bad_steps_total": 0.0,
    "gristmill_rollbacks_total": 0.0,
    "gristmill_teacher_updates_total": 2.0,
    "gristmill_teacher_fingerprint": 1.0,
    "gristmill_storage_throttled_seconds_total": 0.0,
    "gristmill_cache_hits_total": 1.0,
    "gristmill_cache_misses_total": 0.25,
    "gristmill_cache_evicted_bytes_total": 1e5,
}
