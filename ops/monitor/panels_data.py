"""Panels of the data path, a row for each part in the order of flow.

At each buffer either side may wait: the one behind it for an item (starved), the one before it for room (blocked). Both
are shown as a share of the time, next to how full the buffer is: the row in which "starved" turns into "blocked" is the
row of the bottleneck (pipeline/stats.py says so in words). All of it is averaged over the chosen ranks.
"""

from __future__ import annotations

from .panels import Dashboard, Panel, PanelRow, Query
from .panels_terms import Agg, Both, Quantile, Rate, Scaled, Take

READY = (("buffer", "ready"),)
ENCODED = (("buffer", "encoded"),)


def rate(metric: str, where: tuple[tuple[str, str], ...] = ()) -> Rate:
    return Rate(Take(metric, where))


def total(metric: str, where: tuple[tuple[str, str], ...] = (), *, by: tuple[str, ...] = ()) -> Agg:
    return Agg("sum", rate(metric, where), by)


def mean(metric: str, where: tuple[tuple[str, str], ...] = ()) -> Agg:
    """Of a counter of seconds: the share of the time, averaged over ranks."""
    return Agg("avg", rate(metric, where))


def fill(where: tuple[tuple[str, str], ...]) -> Both:
    capacity = Agg("sum", Take("gristmill_buffer_capacity_batches", where))
    return Both(Agg("sum", Take("gristmill_buffer_depth_batches", where)), "/", capacity)


def _buffer(name: str, where: tuple[tuple[str, str], ...], before: str, after: str) -> PanelRow:
    starved, blocked = "gristmill_buffer_starved_seconds_total", "gristmill_buffer_blocked_seconds_total"
    lay = Both(total("gristmill_buffer_dwell_seconds_total", where), "/", total("gristmill_steps_total"))
    return PanelRow(
        f"{name} buffer",
        (
            Panel(
                f"{name} buffer: how full",
                f"Batches that wait in the {name.lower()} buffer, of those it can hold: empty means that {before} is too slow.",
                (Query(fill(where), "full"),),
                "ratio",
                low=0,
                high=1,
            ),
            Panel(
                f"{name} buffer: who waits",
                f"Share of the time that {after} waits for a batch (starved), and {before} for room (blocked).",
                (Query(mean(starved, where), f"{after} starved"), Query(mean(blocked, where), f"{before} blocked")),
                "ratio",
                low=0,
                high=1,
            ),
            Panel(
                f"{name} buffer: time in it",
                "How long a batch lay there: data that is fetched ahead of need.",
                (Query(lay, "a batch"),),
                "seconds",
                low=0,
            ),
        ),
    )


_HITS, _MISSES = total("gristmill_cache_hits_total"), total("gristmill_cache_misses_total")
CACHE_HITS = Both(_HITS, "/", Both(_HITS, "+", _MISSES))

_STORAGE = PanelRow(
    "Storage and cache",
    (
        Panel(
            "Read from storage",
            "Bytes of images a second that come out of the shards, all ranks together.",
            (Query(total("gristmill_read_bytes_total"), "read"),),
            "bytes/s",
            low=0,
        ),
        Panel(
            "Storage's part of reading",
            "Share of the reader's working time that passes in calls to disk or network: near 1 the storage is the limit.",
            (
                Query(
                    Both(total("gristmill_storage_seconds_total"), "/", total("gristmill_read_seconds_total")),
                    "storage",
                ),
            ),
            "ratio",
            low=0,
            high=1,
        ),
        Panel(
            "Retries by reason",
            "Requests to the storage that had to be made again: a storage that refuses, throttles or breaks off.",
            (Query(total("gristmill_storage_retries_total", by=("reason",)), "{{reason}}"),),
            "",
            "stacked",
            low=0,
            needs="a remote storage that made a request fail",
        ),
        Panel(
            "Throttled",
            "Share of the time that reading paused because the storage asked for it.",
            (Query(mean("gristmill_storage_throttled_seconds_total"), "throttled"),),
            "ratio",
            low=0,
            needs="a remote storage",
        ),
        Panel(
            "Cache hits",
            "Share of reads that the local cache answers; it should grow towards 1 in the second pass over the data.",
            (Query(CACHE_HITS, "hits"),),
            "ratio",
            low=0,
            high=1,
            needs="a cache",
        ),
        Panel(
            "Cache size and eviction",
            "What the cache holds and may hold; bytes dropped and later read again mean that it is too small.",
            (
                Query(Agg("sum", Take("gristmill_cache_size_bytes")), "held"),
                Query(Agg("sum", Take("gristmill_cache_limit_bytes")), "limit"),
                Query(Scaled(total("gristmill_cache_evicted_bytes_total"), 60), "dropped a minute"),
            ),
            "bytes",
            low=0,
            needs="a cache",
        ),
    ),
)

_READER = PanelRow(
    "Reader",
    (
        Panel(
            "Samples read",
            "Samples a second that the reader hands on, all ranks together.",
            (Query(total("gristmill_read_samples_total"), "samples"),),
            "images/s",
            low=0,
        ),
        Panel(
            "Reader at work",
            "Share of the time that the reader works, its calls to the storage included: at 1 it never rests.",
            (
                Query(mean("gristmill_read_seconds_total"), "reading"),
                Query(mean("gristmill_storage_seconds_total"), "of it in the storage"),
            ),
            "ratio",
            low=0,
        ),
        Panel(
            "Samples replaced",
            "Damaged samples that were replaced and set aside, and samples removed on request, since the process began.",
            (
                Query(Agg("sum", Take("gristmill_substituted_samples_total")), "damaged"),
                Query(Agg("sum", Take("gristmill_removed_samples_total")), "removed"),
                Query(Agg("max", Take("gristmill_quarantined_samples")), "in quarantine"),
            ),
            "images",
            low=0,
        ),
    ),
)

_AUGMENT = PanelRow(
    "Augmentation",
    (
        Panel(
            "Augmentation at work",
            "Share of the time that a batch is being decoded and augmented: at 1 it never rests, and is the limit.",
            (Query(mean("gristmill_augment_seconds_total"), "augmenting"),),
            "ratio",
            low=0,
            span=12,
        ),
        Panel(
            "Images a second of augmentation",
            "What the augmentation can do where nothing keeps it waiting: compare with the images a second of the run.",
            (
                Query(
                    Both(total("gristmill_read_samples_total"), "/", mean("gristmill_augment_seconds_total")), "could"
                ),
                Query(total("gristmill_read_samples_total"), "does"),
            ),
            "images/s",
            low=0,
            span=12,
        ),
    ),
)

STEPS = Agg("avg", rate("gristmill_steps_total"))

_STEP = PanelRow(
    "The step, and what it waits",
    (
        Panel(
            "Exposed data wait",
            "Share of the step that passes waiting for data, on the rank that waits most: what prefetching did not hide.",
            (
                Query(Agg("max", Take("gristmill_data_wait_ratio")), "worst rank"),
                Query(Agg("avg", Take("gristmill_data_wait_ratio")), "mean"),
            ),
            "ratio",
            low=0,
            levels=((0.05, "warn"), (0.2, "bad")),
        ),
        Panel(
            "Step by phase",
            "Where the wall time of a step goes; the phases add up to it.",
            (
                Query(
                    Both(Agg("avg", rate("gristmill_step_phase_seconds_total"), ("phase",)), "/", STEPS, spread=True),
                    "{{phase}}",
                ),
            ),
            "seconds",
            "stacked",
            low=0,
        ),
        Panel(
            "Step time",
            "Half of the steps are quicker than the median; one in a hundred takes longer than the 99th percentile.",
            (
                Query(Quantile(0.5, "gristmill_step_seconds"), "median"),
                Query(Quantile(0.99, "gristmill_step_seconds"), "99th percentile"),
            ),
            "seconds",
            low=0,
        ),
    ),
)

DATA_PATH = Dashboard(
    "data-path",
    "Data path",
    "From the storage to the step, a row for each part in the order of flow: the bottleneck is where waiting changes sides.",
    (
        _STORAGE,
        _READER,
        _buffer("Encoded", ENCODED, "the reader", "the augmentation"),
        _AUGMENT,
        _buffer("Ready", READY, "the augmentation", "the step"),
        _STEP,
    ),
)
