"""Every value that a label of a run's metrics can have. Whatever is not here is never served.

So no file name, exception text, host or remote string can become a label, and the number of series has a bound that a
test knows. An enumeration that a part of the system owns (objectives, kinds of failed requests) is repeated here, since
the monitor imports none of them; tests hold the two together.
"""

OBJECTIVES = (
    *("instance", "dense", "local_group", "hierarchy", "group", "patch"),
    *("batch_contrast", "bootstrap", "bank", "swapped", "clusters"),
)
PHASES = (
    *("data_wait", "forward", "backward", "verdict", "optimizer", "ema", "commit", "metrics", "checkpoint", "probe"),
    *("refresh", "refit"),  # a pass over the data for an objective; clustering between steps
)
APART = ("refresh", "refit", "checkpoint", "probe")  # phases that come now and then; the others are of every step
_CONTRAST = ("accuracy", "positive_similarity")
_CENTRED = ("teacher_entropy_ratio", "batch_entropy_ratio", "center_norm")
# Signs of life by objective.
HEALTH_OF: dict[str, tuple[str, ...]] = {
    "instance": _CONTRAST,
    "dense": (
        *_CONTRAST,
        *("correct", "correct_by_chance", "same_place", "matched", "match_similarity", "overlap", "factor"),
    ),
    "local_group": (*_CONTRAST, "neighbour_similarity", "neighbour_unique_ratio"),
    "hierarchy": (
        *_CONTRAST,
        *("ramp", "instance", "prototype", "instance_dropped", "prototype_dropped", "prototype_negatives", "distance"),
        *(f"level{level}_{what}" for level in range(3) for what in ("stable", "reseeded")),
    ),
    "group": _CENTRED,
    "patch": _CENTRED,
    "batch_contrast": (*_CONTRAST, "images"),
    "bootstrap": ("similarity", "prediction_std", "target_std"),
    "bank": (*_CONTRAST, "log_z", "seen"),
    "swapped": (*_CONTRAST, "code_entropy_ratio", "batch_entropy_ratio", "queue_in_use"),
    "clusters": (*_CONTRAST, "age", "used", "tightness"),
}
HEALTH = tuple(sorted({name for names in HEALTH_OF.values() for name in names} | {"feature_std", "rank_me"}))
CENTRED = ("group", "patch")  # objectives whose teacher assigns prototypes
MEMORIES = (
    *("instance.queue", "dense.queue", "local_group.queue", "local_group.student", "local_group.teacher"),
    *("hierarchy.queue", "hierarchy.memory", "swapped.queue0", "swapped.queue1", "bank"),
)
# Of labels that are called otherwise the run's log tells, and no metric.
PROBES = (
    *(f"{level}_{kind}" for kind in ("knn", "retrieval", "purity", "linear") for level in ("class", "coarse", "fine")),
    *("instance_retrieval", "correspondence_cell", "correspondence_pck"),
    *("rank_me", "feature_std", "uniformity", "neighbour_agreement"),  # where there are no labels
)
WHO = ("teacher", "pixels", "random", "chance")
RESULTS = ("ok", "failed")
STATES = ("starting", "restoring", "training", "probing", "checkpointing", "refreshing", "ending")
# What the wall clock of a run went into.
SPENT = ("productive", "data_wait", "checkpoint", "probe", "refresh", "bad", "startup", "lost", "down")
CAUSES = ("killed", "signal", "error")  # of an attempt that ended before all images were seen
PLACES = ("run", "checkpoints", "cache")
CUDA = ("allocated", "reserved", "peak")
RETRIES = ("throttled", "server", "timeout", "connection", "broken", "other")  # shards/retry.py says what is which
# Collective operations; the last is whatever else goes from one rank to another.
OPERATIONS = ("all_reduce", "all_gather", "reduce_scatter", "reduce", "broadcast", "all_to_all", "barrier", "other")
