"""Panels of what is learned: losses, signs of life and of collapse by objective, probes.

Losses alone say little in self-supervision: a collapsed run has a good one. So each objective's own signs stand beside
its loss, each with the values between which it should lie, and the probes at the end say what the features are worth.
All ranks know the same of these, so that they are averaged over ranks; a memory is each rank's own.
"""

from __future__ import annotations

from .panels import Dashboard, Panel, PanelRow, Query
from .panels_state import MEMORIES, OBJECTIVE, STEPS, TEACHER, mean
from .panels_terms import Agg, Take


def _health(names: str, legend: str = "{{objective}}") -> tuple[Query, ...]:
    return (Query(mean("gristmill_objective_health", ("objective", "name"), (("name", names),)), legend),)


_LOSSES = PanelRow(
    "Losses",
    (
        Panel(
            "Loss of the mixture",
            "Loss of the last step, weighted over the objectives.",
            (Query(mean("gristmill_mixture_loss"), "loss"),),
        ),
        Panel(
            "Loss by objective",
            "Loss of each objective before its weight; a contrast falls from the log of its choices.",
            (Query(mean("gristmill_loss", OBJECTIVE), "{{objective}}"),),
        ),
        Panel(
            "Weights of the objectives",
            "What each loss counts in the mixture, ramps included.",
            (Query(mean("gristmill_loss_weight", OBJECTIVE), "{{objective}}"),),
            low=0,
        ),
    ),
)

_LIFE = PanelRow(
    "Signs of life by objective",
    (
        Panel(
            "Accuracy of the contrasts",
            "How often the positive is the most similar of all choices: near 1 from the start is a shortcut.",
            _health("accuracy"),
            "ratio",
            low=0,
            high=1,
        ),
        Panel(
            "Similarity of positives",
            "Cosine of what should agree: near 1 for everything, early, is a collapse.",
            _health("positive_similarity|similarity|match_similarity", "{{objective}} {{name}}"),
            high=1,
        ),
        Panel(
            "Neighbours of the local groups",
            "How similar an image's neighbours are, and how many of them are different ones: few are hubs.",
            _health("neighbour_similarity|neighbour_unique_ratio", "{{name}}"),
            high=1,
            needs="the objective local_group",
        ),
        Panel(
            "Dense matches",
            "Share of patches matched to the same place, beside what chance would do, and how similar matches are.",
            _health("correct|correct_by_chance|same_place|matched|overlap", "{{name}}"),
            "ratio",
            low=0,
            high=1,
            needs="the objective dense",
        ),
        Panel(
            "Prototypes of the hierarchy",
            "Prototypes that images keep choosing, and those begun anew because nobody did (dead ones).",
            _health("level._stable|level._reseeded", "{{name}}"),
            low=0,
            needs="the objective hierarchy after its first clustering",
        ),
        Panel(
            "False negatives left out",
            "Share of negatives that the hierarchy's selection takes out of the contrast, and of the prototypes.",
            _health("instance_dropped|prototype_dropped", "{{name}}"),
            "ratio",
            low=0,
            needs="the objective hierarchy after its first clustering",
        ),
    ),
)

_COLLAPSE = PanelRow(
    "Collapse",
    (
        Panel(
            "Teacher's entropy for an image",
            "Entropy of the teacher's choice over its highest possible: 1 is a choice of nothing (uniform collapse).",
            _health("teacher_entropy_ratio"),
            "ratio",
            low=0,
            high=1,
            levels=((0.995, "bad"),),
        ),
        Panel(
            "Teacher's entropy over the batch",
            "Entropy of the mean choice: near 0 all images get the same one (collapse to one class).",
            _health("batch_entropy_ratio"),
            "ratio",
            low=0,
            high=1,
            levels=((0.05, "bad"),),
            below=True,
        ),
        Panel(
            "Norm of the centre",
            "How far the teacher's logits lean to some outputs on average; growth without end comes before collapse.",
            _health("center_norm"),
            low=0,
        ),
        Panel(
            "Spread of the features",
            "At the probes: effective rank of the features over their width, and their spread; both fall when it collapses.",
            (
                Query(
                    Agg(
                        "avg",
                        Take(
                            "gristmill_probe_ratio",
                            (("probe", "rank_me|feature_std"), ("who", "teacher")),
                            ranked=False,
                        ),
                        ("probe",),
                    ),
                    "{{probe}}",
                ),
            ),
            low=0,
            needs="probes of data without labels",
        ),
    ),
)

PROBES = Panel(
    "Probes of the teacher",
    "What the features are worth, asked on the way: scores of the teacher, 1 is perfect.",
    (
        Query(
            Agg(
                "avg",
                Take("gristmill_probe_ratio", (("who", "teacher"), ("probe", ".*knn|.*retrieval")), ranked=False),
                ("probe",),
            ),
            "{{probe}}",
        ),
    ),
    "ratio",
    span=12,
    low=0,
    high=1,
)

_PROBES = PanelRow(
    "Probes",
    (
        PROBES,
        Panel(
            "Probes, by who was asked",
            "Last scores of the teacher beside the untrained network, raw pixels and chance: worth is what is above them.",
            (Query(Agg("avg", Take("gristmill_probe_ratio", ranked=False), ("probe", "who")), "{{probe}}, {{who}}"),),
            "ratio",
            "bar",
            span=12,
            low=0,
        ),
    ),
)

LEARNING = Dashboard(
    "objectives",
    "Objectives and collapse",
    "Does it learn: every objective's loss and signs of life, the teacher, the memories, and what probes say.",
    (_LOSSES, _LIFE, _COLLAPSE, TEACHER, MEMORIES, STEPS, _PROBES),
)
