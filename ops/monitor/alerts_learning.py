"""Alerts on what is learned: steps that are left out, losses that jump, collapse by objective, the teacher, the memories.

A collapse is told by the numbers in which each kind of objective shows it (reference: the objectives' own comments), and
only after the first twentieth of a run: a fresh network answers nearly alike for all images, its queues hold noise, and
the teacher's temperature, the ramps and the weights still move. A run may be far from its end and still be over, so a
collapse pages; numbers that merely look poor wait for the morning.
"""

from .alert import Alert, Record

HEALTH = "run:gristmill_objective_health:avg"
WARM = " and on (run) run:gristmill_progress:ratio > 0.05"
LOSS = "run:gristmill_loss:max"
# Objectives whose loss may be compared with itself of an hour ago; the others' goes up with each new clustering.
STEADY = 'objective!~"hierarchy|clusters"'
# What makes a loss go up on purpose: a temperature, a weight, a ramp, a queue that fills or comes into use.
ON_PURPOSE = (
    " unless on (run, objective) max by (run, objective) (changes(gristmill_teacher_temperature[$9000s])) > 0"
    " unless on (run, objective) max by (run, objective) (changes(gristmill_loss_weight[$9000s])) > 0"
    " unless on (run, objective) max by (run, objective)"
    ' (changes(gristmill_objective_health{name=~"factor|ramp|queue_in_use"}[$9000s])) > 0'
    " unless on (run) max by (run) (changes(gristmill_memory_fill_ratio[$9000s])) > 0"
)
CONSEQUENCES = (
    *("GristmillFeaturesCollapsed", "GristmillProbeFell", "GristmillContrastAtChance", "GristmillLossSpike"),
    *("GristmillNeighboursCollapsed", "GristmillMatchesAtChance", "GristmillPrototypesDead"),
)


def _health(names: str, objectives: str = "") -> str:
    which = f'objective=~"{objectives}",' if objectives else ""
    return f'{HEALTH}{{{which}name=~"{names}"}}'


def _over(names: str, objectives: str = "", window: str = "$3600s") -> str:
    return f"avg_over_time({_health(names, objectives)}[{window}])"


RECORDS: tuple[Record, ...] = (
    Record(HEALTH, "avg by (run, objective, name) (gristmill_objective_health)"),
    # One NaN would silence the hours after it, one infinity would fire and silence them.
    Record(LOSS, "max by (run, objective) (gristmill_loss > -Inf < +Inf)"),
)

ALERTS: tuple[Alert, ...] = (
    Alert(
        "GristmillBadSteps",
        "warn",
        "max by (run) (increase(gristmill_bad_steps_total[$600s])) > 3",
        "Several steps within ten minutes were left out: a loss or a gradient was not finite, or far too high.",
        "A learning rate that is too high, a warm-up that is too short, or a range that the precision does not have.",
        keep=900,
        masks=("GristmillLossSpike",),
    ),
    Alert(
        "GristmillRollback",
        "warn",
        "max by (run) (increase(gristmill_rollbacks_total[$3600s])) > 0",
        "So many steps in a row were bad that the run went back to its last good checkpoint.",
        "Training diverges; after a few such returns the run stops by itself.",
        masks=("GristmillBadSteps", "GristmillLossSpike", "GristmillGoodputLow"),
    ),
    Alert(
        "GristmillLossSpike",
        "warn",
        f"(avg_over_time({LOSS}{{{STEADY}}}[$600s]) - avg_over_time({LOSS}[$7200s] offset $900s))"
        f" > 4 * stddev_over_time({LOSS}[$7200s] offset $900s)"
        f" + 0.05 * abs(avg_over_time({LOSS}[$7200s] offset $900s))" + WARM + ON_PURPOSE,
        "A loss is far above what it was over the last two hours, and no schedule explains it.",
        "Training begins to diverge, or the data changed.",
        keep=1800,
    ),
    Alert(
        "GristmillCollapseUniform",
        "page",
        _health("teacher_entropy_ratio|code_entropy_ratio", "group|patch|swapped") + " > 0.99" + WARM,
        "All images get the same assignment to all prototypes alike: nothing is learned any more.",
        "The teacher's temperature is too high, or its centre moves too fast.",
        hold=1800,
        value="ratio",
        masks=CONSEQUENCES,
    ),
    Alert(
        "GristmillCollapseOneGroup",
        "page",
        _health("batch_entropy_ratio", "group|patch") + " < 0.05" + WARM,
        "All images are assigned to one and the same prototype: nothing is learned any more.",
        "The teacher's temperature is too low, or its centre does not move.",
        hold=1800,
        value="ratio",
        masks=CONSEQUENCES,
    ),
    Alert(
        "GristmillCollapseContrast",
        "page",
        _health("positive_similarity", "instance|dense|local_group|hierarchy|batch_contrast")
        + " > 0.98 and ignoring (name) "
        + _health("accuracy")
        + " < 0.01"
        + WARM,
        "All images have the same embedding: positives agree perfectly and beat no negative.",
        "A learning rate that is too high, a teacher that follows too fast, or negatives that are positives.",
        hold=1800,
        value="ratio",
        masks=CONSEQUENCES,
    ),
    Alert(
        "GristmillCollapseBootstrap",
        "page",
        f"min by (run, objective) ({_health('prediction_std|target_std', 'bootstrap')}) < 0.1" + WARM,
        "Predictions or targets hardly differ between images: the network answers the same for all.",
        "A predictor that learns too slowly, no weight decay, or a momentum that is too low.",
        hold=1800,
        masks=CONSEQUENCES,
    ),
    Alert(
        "GristmillContrastAtChance",
        "warn",
        f"{_over('accuracy')} < 0.005 and on (run) run:gristmill_progress:ratio > 0.1"
        f" unless on (run, objective) {_health('positive_similarity')} > 0.98",
        "A tenth of the run is done, and hardly ever does a positive beat its negatives.",
        "Crops without overlap, a temperature far off, or labels of clusters that mean nothing.",
        hold=1800,
        value="ratio",
    ),
    Alert(
        "GristmillPrototypesDead",
        "warn",
        f"({_health('used', 'clusters')} < 0.8 or {_health('level[0-2]_reseeded', 'hierarchy')} > 100)" + WARM,
        "Many clusters have no image.",
        "More prototypes than the data has kinds of images, or features that begin to collapse.",
        hold=300,
    ),
    Alert(
        "GristmillNeighboursCollapsed",
        "warn",
        f"{_over('neighbour_unique_ratio', 'local_group')} < 0.03" + WARM,
        "All images find the same few neighbours in the memory.",
        "Features that begin to collapse, or a memory that is filled with copies.",
        hold=1800,
        value="ratio",
        masks=("GristmillProbeFell",),
    ),
    Alert(
        "GristmillMatchesAtChance",
        "warn",
        f"{_over('correct', 'dense')} / ignoring (name) {_over('correct_by_chance', 'dense')} <= 1.02"
        " and on (run) run:gristmill_progress:ratio > 0.2",
        "The places that the dense objective matches are no closer to the truth than drawn ones.",
        "Features without a sense of place, or crops that are too small to hold the same thing.",
        hold=1800,
    ),
    Alert(
        "GristmillFeaturesCollapsed",
        "page",
        '(max by (run, probe) (gristmill_probe_ratio{who="teacher",probe="feature_std"}) < 0.05'
        ' or max by (run, probe) (gristmill_probe_ratio{who="teacher",probe="rank_me"}) < 2)' + WARM,
        "The teacher's features are nearly the same for all probed images, or lie on a line.",
        "Training collapsed in a way that the objectives' own signs do not show.",
        masks=("GristmillProbeFell",),
    ),
    Alert(
        "GristmillProbeFell",
        "warn",
        'max by (run, probe) (gristmill_probe_ratio{who="teacher",probe=~".+_knn|.+_retrieval"})'
        ' < 0.7 * max by (run, probe) (max_over_time(gristmill_probe_ratio{who="teacher"}[$259200s]))',
        "A probe lost more than three tenths of the best value that it had within three days.",
        "Training diverged or collapsed, or a schedule took a wrong turn.",
        value="ratio",
    ),
    Alert(
        "GristmillTeacherFrozen",
        "page",
        "(max by (run) (changes(gristmill_teacher_fingerprint[$1800s])) == 0"
        " and on (run) max by (run) (increase(gristmill_teacher_updates_total[$1800s])) > 20"
        " or max by (run) (increase(gristmill_teacher_updates_total[$1800s])) == 0)"
        " and on (run) max by (run) (increase(gristmill_steps_total[$1800s]))"
        " - max by (run) (increase(gristmill_bad_steps_total[$1800s])) > 20"
        # Towards the end of its schedule the momentum is so close to one that nothing moves.
        " and on (run) max by (run) (gristmill_teacher_momentum) < 0.99999",
        "Steps are taken, and the teacher does not move.",
        "A fault of the software: the moving average works on copies that nobody reads.",
        hold=600,
        masks=("GristmillProbeFell",),
    ),
    Alert(
        "GristmillQueueStale",
        "warn",
        "max by (run, memory) (gristmill_memory_age_steps)"
        " > 2.5 * max by (run, memory) (gristmill_memory_expected_age_steps) + 2",
        "The rows of a memory are far older than its size and the batch explain.",
        "Rows are not written where they should be; the negatives are those of an older network.",
        hold=1800,
    ),
    Alert(
        "GristmillQueueNotUnit",
        "page",
        'max by (run, memory) (abs(gristmill_memory_norm_mean{memory=~".+[.]queue[0-9]?|hierarchy[.]memory"} - 1)'
        " and gristmill_memory_fill_ratio > 0) > 0.02",
        "A queue of unit vectors holds rows of another length.",
        "A fault of the software or of a memory chip.",
        hold=300,
        masks=("GristmillLossSpike",),
    ),
    Alert(
        "GristmillMemoryNotFinite",
        "page",
        "max by (run, memory) (gristmill_memory_nonfinite_rows) > 0",
        "A memory holds rows with NaN or infinity, though only good steps may write to it.",
        "A fault of the software or of a memory chip.",
        hold=120,
        masks=("GristmillBadSteps", "GristmillRollback", "GristmillQueueNotUnit", *CONSEQUENCES),
    ),
)
