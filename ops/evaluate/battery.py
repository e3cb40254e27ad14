"""The papers' evaluators by name: what each reads, its settings, and what knows nothing would score.

An evaluator is a function of a sitting (a subject, pictures to learn from, pictures to be asked about, a seed) that returns
numbers by name. Those on frozen features share one extraction (cache.py); those that train or look at places are imported
when they run. `quick` ones take seconds to a minute and are what `gristmill eval` does unless it is told otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .alignment import AlignmentOptions, run_alignment
from .clustering import ClusteringOptions, run_clustering, shuffled_clustering
from .knn import nearest, vote
from .logistic import LogisticOptions, SemiOptions, run_logistic, run_semi
from .pictures import INSTANCE, Pictures
from .probes import label_free
from .purity import expected_purity, neighbour_purity
from .retrieval import expected_average_precision, retrieve
from .sitting import NotAskedError, Scores, Sitting, labels_of
from .subject import Subject


@dataclass(frozen=True)
class Evaluator:
    """run(sitting, options) and chance(sitting, options); about: a line for people.

    labels: whether it wants some; masks, boxes, clips: what else. baselines: whether others are measured beside.
    """

    run: Callable[[Sitting, Any], Scores]
    about: str
    options: Callable[[], Any] | None = None
    chance: Callable[[Sitting, Any], Scores] | None = None
    labels: bool = True
    quick: bool = True
    baselines: bool = True


@dataclass(frozen=True)
class KnnOptions:
    """neighbours, temperatures: the grid; neighbour, temperature: DINO's, which `knn_top1` is of."""

    neighbours: tuple[int, ...] = (10, 15, 20, 30, 40, 50, 100, 200)
    temperatures: tuple[float, ...] = (0.04, 0.05, 0.07, 0.1)
    neighbour: int = 20
    temperature: float = 0.07


@dataclass(frozen=True)
class PurityOptions:
    """neighbours: k."""

    neighbours: int = 20


@dataclass(frozen=True)
class RetrievalOptions:
    """recall: the places within which something must be found."""

    recall: tuple[int, ...] = (1, 5)


def run_knn(s: Sitting, options: KnnOptions) -> Scores:
    """The weighted vote at DINO's k and T, and the best of the grid, which the queries themselves choose, as in the papers.

    `knn_top1`; `knn_top1_chosen_on_query` with its `knn_k` and `knn_temperature`; `knn_top1_<level>` of coarser levels.
    """
    reference, labels, query, truth = s.both()
    grid = knn_grid(reference, labels, query, truth, options)
    best = max(grid, key=lambda at: (grid[at], -at[0], -at[1]))
    scores = {
        "knn_top1": grid[options.neighbour, options.temperature],
        "knn_top1_chosen_on_query": grid[best],
        "knn_k": float(best[0]),
        "knn_temperature": best[1],
    }
    own = KnnOptions((options.neighbour,), (options.temperature,), options.neighbour, options.temperature)
    for level in _coarser(s.reference):
        scores[f"knn_top1_{level}"] = max(knn_grid(*s.both(level), own).values())
    return scores


def knn_grid(
    reference: Tensor, labels: Tensor, query: Tensor, truth: Tensor, options: KnnOptions
) -> dict[tuple[int, float], float]:
    """Share of right answers for each (k, T); neighbours are searched once. k beyond the references is all of them."""
    ks = sorted({*options.neighbours, options.neighbour})
    temperatures = sorted({*options.temperatures, options.temperature})
    similarity, index = nearest(reference, query, ks[-1])
    voters, classes = labels[index.cpu()], int(labels.max()) + 1
    similarity = similarity.cpu()
    return {
        (k, t): float((vote(similarity[:, :k], voters[:, :k], classes, t).argmax(1) == truth).double().mean())
        for k in ks
        for t in temperatures
    }


def _knn_chance(s: Sitting, options: KnnOptions) -> Scores:
    scores = {"knn_top1": _majority(s, None), "knn_top1_chosen_on_query": _majority(s, None)}
    return scores | {f"knn_top1_{level}": _majority(s, level) for level in _coarser(s.reference)}


def _coarser(pictures: Pictures) -> list[str]:
    """Levels other than the one that classifies, and than single things."""
    return [name for name in pictures.levels if name not in (pictures.level, INSTANCE)]


def _majority(s: Sitting, level: str | None) -> float:
    """The best constant answer: the share of the commonest class among the queries."""
    labels = labels_of(s.query, level)
    labels = labels[labels >= 0]
    return float(torch.bincount(labels).max() / len(labels)) if len(labels) else 0.0


def _logistic_chance(s: Sitting, options: Any) -> Scores:
    return {"logistic_top1": _majority(s, None)}


def _semi_chance(s: Sitting, options: SemiOptions) -> Scores:
    return {f"semi_{100 * share:g}_top1": _majority(s, None) for share in options.shares}


def retrieval_level(s: Sitting) -> str | None:
    """The finest level of which at least half of the queries have something to find among the references."""
    for level in reversed(list(s.reference.levels)):
        labels, asked = labels_of(s.reference, level), labels_of(s.query, level)
        asked = asked[asked >= 0]
        if len(asked) and float(torch.isin(asked, labels[labels >= 0]).double().mean()) >= 0.5:
            return level
    return s.reference.level


def run_retrieval(s: Sitting, options: RetrievalOptions) -> Scores:
    """`retrieval_map` over whole rankings, `retrieval_recall_<k>` at their heads, of the finest level that can be asked."""
    reference, labels, query, truth = s.both(retrieval_level(s))
    found = retrieve(reference, labels, query, truth, recall_at=options.recall)
    recall = {f"retrieval_recall_{k}": value for k, value in found.recall.items()}
    return {"retrieval_map": found.mean_average_precision, **recall}


def _retrieval_chance(s: Sitting, options: RetrievalOptions) -> Scores:
    """Of random rankings: expected average precision, and the chance that k draws without replacement hold one."""
    level = retrieval_level(s)
    labels, asked = labels_of(s.reference, level), labels_of(s.query, level)
    labels, asked = labels[labels >= 0], asked[asked >= 0]
    total = len(labels)
    sizes = torch.bincount(labels, minlength=int(asked.max()) + 1)[asked]
    sizes = sizes[sizes > 0]
    precision, recall = 0.0, dict.fromkeys(options.recall, 0.0)
    for size, count in zip(*(each.tolist() for each in sizes.unique(return_counts=True)), strict=True):
        precision += count * expected_average_precision(size, total)
        for k in options.recall:
            missed = 1.0
            for drawn in range(min(k, total)):
                missed *= max(0, total - size - drawn) / (total - drawn)
            recall[k] += count * (1 - missed)
    recalls = {f"retrieval_recall_{k}": value / len(sizes) for k, value in recall.items()}
    return {"retrieval_map": precision / len(sizes), **recalls}


def run_purity(s: Sitting, options: PurityOptions) -> Scores:
    """`purity_<level>`: share of the k nearest references that are of the query's class, for each level but single things."""
    levels = [*_coarser(s.reference), s.reference.level] if s.reference.level else []
    return {f"purity_{level}": neighbour_purity(*s.both(level), k=options.neighbours) for level in levels}


def _purity_chance(s: Sitting, options: PurityOptions) -> Scores:
    scores = {}
    for level in [*_coarser(s.reference), s.reference.level] if s.reference.level else []:
        labels, asked = labels_of(s.reference, level), labels_of(s.query, level)
        scores[f"purity_{level}"] = expected_purity(labels[labels >= 0], asked[asked >= 0])
    return scores


def _clustering(s: Sitting, options: ClusteringOptions) -> Scores:
    kept = s.look(s.subject, s.reference, 1)
    levels = {name: codes[kept.rows] for name, codes in s.reference.levels.items()}
    return run_clustering(kept.features, levels, str(s.reference.level), options, seed=s.seed)


def _clustering_chance(s: Sitting, options: ClusteringOptions) -> Scores:
    return shuffled_clustering(s.reference.levels, str(s.reference.level), seed=s.seed)


def _label_free(s: Sitting, options: AlignmentOptions) -> Scores:
    """Signs of collapse of the queries' features, and how near two views of a picture come."""
    return {**label_free(s.features(s.query)), **run_alignment(s.subject, s.query, options, seed=s.seed)}


def _linear(s: Sitting, options: Any) -> Scores:
    from .linear import run_linear

    def gather(subject: Subject, pictures: Pictures, wanted: Any) -> tuple[Tensor, Tensor]:
        kept = s.look(subject, pictures, wanted.blocks)
        labels = pictures.labels[kept.rows]
        known = labels >= 0
        parts = [kept.classes.flatten(1), *([kept.means[:, -1]] if wanted.average else [])]
        return torch.cat(parts, 1)[known], labels[known]

    found = run_linear(
        s.subject, s.reference, s.query, options, seed=s.seed, progress=_steps(s), gather=gather  # pyright: ignore[reportArgumentType]
    )  # fmt: skip
    return {name: value for name, value in found.items() if "@" not in name}


def _linear_chance(s: Sitting, options: Any) -> Scores:
    return {"linear_top1": _majority(s, None)}


def _finetune(s: Sitting, options: Any) -> Scores:
    from .finetune import run_finetune

    return run_finetune(s.subject, s.reference, s.query, options, seed=s.seed, progress=_steps(s))


def _semi_finetune(s: Sitting, options: Any) -> Scores:
    from .finetune import run_semi_finetune

    return run_semi_finetune(s.subject, s.reference, s.query, options, seed=s.seed, progress=_steps(s))


def _segmentation(s: Sitting, options: Any) -> Scores:
    from .masks import open_masks
    from .segmentation import run_segmentation

    if s.places is None:
        raise NotAskedError("segmentation wants pictures to learn from and others to be asked about: give --query")
    train, query = (open_masks(path, split) for path, split in s.places)
    return run_segmentation(s.subject, train, query, seed=s.seed, options=options, progress=s.progress)


def _correspondence(s: Sitting, options: Any) -> Scores:
    from .correspondence import run_correspondence

    return run_correspondence(s.subject, s.query, seed=s.seed, options=options, progress=s.progress)


def _video(s: Sitting, options: Any) -> Scores:
    from .video import run_video

    if s.davis is None:
        raise NotAskedError("video wants clips in DAVIS's layout: give --davis FOLDER")
    return run_video(s.subject, s.davis, seed=s.seed, options=options, progress=s.progress)


def _detection(s: Sitting, options: Any) -> Scores:
    from .coco import open_coco
    from .detection import run_detection

    if s.places is None or s.reference.kind != "COCO" or s.query.kind != "COCO":
        raise NotAskedError("detection wants two COCO sets, to learn from and to score: give --data and --query such")
    train, query = (open_coco(path, split) for path, split in s.places)
    options = replace(options, device=str(s.subject.device))
    return run_detection(s.subject, train, query, options, seed=s.seed, progress=s.progress)


def _steps(s: Sitting) -> Callable[[int, int, float], None] | None:
    progress = s.progress
    return None if progress is None else lambda step, steps, loss: progress(step, steps, f"loss {loss:.3f}")


def _settings(module: str, name: str) -> Callable[[], Any]:
    """Default settings of an evaluator whose module is loaded only when it is wanted."""

    def make() -> Any:
        from importlib import import_module

        return getattr(import_module(f".{module}", __package__), name)()

    return make


EVALUATORS: dict[str, Evaluator] = {
    "knn": Evaluator(run_knn, "weighted vote of the nearest neighbours (DINO, Mugs)", KnnOptions, _knn_chance),
    "logistic": Evaluator(
        lambda s, o: run_logistic(*s.both(), o, seed=s.seed),
        "logistic regression on frozen features",
        LogisticOptions,
        _logistic_chance,
    ),
    "semi": Evaluator(
        lambda s, o: run_semi(*s.both(), o, seed=s.seed),
        "the same on 1 % and 10 % of the labels",
        SemiOptions,
        _semi_chance,
    ),
    "retrieval": Evaluator(
        run_retrieval, "is the same thing found first? (mAP, recall)", RetrievalOptions, _retrieval_chance
    ),
    "purity": Evaluator(run_purity, "share of nearest neighbours of the same class", PurityOptions, _purity_chance),
    "clustering": Evaluator(
        _clustering, "k-means against classes, flat and as a tree (HCSC)", ClusteringOptions, _clustering_chance
    ),
    "label_free": Evaluator(
        _label_free, "signs of collapse: RankMe, uniformity, alignment", AlignmentOptions, labels=False
    ),
    "segmentation": Evaluator(
        _segmentation, "patch tokens against masks, linear and k-NN (mIoU)",
        _settings("segmentation", "SegmentationOptions"), labels=False,
    ),
    "correspondence": Evaluator(
        _correspondence, "are places found again in another crop?",
        _settings("correspondence", "CorrespondenceOptions"), labels=False, quick=False,
    ),
    "linear": Evaluator(
        _linear, "linear probe of the last blocks, a grid of rates at once",
        _settings("linear", "LinearOptions"), _linear_chance, quick=False,
    ),
    "finetune": Evaluator(
        _finetune, "the whole network trained on the labels",
        _settings("finetune", "FinetuneOptions"), quick=False, baselines=False,
    ),
    "semi_finetune": Evaluator(
        _semi_finetune, "the same on 1 % and 10 % of the labels",
        _settings("finetune", "FinetuneOptions"), quick=False, baselines=False,
    ),
    "video": Evaluator(
        _video, "objects followed through DAVIS's clips (J, F)",
        _settings("video", "VideoOptions"), labels=False, quick=False,
    ),
    "detection": Evaluator(
        _detection, "a detector on the features, trained on COCO's boxes (AP)",
        _settings("detection", "DetectionOptions"), labels=False, quick=False, baselines=False,
    ),
}  # fmt: skip


def options_of(given: Mapping[str, Mapping[str, Any]], name: str) -> Any:
    """An evaluator's settings with what was given in place of the defaults (already of the right types).

    "preset" names the papers' (presets.py) to start from. NotAskedError for one that is not there.
    """
    make = EVALUATORS[name].options
    if make is None:
        return None
    own = dict(given.get(name, {}))
    chosen = own.pop("preset", None)
    if chosen is None:
        return replace(make(), **own)
    from .presets import presets_of

    known = presets_of(name)
    if chosen not in known:
        raise NotAskedError(f"{name} has no preset {chosen!r}; there are {', '.join(known) or 'none'}")
    return replace(known[chosen], **own)
