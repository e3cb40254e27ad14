"""The numbers of the flow's picture at the top of the board, as terms: seconds a second of work and of waiting, and fill.

They feed the loader's own rule for the bottleneck (pipeline/stats.py), averaged over ranks; the wait is the worst rank's.
"""

from __future__ import annotations

from .labels import APART, PHASES
from .panels_data import CACHE_HITS, ENCODED, READY, fill, mean, rate, total
from .panels_terms import Agg, Both, Quantile, Take, Term

WAIT = (("phase", "data_wait"),)
STEP = (("phase", "|".join(phase for phase in PHASES if phase not in APART)),)


def by_rank(metric: str, where: tuple[tuple[str, str], ...] = ()) -> Agg:
    return Agg("sum", rate(metric, where), ("rank",))


# What the flow's picture on the page is drawn from, as seconds a second and shares, averaged over ranks.
FLOW: dict[str, Term] = {
    "read_seconds": mean("gristmill_read_seconds_total"),
    "storage_seconds": mean("gristmill_storage_seconds_total"),
    "augment_seconds": mean("gristmill_augment_seconds_total"),
    "starved_seconds": mean("gristmill_buffer_starved_seconds_total", READY),
    "blocked_seconds": mean("gristmill_buffer_blocked_seconds_total", READY),
    "hungry_seconds": mean("gristmill_buffer_starved_seconds_total", ENCODED),
    "encoded_blocked_seconds": mean("gristmill_buffer_blocked_seconds_total", ENCODED),
    "ready_fill": fill(READY),
    "encoded_fill": fill(ENCODED),
    "ready_depth": Agg("sum", Take("gristmill_buffer_depth_batches", READY)),
    "ready_capacity": Agg("sum", Take("gristmill_buffer_capacity_batches", READY)),
    "encoded_depth": Agg("sum", Take("gristmill_buffer_depth_batches", ENCODED)),
    "encoded_capacity": Agg("sum", Take("gristmill_buffer_capacity_batches", ENCODED)),
    "data_wait": Agg(
        "max",
        Both(
            by_rank("gristmill_step_phase_seconds_total", WAIT),
            "/",
            by_rank("gristmill_step_phase_seconds_total", STEP),
        ),
    ),
    "step_seconds": Quantile(0.5, "gristmill_step_seconds"),
    "bytes": total("gristmill_read_bytes_total"),
    "samples": total("gristmill_read_samples_total"),
    "cache_hits": CACHE_HITS,
}
