"""Panels of the run as a whole: overview, ranks, checkpoints and goodput.

Goodput is counted by rank 0 over all attempts of the run (its seconds by state sum to the wall time), so that a share of
any window comes from the same counters. A slow rank makes all others wait: its own time tells it apart.
"""

from __future__ import annotations

from typing import Any

from .panels import Dashboard, Panel, PanelRow, Query, Unit
from .panels_data import STEPS, rate
from .panels_learning import PROBES
from .panels_terms import Age, Agg, Both, Only, Quantile, Rate, Take, Term, Top

RANK = ("rank",)


def _zero(metric: str, where: tuple[tuple[str, str], ...] = ()) -> Take:
    """What only rank 0 knows."""
    return Take(metric, where, ranked=False)


def _one(metric: str) -> Agg:
    """What all ranks know alike."""
    return Agg("max", _zero(metric))


# Images of a step are those of all ranks, counted on each.
IMAGES_A_SECOND = Agg("max", rate("gristmill_images_total"))
GOODPUT = Both(
    Agg("sum", _zero("gristmill_wall_seconds_total", (("state", "productive"),))),
    "/",
    Agg("sum", _zero("gristmill_wall_seconds_total")),
)
LEFT = Both(Both(_one("gristmill_run_images"), "-", _one("gristmill_position_samples")), "/", IMAGES_A_SECOND)
OWN = Both(
    Agg("sum", rate("gristmill_rank_own_seconds_total"), RANK), "/", Agg("sum", rate("gristmill_steps_total"), RANK)
)
SPENT = Rate(_zero("gristmill_wall_seconds_total"))  # booked a step at a time, hence shown as shares
AGE = Agg("max", Age(_zero("gristmill_checkpoint_last_success_timestamp_seconds")))


# What the top of the page says in one line.
HEAD: dict[str, Term] = {
    "progress": _one("gristmill_progress_ratio"),
    "position": _one("gristmill_position_samples"),
    "images": _one("gristmill_run_images"),
    "step": _one("gristmill_step"),
    "speed": IMAGES_A_SECOND,
    "left": LEFT,
    "loss": Agg("avg", Take("gristmill_mixture_loss")),
    "state": Only(Agg("max", _zero("gristmill_state"), ("state",)), "==", 1),
}


def _share(phase: str, by: tuple[str, ...]) -> Both:
    """Of the step that passes in one phase, by rank."""
    return Both(
        Agg("sum", rate("gristmill_step_phase_seconds_total", (("phase", phase),)), by),
        "/",
        Agg("sum", rate("gristmill_step_seconds_sum"), by),
    )


def _stat(title: str, help_: str, term: Term, unit: Unit = "", **more: Any) -> Panel:
    return Panel(title, help_, (Query(term, ""),), unit, "stat", **{"span": 4, **more})


OVERVIEW = Dashboard(
    "overview",
    "Overview",
    "Is the run well: how far it is, how fast, what it does now, and whether it learns.",
    (
        PanelRow(
            "Now",
            (
                _stat("Done", "Share of the run's images that are behind it.", _one("gristmill_progress_ratio"), "ratio", low=0, high=1),
                _stat(
                    "Time left",
                    "Until the last image at the present pace, without stops.",
                    LEFT,
                    "seconds",
                ),
                _stat("Images a second", "Of all ranks together, checkpoints and probes left out of account.", IMAGES_A_SECOND, "images/s", low=0),
                _stat("Exposed data wait", "Share of the step that waits for data, on the rank that waits most.", Agg("max", Take("gristmill_data_wait_ratio")), "ratio", low=0, levels=((0.05, "warn"), (0.2, "bad"))),
                _stat("Goodput", "Share of the wall time since the run began, over all attempts, that went into steps that stayed.", GOODPUT, "ratio", low=0, high=1, levels=((0.85, "warn"), (0.6, "bad")), below=True),
                _stat("Steps left out", "By this process, since a loss or a gradient was not finite.", Agg("max", Take("gristmill_bad_steps_total")), "steps", low=0, levels=((1, "warn"), (10, "bad"))),
            ),
        ),
        PanelRow(
            "Course",
            (
                Panel(
                    "What it does",
                    "The run's state: training should be nearly all of it.",
                    (Query(Only(Agg("max", _zero("gristmill_state"), ("state",)), "==", 1), "{{state}}"),),
                    "",
                    "state",
                    span=12,
                ),
                Panel(
                    "Wall time by state",
                    "Shares of the wall time: what is not productive is the price of stops, waits and checkpoints.",
                    (Query(Both(Agg("sum", SPENT, ("state",)), "/", Agg("sum", SPENT), spread=True), "{{state}}"),),
                    "ratio",
                    "stacked",
                    span=12,
                    low=0,
                    high=1,
                ),
                Panel("Loss", "Of the mixture, and by objective before its weight.", (
                    Query(Agg("avg", Take("gristmill_mixture_loss")), "mixture"),
                    Query(Agg("avg", Take("gristmill_loss"), ("objective",)), "{{objective}}"),
                ), span=12),
                PROBES,
                Panel("Speed", "Images a second, all ranks together.", (Query(IMAGES_A_SECOND, "images"),), "images/s", low=0),
                Panel("Crops and tokens", "What goes through the student a second: crops of all ranks, and the tokens they are cut into.", (
                    Query(Agg("max", rate("gristmill_crops_total")), "crops"),
                    Query(Agg("max", rate("gristmill_tokens_total")), "tokens"),
                ), log=True),
                Panel("Arithmetic", "Floating-point operations a second that the model asks for, all ranks together.", (
                    Query(Agg("sum", rate("gristmill_model_flops_total")), "model"),
                ), "flops/s", low=0),
                Panel("Model FLOPs utilisation", "What the model asks for, of what the devices can do at most.", (
                    Query(Both(Agg("sum", rate("gristmill_model_flops_total")), "/", Agg("sum", Take("gristmill_peak_flops_per_second"))), "utilisation"),
                ), "ratio", low=0, needs="a GPU whose peak is known"),
                Panel("Step time", "Median and 99th percentile of a step.", (
                    Query(Quantile(0.5, "gristmill_step_seconds"), "median"),
                    Query(Quantile(0.99, "gristmill_step_seconds"), "99th percentile"),
                ), "seconds", low=0),
                Panel("Exposed data wait", "Share of the step that passes waiting for data: the step should wait for nothing.", (
                    Query(Agg("max", Take("gristmill_data_wait_ratio")), "worst rank"),
                ), "ratio", low=0, levels=((0.05, "warn"), (0.2, "bad"))),
            ),
        ),
    ),
)  # fmt: skip

RANKS = Dashboard(
    "ranks",
    "Ranks",
    "Which process is missing, slow or short of memory. Lines are the ten greatest.",
    (
        PanelRow(
            "All there?",
            (
                _stat("Ranks that answer", "Of the ranks of the run, those whose metrics can be read.", Both(Agg("count", Take("gristmill_step")), "/", _one("gristmill_world_size")), "ratio", span=6, low=0, high=1, levels=((1, "bad"),), below=True),
                _stat("Ranks of the run", "Processes that train together.", _one("gristmill_world_size"), span=6),
                _stat("Slowest over mean", "Own time of the slowest rank over the mean: all wait for it.", Both(Agg("max", OWN), "/", Agg("avg", OWN)), span=6, low=1, levels=((1.15, "warn"), (1.3, "bad"))),
                _stat("Steps apart", "Between the rank that is furthest and the one that is least; more than 1 cannot be.", Both(Agg("max", Take("gristmill_step")), "-", Agg("min", Take("gristmill_step"))), "steps", span=6, low=0, levels=((2, "bad"),)),
            ),
        ),
        PanelRow(
            "Time by rank",
            (
                Panel("Own time a step", "Time of a step before a rank waits for others (under ZeRO 3 it waits in there, too): the straggler has the most.", (
                    Query(Top(10, OWN), "rank {{rank}}"),
                ), "seconds", low=0),
                Panel("Waits for data", "Share of the step that each rank waits for data.", (
                    Query(Top(10, _share("data_wait", RANK)), "rank {{rank}}"),
                ), "ratio", low=0),
                Panel("Waits for other ranks", "Share of the step in the exchange of verdicts: the straggler has the least.", (
                    Query(Top(10, _share("verdict", RANK)), "rank {{rank}}"),
                ), "ratio", low=0),
            ),
        ),
        PanelRow(
            "Exchange between ranks",
            (
                Panel("Bytes exchanged", "Bytes a second of each kind of collective operation, mean of the ranks; waiting for them is in the step's phases.", (
                    Query(Agg("avg", rate("gristmill_communication_bytes_total"), ("operation",)), "{{operation}}"),
                ), "bytes/s", "stacked", span=12, low=0, needs="several ranks"),
                Panel("Operations a step", "Collective operations of a step: more of them for the same bytes means smaller pieces.", (
                    Query(Both(Agg("avg", rate("gristmill_communication_calls_total"), ("operation",)), "/", STEPS, spread=True), "{{operation}}"),
                ), "", "stacked", span=12, low=0, needs="several ranks"),
            ),
        ),
        PanelRow(
            "Memory and processors by rank",
            (
                Panel("Memory of the process", "Resident memory; one that grows without end will be killed.", (
                    Query(Top(10, Agg("max", Take("process_resident_memory_bytes"), RANK)), "rank {{rank}}"),
                ), "bytes", low=0),
                Panel("Processors in use", "CPU seconds a second.", (
                    Query(Top(10, Agg("sum", rate("process_cpu_seconds_total"), RANK)), "rank {{rank}}"),
                ), low=0),
                Panel("GPU memory", "Allocated by tensors, reserved from the device, and the most that was.", (
                    Query(Agg("max", Take("gristmill_cuda_memory_bytes"), ("kind",)), "{{kind}}, fullest rank"),
                ), "bytes", low=0, needs="a GPU"),
                Panel("Ranks, side by side", "Newest values; sort by what is suspected.", (
                    Query(Agg("max", Take("gristmill_step"), RANK), "step"),
                    Query(OWN, "own seconds a step"),
                    Query(_share("data_wait", RANK), "share waiting for data"),
                    Query(_share("verdict", RANK), "share waiting for ranks"),
                    Query(Agg("sum", Take("gristmill_substituted_samples_total"), RANK), "damaged samples"),
                ), "", "table", span=24),
            ),
        ),
    ),
)  # fmt: skip

CHECKPOINTS = Dashboard(
    "checkpoints",
    "Checkpoints and goodput",
    "What would be lost if it stopped now, and what stops have cost so far.",
    (
        PanelRow(
            "Goodput",
            (
                _stat("Goodput", "Share of the wall time since the run began, over all attempts, that went into steps that stayed.", GOODPUT, "ratio", span=6, low=0, high=1, levels=((0.85, "warn"), (0.6, "bad")), below=True),
                _stat("Attempts", "Starts of this run so far, this one included.", _one("gristmill_attempts"), span=6, low=0, levels=((5, "warn"),)),
                _stat("Interruptions", "Ends that nobody wanted, over all attempts: kills, signals, errors.", Agg("sum", _zero("gristmill_interruptions_total")), span=6, low=0, levels=((1, "warn"), (5, "bad"))),
                _stat("Returns to an earlier state", "Rollbacks after bad steps in a row, by this process.", Agg("max", Take("gristmill_rollbacks_total")), span=6, low=0, levels=((1, "warn"),)),
                Panel("Where the time went", "Wall time since the run began, over all attempts; the bars sum to it.", (
                    Query(Agg("sum", _zero("gristmill_wall_seconds_total"), ("state",)), "{{state}}"),
                ), "seconds", "bar", span=12, low=0),
                Panel("Interruptions by cause", "Over all attempts.", (
                    Query(Agg("sum", _zero("gristmill_interruptions_total"), ("cause",)), "{{cause}}"),
                ), "", "bar", span=12, low=0),
            ),
        ),
        PanelRow(
            "Checkpoints",
            (
                Panel("Age of the last good one", "What a stop would cost now, at most; it falls to 0 with every checkpoint.", (Query(AGE, "age"),), "seconds", low=0),
                Panel("Images since, in intervals", "Images since the last good checkpoint over the distance asked for: above 2 one is overdue.", (
                    Query(
                        Both(
                            Both(_one("gristmill_position_samples"), "-", _one("gristmill_checkpoint_last_position_samples")),
                            "/",
                            _one("gristmill_checkpoint_every_samples"),
                        ),
                        "intervals",
                    ),
                ), low=0, levels=((2, "bad"),)),
                Panel("Tried, by result", "Checkpoints of this process: one that failed costs nothing until the run stops.", (
                    Query(Agg("sum", _zero("gristmill_checkpoints_total"), ("result",)), "{{result}}"),
                ), "", "bar", low=0),
                Panel("Time to write", "Mean of this process; most of it beside training.", (
                    Query(Both(Agg("sum", _zero("gristmill_checkpoint_seconds_sum")), "/", Agg("sum", _zero("gristmill_checkpoint_seconds_count"))), "mean"),
                ), "seconds", low=0),
                Panel("What steps pay for them", "Share of the step that passes in writing checkpoints.", (
                    Query(Both(Agg("max", rate("gristmill_step_phase_seconds_total", (("phase", "checkpoint"),))), "/", Agg("max", rate("gristmill_step_seconds_sum"))), "checkpoint"),
                ), "ratio", low=0),
                Panel("Size", "Of the last good one on disk.", (Query(Agg("max", _zero("gristmill_checkpoint_size_bytes")), "size"),), "bytes", low=0),
            ),
        ),
        PanelRow(
            "Disks",
            (
                Panel("Free", "Share of the disk that is free, where the run writes.", (
                    Query(Both(Agg("min", Take("gristmill_disk_free_bytes"), ("place",)), "/", Agg("min", Take("gristmill_disk_size_bytes"), ("place",))), "{{place}}"),
                ), "ratio", span=12, low=0, high=1, levels=((0.1, "warn"), (0.03, "bad")), below=True),
                Panel("Free bytes", "A checkpoint is written beside the last one before that goes.", (
                    Query(Agg("min", Take("gristmill_disk_free_bytes"), ("place",)), "{{place}}"),
                ), "bytes", span=12, low=0),
            ),
        ),
    ),
)  # fmt: skip
