"""Metrics of the step: how often, how long and in what, how much work, on what device."""

from .row import STEP_BUCKETS, Group, Row

STEPS = Group(
    "Steps and throughput",
    "`ops/train.py` once a step; FLOPs as `models/flops.py` counts them",
    (
        Row("steps", "add", "gristmill_steps_total", "Steps decided by this process, committed or skipped."),
        Row(
            "batch",
            "add",
            "gristmill_images_total",
            "Images of the steps that this process took part in, over all ranks: alike on each.",
        ),
        Row(
            "crops",
            "add",
            "gristmill_crops_total",
            "Crops that students were shown in these steps, over all ranks: alike on each.",
        ),
        Row("tokens", "add", "gristmill_tokens_total", "Tokens that this rank's student was shown, class tokens too."),
        Row(
            "flops",
            "add",
            "gristmill_model_flops_total",
            "Floating-point operations that this rank's steps ask for: student forward and backward, teacher forward. "
            "Without what is computed again to save memory.",
        ),
        Row(
            "device/peak_flops",
            "gauge",
            "gristmill_peak_flops_per_second",
            "What this rank's device can do at most, dense, at the run's precision; only for known ones.",
        ),
        Row("seconds", STEP_BUCKETS, "gristmill_step_seconds", "Wall time of a step; its phases sum to it."),
        # A counter and not a histogram a phase: shares of any window come from rate(), at 9 series instead of 180.
        Row("phase/{phase}", "add", "gristmill_step_phase_seconds_total", "Wall time spent in each phase of the step."),
        Row("data_wait_ratio", "gauge", "gristmill_data_wait_ratio", "Share of recent steps spent waiting for data."),
        Row(
            "own_seconds",
            "add",
            "gristmill_rank_own_seconds_total",
            "Data wait and forward of a rank's steps, on a GPU by its own clock: the straggler has the most, since nobody "
            "waits for others there. But under ZeRO 3, which gathers weights in the forward, and where an objective "
            "gathers rows for its loss, they do, and a straggler stands out less.",
        ),
        Row(
            "cuda/{cuda}", "gauge", "gristmill_cuda_memory_bytes", "Memory of torch on this rank's GPU (only with one)."
        ),
    ),
)

COMMUNICATION = Group(
    "Communication",
    "`ops/monitor/communication.py` from a rank's first step on; nothing where there is one process",
    (
        Row(
            "communication/calls/{operation}",
            "total",
            "gristmill_communication_calls_total",
            "Collective operations that this rank took part in, DeepSpeed's and ours alike.",
            late=True,
        ),
        Row(
            "communication/bytes/{operation}",
            "total",
            "gristmill_communication_bytes_total",
            "Bytes of the tensors of these operations, of the larger side: the result of an all-gather, the source of a "
            "reduce-scatter. A ring over n ranks sends (n - 1) / n of them, of an all-reduce twice as many.",
            late=True,
        ),
    ),
)

GUARD = Group(
    "Guard and optimizer",
    "`ops/guard.py`, `ops/engine.py`",
    (
        Row(
            "bad",
            "add",
            "gristmill_bad_steps_total",
            "Steps left out: something was not finite, the loss was far above its mean, or DeepSpeed took no step.",
        ),
        Row("bad_in_a_row", "gauge", "gristmill_bad_steps_in_a_row", "Bad steps since the last good one."),
        Row(
            "rollbacks", "add", "gristmill_rollbacks_total", "Returns to the last good state after bad steps in a row."
        ),
        Row("grad_norm", "gauge", "gristmill_gradient_norm", "Norm of the last gradient, before clipping."),
        Row(
            "clipped",
            "add",
            "gristmill_gradient_clipped_total",
            "Steps whose gradient, or that of any one parameter, was longer than the recipe's clip.",
        ),
        Row("lr", "gauge", "gristmill_learning_rate", "Learning rate applied in the last step."),
        Row("weight_decay", "gauge", "gristmill_weight_decay", "Weight decay applied in the last step."),
        Row("ignored", "add", "gristmill_ignored_values_total", "Values that fit no metric of the catalogue."),
    ),
)
