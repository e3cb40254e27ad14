"""Metrics of the run as a whole: where it stands, what it does, what its time went into, what it keeps."""

from .row import CHECKPOINT_BUCKETS, Group, Row

RUN = Group(
    "Run",
    "`ops/train.py` by `ops/monitor/observer.py`",
    (
        Row("run/world", "gauge", "gristmill_world_size", "Processes of the run; each has a port of its own."),
        Row("run/attempts", "gauge", "gristmill_attempts", "Attempts of this run so far, with this one (rank 0)."),
        Row("run/images", "gauge", "gristmill_run_images", "Images of the whole run, from its beginning (rank 0)."),
        Row("state/{state}", "gauge", "gristmill_state", "What this process is doing: 1 for that state, 0 for others."),
        Row("step", "gauge", "gristmill_step", "Steps decided since the run began, over all restarts."),
        Row("position", "gauge", "gristmill_position_samples", "Place of the last decided step in the stream."),
        Row("trained", "gauge", "gristmill_trained_samples", "Samples of committed steps, over all restarts."),
        Row("progress", "gauge", "gristmill_progress_ratio", "Share of the run that is done."),
        Row("time", "gauge", "gristmill_last_step_timestamp_seconds", "When the last step was decided."),
    ),
)

GOODPUT = Group(
    "Goodput over restarts",
    "`ops/monitor/goodput.py`, on rank 0, kept in the run folder's goodput.json",
    (
        Row(
            "spent/{spent}",
            "total",
            "gristmill_wall_seconds_total",
            "Wall time of the run by what it went into, over all its attempts; together the time from the start of the "
            "first one to the last step decided. lost: steps taken again after a restart, and what a dying attempt was "
            "about; down: between attempts.",
            late=True,
        ),
        Row(
            "interruptions/{cause}",
            "total",
            "gristmill_interruptions_total",
            "Attempts of the run that ended before all images were seen, by cause.",
            late=True,
        ),
    ),
)

CHECKPOINTS = Group(
    "Checkpoints and disks",
    "`ops/writer.py` and `ops/monitor/disks.py`",
    (
        Row(
            "checkpoint/{result}",
            "add",
            "gristmill_checkpoints_total",
            "Checkpoints tried by this process, by result (good ones on rank 0).",
        ),
        Row("checkpoint/seconds", CHECKPOINT_BUCKETS, "gristmill_checkpoint_seconds", "Time to write a checkpoint."),
        Row("checkpoint/bytes", "gauge", "gristmill_checkpoint_size_bytes", "Size of the last good checkpoint."),
        Row(
            "checkpoint/time",
            "gauge",
            "gristmill_checkpoint_last_success_timestamp_seconds",
            "When the last good checkpoint was complete on disk.",
        ),
        Row(
            "checkpoint/position",
            "gauge",
            "gristmill_checkpoint_last_position_samples",
            "Position of the last good checkpoint, or of the one that this attempt went on from (rank 0).",
        ),
        Row(
            "checkpoint/every",
            "gauge",
            "gristmill_checkpoint_every_samples",
            "Images between checkpoints, as the recipe has it (rank 0).",
        ),
        Row(
            "disk/{place}/free",
            "gauge",
            "gristmill_disk_free_bytes",
            "Room on the disk of the run folder, the checkpoints or the cache (first process of each node).",
        ),
        Row("disk/{place}/size", "gauge", "gristmill_disk_size_bytes", "Size of that disk."),
    ),
)
