"""Metrics of what is learned: losses, signs of collapse, the teacher, memories, probes."""

from .row import Group, Row

OBJECTIVES = Group(
    "Losses and objectives",
    "`objectives/`, from the logs of each step's losses",
    (
        Row("loss", "gauge", "gristmill_mixture_loss", "Loss of the last step, weighted over the objectives."),
        Row("loss/{objective}", "gauge", "gristmill_loss", "Loss of the last step by objective, before its weight."),
        Row("weight/{objective}", "gauge", "gristmill_loss_weight", "Weight of the objective in the mixture."),
        Row("{objective}/{name}", "gauge", "gristmill_objective_health", "Signs of collapse and life by objective."),
        Row(
            "{centred}/hidden_ratio",
            "gauge",
            "gristmill_hidden_patches_ratio",
            "Share of the student's patches in global crops that were hidden in the last step.",
        ),
        Row(
            "{centred}/koleo",
            "gauge",
            "gristmill_koleo_loss",
            "Minus the mean log distance to the nearest other image of the batch, before its weight: high is crowded.",
        ),
    ),
)

TEACHER = Group(
    "Teacher",
    "`ops/teacher.py`; distance and fingerprint from a fixed sample of this rank's weights, about once a second",
    (
        Row("momentum", "gauge", "gristmill_teacher_momentum", "EMA momentum applied in the last step."),
        Row("{centred}/teacher_temperature", "gauge", "gristmill_teacher_temperature", "Temperature of the teacher."),
        Row(
            "teacher_updates", "add", "gristmill_teacher_updates_total", "Times that the teacher followed the student."
        ),
        Row(
            "teacher/distance",
            "gauge",
            "gristmill_teacher_distance_ratio",
            "Distance of student and teacher over the student's norm, on a sample of the weights.",
        ),
        Row(
            "teacher/fingerprint",
            "gauge",
            "gristmill_teacher_fingerprint",
            "A number that changes whenever the sampled weights of the teacher do, in any bit.",
        ),
    ),
)

MEMORIES = Group(
    "Queues and memories",
    "`objectives/memory.py`, `objectives/bank.py`",
    (
        Row("memory/{memory}/fill", "gauge", "gristmill_memory_fill_ratio", "Share of the memory's rows ever written."),
        Row("memory/{memory}/age", "gauge", "gristmill_memory_age_steps", "Mean age of the rows, in steps."),
        Row(
            "memory/{memory}/expected_age",
            "gauge",
            "gristmill_memory_expected_age_steps",
            "What the mean age settles at once the memory is full: half the steps that it takes to fill it.",
        ),
        Row("memory/{memory}/norm", "gauge", "gristmill_memory_norm_mean", "Mean norm of the rows; 1 where kept unit."),
        Row(
            "memory/{memory}/nonfinite", "gauge", "gristmill_memory_nonfinite_rows", "Rows with a number not finite: 0."
        ),
        Row(
            "memory/{memory}/bytes",
            "gauge",
            "gristmill_memory_size_bytes",
            "Size of a memory with a row for each image.",
        ),
    ),
)

PROBES = Group(
    "Probes",
    "`ops/evaluate/online.py`, on rank 0",
    (
        Row(
            "probe/{who}/{probe}", "gauge", "gristmill_probe_ratio", "Score of a probe, for the network or a baseline."
        ),
        Row(
            "probe/position",
            "gauge",
            "gristmill_probe_position_samples",
            "Position at which the last probes were made.",
        ),
    ),
)
