"""Alerts on a run as a whole: does it move, are all ranks there, how fast is it, are its checkpoints and its disk well.

A step waits for all ranks, so what happens to one happens to the run: alerts name the run, and the one rank that is to
blame where there is one. Whether anybody is woken depends on whether training goes on: an exporter that nobody can
reach is a matter for the morning, a rank that is gone is not.
"""

from .alert import EACH, Alert, Record
from .labels import APART

WORK = f'phase!~"{"|".join(APART)}"'
# Ranks that the run has and nobody hears of: those that count themselves in, against targets that do not answer.
SILENT = '(run:gristmill_missing:ranks > 0 or count by (run) (up{job="gristmill"} == 0))'
OWN, MEDIAN = "rank:gristmill_own:seconds", "run:gristmill_own:seconds"
FREE = 'min by (run, node, place) (gristmill_disk_free_bytes{place!="cache"})'
SPENT = "sum by (run) (increase(gristmill_wall_seconds_total[$21600s]))"
SLOWED = ("GristmillThroughputDrop", "GristmillGoodputLow")
# Gauges of a run that stands still say what they said last.
STALE = ("GristmillContrastAtChance", "GristmillMatchesAtChance", "GristmillNeighboursCollapsed")
STARVED = ("GristmillStarvedByStorage", "GristmillStarvedByReader", "GristmillStarvedByAugmentation")

RECORDS: tuple[Record, ...] = (
    # Zero while the run does something else than steps; those states have an alert of their own.
    Record(
        "run:gristmill_standstill:seconds",
        "clamp_min(time() - max by (run) (gristmill_last_step_timestamp_seconds), 0)"
        ' * on (run) max by (run) (gristmill_state{state="training"})',
    ),
    Record(
        "run:gristmill_missing:ranks",
        "max by (run) (gristmill_world_size) - count by (run) (gristmill_world_size)",
    ),
    Record("run:gristmill_progress:ratio", "max by (run) (gristmill_progress_ratio)"),
    Record(
        "rank:gristmill_step:seconds",
        f"sum by ({EACH}) (rate(gristmill_step_phase_seconds_total{{{WORK}}}[$600s]))"
        f" / sum by ({EACH}) (rate(gristmill_steps_total[$600s])) > 0",
    ),
    Record("run:gristmill_step:seconds", "max by (run) (rank:gristmill_step:seconds)"),
    Record(
        OWN,
        f"clamp_min(sum by ({EACH}) (rate(gristmill_rank_own_seconds_total[$600s]))"
        f' - sum by ({EACH}) (rate(gristmill_step_phase_seconds_total{{phase="data_wait"}}[$600s])), 0)'
        f" / sum by ({EACH}) (rate(gristmill_steps_total[$600s])) > 0",
    ),
    # The median over ranks; of an even number the lower of the two in the middle, as that of two is the mean of both.
    Record(MEDIAN, f"max by (run) ({OWN} <= on (run) group_left () quantile by (run) (0.5, {OWN}))"),
    Record(
        "run:gristmill_goodput:ratio",
        f'sum by (run) (increase(gristmill_wall_seconds_total{{state="productive"}}[$21600s])) / {SPENT}',
    ),
)

ALERTS: tuple[Alert, ...] = (
    Alert(
        "GristmillRanksMissing",
        "page",
        f"{SILENT} unless on (run) run:gristmill_standstill:seconds < $300",
        "Processes of the run do not answer, and training does not go on.",
        "A process was killed or its node is gone, and nothing has started the run again.",
        hold=300,  # so long a launcher has to start the group again
        masks=(
            *("GristmillNoProgress", "GristmillStateStuck", "GristmillCheckpointOverdue", "GristmillCheckpointFailed"),
            *("GristmillExporterDown", "GristmillStraggler", *STARVED, *SLOWED, *STALE),
        ),
    ),
    Alert(
        "GristmillExporterDown",
        "warn",
        f"{SILENT} and on (run) run:gristmill_standstill:seconds < $300",
        "Processes of the run do not answer on their metrics ports, though training goes on.",
        "A firewall, a wrong metrics.address, an expired certificate, or a port that another program took.",
        hold=300,
    ),
    Alert(
        "GristmillRunVanished",
        "warn",
        # Nobody sees the last step of a run that ends; two minutes at its pace are as good as the end.
        "max by (run) (last_over_time(gristmill_progress_ratio[$3600s])"
        " + $120 * deriv(gristmill_progress_ratio[$3600s])) < 1"
        ' unless on (run) up{job="gristmill"}'
        ' unless on (run) max_over_time(gristmill_state{state="ending"}[$3600s]) == 1',
        "The run is gone from monitoring, and it had not come to its end.",
        "Its job was removed together with its targets, or somebody took the targets away.",
        hold=600,
        value="ratio",
    ),
    Alert(
        "GristmillNoProgress",
        "page",
        "run:gristmill_standstill:seconds > $900",
        "No step was decided for fifteen minutes, though the processes answer.",
        "A rank hangs in a collective or on a device, or the storage does not answer.",
        value="seconds",
        masks=("GristmillCheckpointOverdue", "GristmillStraggler", *STARVED, *SLOWED, *STALE),
    ),
    Alert(
        "GristmillStateStuck",
        "page",
        'max by (run, state) (gristmill_state{state=~"starting|restoring|probing|checkpointing|ending"}) == 1',
        "The run has been doing something else than training for an hour.",
        "A store that does not answer while a checkpoint is read or written, or a probe on far too many images.",
        hold=3600,
        masks=("GristmillCheckpointOverdue", "GristmillGoodputLow"),
    ),
    Alert(
        "GristmillRestartLoop",
        "page",
        'sum by (run) (increase(gristmill_interruptions_total{cause=~"killed|error"}[$7200s])) > 2.5',
        "The run failed and was started again three times within two hours.",
        "An error that comes back after each restart: memory that does not suffice, a bad node, a broken shard.",
        keep=1800,
        masks=("GristmillRanksMissing", "GristmillCheckpointOverdue", *SLOWED),
    ),
    Alert(
        "GristmillThroughputDrop",
        "warn",
        "run:gristmill_step:seconds"
        " / quantile_over_time(0.5, run:gristmill_step:seconds[$10800s] offset $900s) > 1.4"
        " unless on (run) max by (run) (changes(gristmill_world_size[$10800s])) > 0",
        "A step takes 1.4 times as long as its median over the last three hours, on as many ranks as before.",
        "A device that runs hot, another job on a node, a slower link, or other work for the step.",
        hold=1800,  # longer than what masks it, which may cross its own threshold some minutes later
        keep=900,
        masks=("GristmillGoodputLow",),
    ),
    Alert(
        "GristmillStraggler",
        "warn",
        f"topk by (run) (1, {OWN} / on (run) group_left () {MEDIAN}) > 1.3"
        f" and on ({EACH}) {OWN} - on (run) group_left () {MEDIAN}"
        " > on (run) group_left () 0.1 * run:gristmill_step:seconds",
        "One rank needs much longer for its own part of a step than the others, which wait for it.",
        "A hot or faulty device, other work on that node, or fewer processor cores than elsewhere.",
        hold=900,
        keep=600,
        masks=SLOWED,
    ),
    Alert(
        "GristmillGoodputLow",
        "warn",
        "run:gristmill_goodput:ratio < 0.7 and on (run) sum by (run) (gristmill_wall_seconds_total) > $10800",
        "Less than 70 % of the last six hours went into steps that count.",
        "Restarts, waiting for data, long checkpoints or probes; the states of the wall time say which.",
        hold=1800,
        keep=1800,
        value="ratio",
    ),
    Alert(
        "GristmillCheckpointOverdue",
        "page",
        "(max by (run) (gristmill_position_samples) - max by (run) (gristmill_checkpoint_last_position_samples))"
        " / max by (run) (gristmill_checkpoint_every_samples) > 2.5"
        " unless on (run) time() - max by (run) (gristmill_checkpoint_last_success_timestamp_seconds) < $1800",
        "No checkpoint was completed for two and a half intervals and at least half an hour: a crash now costs all of it.",
        "Checkpoints fail, or the one under way does not end.",
        hold=300,
    ),
    Alert(
        "GristmillCheckpointFailed",
        "warn",
        'max by (run) (increase(gristmill_checkpoints_total{result="failed"}[$3600s])) > 0',
        "A checkpoint could not be written; the run goes on, and its last good checkpoint is kept.",
        "A full disk, a quota, or a store that refuses.",
        hold=300,  # longer than that of a full disk, which masks it and may be as young
    ),
    Alert(
        "GristmillDiskFull",
        "page",
        'min by (run, node, place) (gristmill_disk_free_bytes{place="checkpoints"})'
        " < on (run) group_left () 1.5 * max by (run) (gristmill_checkpoint_size_bytes)"
        # The first one, before any step, is a third of those that follow: no moments, and nothing in the memories.
        ' or min by (run, node, place) (gristmill_disk_free_bytes{place="checkpoints"})'
        " < on (run) group_left () 5 * max by (run) (gristmill_checkpoint_size_bytes)"
        ' and on (run) sum by (run) (increase(gristmill_checkpoints_total{result="failed"}[$3600s])) > 0'
        f" or {FREE} < 0.01 * min by (run, node, place) (gristmill_disk_size_bytes)",
        "The disk has no room for another checkpoint.",
        "Old runs or checkpoints that are kept for good, or another user of the disk.",
        hold=120,
        keep=1800,  # each checkpoint that fails gives back what it took, and makes room for a while
        value="bytes",
        masks=("GristmillDiskFilling", "GristmillCheckpointFailed", "GristmillCheckpointOverdue"),
    ),
    Alert(
        "GristmillDiskFilling",
        "warn",
        'min by (run, node, place) (predict_linear(gristmill_disk_free_bytes{place!="cache"}[$21600s], $86400)) < 0'
        f" and on (run, node, place) {FREE} / min by (run, node, place) (gristmill_disk_size_bytes) < 0.3"
        " and on (run, node, place) gristmill_disk_free_bytes offset $10800s"
        # A cache that still grows into its share says nothing about tomorrow.
        " unless on (run, node) gristmill_cache_size_bytes < 0.95 * gristmill_cache_limit_bytes",
        "At the pace of the last six hours the disk will be full within a day.",
        "checkpoint.keep_every keeps many, logs or captures grow, or somebody else writes there.",
        hold=3600,
        value="bytes",
        masks=("GristmillCheckpointFailed",),
    ),
    Alert(
        "GristmillTooManySeries",
        "warn",
        'sum by (run) (scrape_samples_scraped{job="gristmill"}) / count by (run) (gristmill_world_size) > 450',
        "A process serves more series than the 450 that monitoring is planned for.",
        "A recipe with very many objectives or memories, or a fault in a metric's labels.",
        hold=900,
    ),
)
