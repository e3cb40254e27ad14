"""Panels of an ingest: how far it is, and what becomes of its inputs. Its exporter is a target of its own."""

from __future__ import annotations

from .panels import Dashboard, Panel, PanelRow, Query
from .panels_terms import Agg, Both, Only, Rate, Take, Top


def _ingest(metric: str) -> Take:
    return Take(f"gristmill_ingest_{metric}")


INGEST = Dashboard(
    "ingest",
    "Ingest",
    "From sources to shards: every input ends in one outcome.",
    (
        PanelRow(
            "Progress",
            (
                Panel(
                    "Inputs done",
                    "Share of the inputs that workers are through with.",
                    (Query(Both(Agg("sum", _ingest("done_inputs")), "/", Agg("sum", _ingest("inputs"))), "done"),),
                    "ratio",
                    "stat",
                    span=6,
                    low=0,
                    high=1,
                    needs="an ingest",
                ),
                Panel(
                    "Shards written",
                    "Shards that are complete on disk, of this start.",
                    (Query(Agg("sum", _ingest("shards_total")), "shards"),),
                    "",
                    "stat",
                    span=6,
                    needs="an ingest",
                ),
                Panel(
                    "In hand",
                    "Units of work that workers have in hand: near 0 they wait for sources.",
                    (Query(Agg("sum", _ingest("in_flight_units")), "units"),),
                    "",
                    "stat",
                    span=6,
                    needs="an ingest",
                ),
                Panel(
                    "Kept",
                    "Share of the inputs decided that went into the data set.",
                    (
                        Query(
                            Both(
                                Agg("sum", Take("gristmill_ingest_items_total", (("outcome", "kept"),))),
                                "/",
                                Agg("sum", _ingest("items_total")),
                            ),
                            "kept",
                        ),
                    ),
                    "ratio",
                    "stat",
                    span=6,
                    low=0,
                    high=1,
                    needs="an ingest",
                ),
            ),
        ),
        PanelRow(
            "Flow",
            (
                Panel(
                    "Inputs a second by outcome",
                    "What becomes of the inputs; a reason that grows is a source that has gone bad.",
                    (Query(Agg("sum", Rate(_ingest("items_total")), ("outcome",)), "{{outcome}}"),),
                    "inputs/s",
                    "stacked",
                    span=12,
                    low=0,
                    needs="an ingest",
                ),
                Panel(
                    "Bytes",
                    "Bytes of images that came in and that went into shards.",
                    (Query(Agg("sum", Rate(_ingest("bytes_total")), ("direction",)), "{{direction}}"),),
                    "bytes/s",
                    span=12,
                    low=0,
                    needs="an ingest",
                ),
                Panel(
                    "Outcomes so far",
                    "Inputs by what became of them, in this start.",
                    (Query(Top(20, Only(Agg("sum", _ingest("items_total"), ("outcome",)), ">", 0)), "{{outcome}}"),),
                    "",
                    "bar",
                    span=12,
                    needs="an ingest",
                ),
                Panel(
                    "Requests tried again",
                    "Requests a second that were tried again, by reason: hosts that throttle or break off.",
                    (Query(Agg("sum", Rate(_ingest("retries_total")), ("reason",)), "{{reason}}"),),
                    "",
                    "stacked",
                    span=12,
                    low=0,
                    needs="an ingest from URLs whose hosts failed",
                ),
            ),
        ),
    ),
    scope=("instance",),
)
