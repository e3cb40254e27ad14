"""The catalogue of metrics: under which name a number arrives, and what Prometheus is told it is.

Names are flat and the same as in metrics.jsonl (`loss/instance`, `phase/data_wait`). A name written with {braces}
stands for one series per member of an enumeration below; nothing outside them is ever served, so no file name,
exception text or remote string can become a label. Metrics follow `gristmill_<subject>_<unit>[_total]` in base units.
"""

import re
from typing import NamedTuple

OBJECTIVES = ("instance", "local_group", "group", "patch")
PHASES = ("data_wait", "forward", "backward", "verdict", "optimizer", "ema", "commit", "metrics", "checkpoint", "probe")
HEALTH = (
    "teacher_entropy_ratio",
    "batch_entropy_ratio",
    "center_norm",
    "accuracy",
    "positive_similarity",
    "neighbour_similarity",
    "neighbour_unique_ratio",
    "feature_std",
    "rank_me",
)
MEMORIES = ("instance.queue", "local_group.queue", "local_group.student", "local_group.teacher")
PROBES = (
    *("class_knn", "coarse_knn", "fine_knn"),
    *("class_retrieval", "coarse_retrieval", "fine_retrieval", "instance_retrieval"),
    *("rank_me", "feature_std", "uniformity", "neighbour_agreement"),  # where there are no labels
)
WHO = ("teacher", "student", "pixels", "random", "chance")
RESULTS = ("ok", "failed")

STEP_BUCKETS = tuple(0.001 * 2**k for k in range(17))  # 1 ms to 65 s
CHECKPOINT_BUCKETS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0)


class Row(NamedTuple):
    """One metric: the name under which values arrive, how they are taken, the metric's own name and help.

    kind: "gauge" takes the value, "add" adds it to a counter, "total" takes a running total and adds its growth
    (a total that fell was restarted), anything else is a histogram with these buckets. fixed: labels of this row alone.
    """

    name: str
    kind: str | tuple[float, ...]
    metric: str
    help: str
    fixed: tuple[tuple[str, str], ...] = ()

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the labels: the fixed ones, then those in braces, in order."""
        return (*(label for label, _ in self.fixed), *re.findall(r"{(\w+)}", self.name))


READY = (("buffer", "ready"),)  # batches, augmented, between the loader and the step
ENCODED = (("buffer", "encoded"),)  # samples as they lie in the shards, between reader and augmentation
STARVED = "Time for which the consumer waited on an empty buffer: the part before it is too slow."
BLOCKED = "Time for which the producer waited on a full buffer: the part after it is too slow."

CATALOGUE = (
    Row("step", "gauge", "gristmill_step", "Steps decided since the run began, over all restarts."),
    Row("position", "gauge", "gristmill_position_samples", "Place of the last decided step in the stream."),
    Row("trained", "gauge", "gristmill_trained_samples", "Samples of committed steps, over all restarts."),
    Row("progress", "gauge", "gristmill_progress_ratio", "Share of the run that is done."),
    Row("steps", "add", "gristmill_steps_total", "Steps decided by this process, committed or skipped."),
    Row("batch", "add", "gristmill_images_total", "Images that went through a step of this process."),
    Row("crops", "add", "gristmill_crops_total", "Crops that went through the student in this process."),
    Row("bad", "add", "gristmill_bad_steps_total", "Steps left out: a loss or a gradient was not finite."),
    Row("bad_in_a_row", "gauge", "gristmill_bad_steps_in_a_row", "Bad steps since the last good one."),
    Row("time", "gauge", "gristmill_last_step_timestamp_seconds", "When the last step was decided."),
    Row("seconds", STEP_BUCKETS, "gristmill_step_seconds", "Wall time of a step; its phases sum to it."),
    # A counter and not a histogram a phase: shares of any window come from rate(), at 9 series instead of 180.
    Row("phase/{phase}", "add", "gristmill_step_phase_seconds_total", "Wall time spent in each phase of the step."),
    Row("data_wait_ratio", "gauge", "gristmill_data_wait_ratio", "Share of recent steps spent waiting for data."),
    Row("loss", "gauge", "gristmill_mixture_loss", "Loss of the last step, weighted over the objectives."),
    Row("loss/{objective}", "gauge", "gristmill_loss", "Loss of the last step by objective, before its weight."),
    Row("weight/{objective}", "gauge", "gristmill_loss_weight", "Weight of the objective in the mixture."),
    Row("{objective}/{name}", "gauge", "gristmill_objective_health", "Signs of collapse and life by objective."),
    Row("grad_norm", "gauge", "gristmill_gradient_norm", "Norm of the last gradient, before clipping."),
    Row("lr", "gauge", "gristmill_learning_rate", "Learning rate applied in the last step."),
    Row("weight_decay", "gauge", "gristmill_weight_decay", "Weight decay applied in the last step."),
    Row("momentum", "gauge", "gristmill_teacher_momentum", "EMA momentum applied in the last step."),
    Row("{objective}/teacher_temperature", "gauge", "gristmill_teacher_temperature", "Temperature of the teacher."),
    Row("memory/{memory}/fill", "gauge", "gristmill_memory_fill_ratio", "Share of the memory's rows ever written."),
    Row("memory/{memory}/age", "gauge", "gristmill_memory_age_steps", "Mean age of the rows, in steps."),
    Row("memory/{memory}/norm", "gauge", "gristmill_memory_norm_mean", "Mean norm of the rows; 1 where kept unit."),
    Row("loader/samples", "total", "gristmill_read_samples_total", "Samples delivered by the reader."),
    Row("loader/bytes", "total", "gristmill_read_bytes_total", "Bytes of images read from shards."),
    Row("loader/read_seconds", "total", "gristmill_read_seconds_total", "Time spent reading shards."),
    Row("loader/augment_seconds", "total", "gristmill_augment_seconds_total", "Time spent decoding and augmenting."),
    Row("loader/storage_seconds", "total", "gristmill_storage_seconds_total", "Part of reading spent in the storage."),
    Row("loader/removed", "total", "gristmill_removed_samples_total", "Samples removed on request that were replaced."),
    Row("loader/substituted", "total", "gristmill_substituted_samples_total", "Damaged samples that were replaced."),
    Row("loader/quarantined", "gauge", "gristmill_quarantined_samples", "Samples in the run's quarantine."),
    Row("loader/ready_depth", "gauge", "gristmill_buffer_depth_batches", "Batches that wait in the buffer.", READY),
    Row("loader/ready_capacity", "gauge", "gristmill_buffer_capacity_batches", "Batches that it can hold.", READY),
    Row("loader/encoded_depth", "gauge", "gristmill_buffer_depth_batches", "Batches that wait in the buffer.", ENCODED),
    Row("loader/encoded_capacity", "gauge", "gristmill_buffer_capacity_batches", "Batches that it can hold.", ENCODED),
    Row("loader/dwell_seconds", "total", "gristmill_buffer_dwell_seconds_total", "Time that batches lay in it.", READY),
    Row(
        "loader/encoded_dwell_seconds",
        "total",
        "gristmill_buffer_dwell_seconds_total",
        "Time that batches lay in it.",
        ENCODED,
    ),
    Row("loader/starved_seconds", "total", "gristmill_buffer_starved_seconds_total", STARVED, READY),
    Row("loader/hungry_seconds", "total", "gristmill_buffer_starved_seconds_total", STARVED, ENCODED),
    Row("loader/blocked_seconds", "total", "gristmill_buffer_blocked_seconds_total", BLOCKED, READY),
    Row("loader/encoded_blocked_seconds", "total", "gristmill_buffer_blocked_seconds_total", BLOCKED, ENCODED),
    Row("probe/{who}/{probe}", "gauge", "gristmill_probe_ratio", "Score of a probe, for the network or a baseline."),
    Row("probe/position", "gauge", "gristmill_probe_position_samples", "Position at which the last probes were made."),
    Row("checkpoint/{result}", "add", "gristmill_checkpoints_total", "Checkpoints tried by this process, by result."),
    Row("checkpoint/seconds", CHECKPOINT_BUCKETS, "gristmill_checkpoint_seconds", "Time to write a checkpoint."),
    Row("checkpoint/bytes", "gauge", "gristmill_checkpoint_size_bytes", "Size of the last good checkpoint."),
    Row(
        "checkpoint/time",
        "gauge",
        "gristmill_checkpoint_last_success_timestamp_seconds",
        "When the last good checkpoint was complete on disk.",
    ),
    Row("ignored", "add", "gristmill_ignored_values_total", "Values that fit no metric of the catalogue."),
)
