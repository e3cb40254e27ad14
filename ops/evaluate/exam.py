"""One evaluation from its settings to its table: who is compared, on which pictures, by which evaluators.

Beside the network stand what knows nothing (chance, computed), raw pixels, and the same network untrained, for a number
alone says little. Whatever cannot be asked of the data is left out with its reason. Results are one dictionary that
JSON can hold: settings, identities of weights and pictures, numbers by who, and the seconds that each part took.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...shards.errors import GristmillError
from ..launch import card_of
from ..progress import Meter
from ..recipe import ProbeName
from .battery import EVALUATORS, options_of
from .cache import Kept, features_of
from .chosen import Asked, chance, measure
from .layouts import splits
from .pictures import Pictures, open_pictures
from .sitting import LABELS, NotAskedError, Scores, Sitting
from .subject import PIXELS, RANDOM, TIMM, Subject, open_subject
from .subsets import draw_stratified

RECIPE = "recipe"  # the probes that a run's recipe names, which `eval` gives first where no other data is named


class ExamError(GristmillError):
    """An evaluation that cannot be held as it is asked for."""


@dataclass(frozen=True)
class Request:
    """What is asked for; see the options of `gristmill eval`. given: settings by evaluator, in their own types."""

    where: str
    data: str | None = None
    query: str | None = None
    split: str | None = None
    query_split: str | None = None
    who: Any = "teacher"
    holdout: float = 0.2
    level: str | None = None
    limit: int | None = None
    only: tuple[str, ...] = ()
    everything: bool = False
    baselines: bool = True
    processes: int = 1
    cache: Path | None = None
    davis: str | None = None
    size: int | None = None
    device: str = "auto"
    seed: int = 0
    quiet: bool = False
    given: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


class Looker:
    """Features by (subject, pictures, blocks): from memory, from the folder, or computed, with the seconds that it took."""

    def __init__(self, folder: Path, processes: int, quiet: bool) -> None:
        self.folder, self.processes, self.quiet = folder, processes, quiet
        self.seconds: dict[str, float] = {}
        self.alone = False
        self._held: dict[tuple[str, str, int], Kept] = {}

    def __call__(self, subject: Subject, pictures: Pictures, blocks: int) -> Kept:
        key = subject.identity, pictures.identity, blocks
        if key not in self._held:
            start = time.perf_counter()
            with Meter(f"features of {subject.name}", len(pictures), quiet=self.quiet) as meter:
                self._held[key] = features_of(
                    subject, pictures, self.folder, blocks=blocks, processes=self.processes, alone=self.alone,
                    done=lambda count: meter(min(count, len(pictures))),
                )  # fmt: skip
            self.seconds[subject.name] = self.seconds.get(subject.name, 0.0) + time.perf_counter() - start
        return self._held[key]


def examine(request: Request) -> dict[str, Any] | None:
    """Hold the examination; None on torchrun's ranks but the first. Raises GristmillError where nothing can be asked."""
    rank = int(os.environ.get("RANK", "0"))
    recipe = _recipe(request) if request.data is None else None
    device = ("cuda" if torch.cuda.is_available() else "cpu") if request.device == "auto" else request.device
    if device == "cuda" and "LOCAL_RANK" in os.environ:
        device = f"cuda:{card_of(int(os.environ['LOCAL_RANK']), torch.cuda.device_count())}"
    main = open_subject(request.where, who=request.who, size=request.size, seed=request.seed).to(device)
    reference, query, places = _pictures(request, recipe)
    look = Looker(request.cache or _home(request.where), request.processes, request.quiet or rank > 0)
    if query is None:
        learn, ask = _held_out(reference, request)
    else:
        learn, ask = reference, query
    subjects = {_column(request): main}
    if request.baselines:
        subjects |= {who: one.to(device) for who, one in _others(request, main).items()}
    chosen = _chosen(request)
    if "WORLD_SIZE" in os.environ:
        _prepare(look, subjects, (reference, query, learn, ask), request, chosen)
        look.alone = True
        if rank > 0:
            return None
    table: dict[str, Scores] = {"chance": {}} if request.baselines else {}
    table |= {who: {} for who in [*list(subjects)[1:], *list(subjects)[:1]]}
    seconds: dict[str, dict[str, float]] = {}
    skipped: dict[str, str] = {}
    if recipe is not None:
        seconds[RECIPE] = _recipe_rows(table, subjects, reference, query, look, recipe)
    for name in chosen:
        one = EVALUATORS[name]
        if one.labels and learn.level is None:
            skipped[name] = f"the pictures have no labels; {LABELS}"
            continue
        seconds[name] = {}
        for who, subject in subjects.items():
            if who != _column(request) and not one.baselines:
                continue
            start = time.perf_counter()
            with Meter(f"{name} of {subject.name}", 0, unit="", quiet=request.quiet) as meter:
                sitting = Sitting(subject, learn, ask, look, request.seed, places, request.davis, meter)
                try:
                    table[who] |= one.run(sitting, options_of(request.given, name))
                except GristmillError as error:
                    if who == _column(request):
                        skipped[name] = str(error)
                        break
                    skipped[f"{name} of {who}"] = str(error)
            seconds[name][who] = round(time.perf_counter() - start, 3)
        if name not in skipped and request.baselines and one.chance is not None:
            sitting = Sitting(main, learn, ask, look, request.seed, places, request.davis)
            table["chance"] |= one.chance(sitting, options_of(request.given, name))
    if request.only and not table[_column(request)]:
        raise ExamError("; ".join(f"{name}: {why}" for name, why in skipped.items()))
    return {
        "position": main.position,
        "subject": {
            "where": request.where, "name": main.name, "identity": main.identity, "size": main.size,
            "width": main.width, "depth": main.depth, "stride": main.stride,
        },
        "data": {"reference": _about(learn), "query": _about(ask)},
        "settings": {
            "seed": request.seed, "holdout": None if query is not None else request.holdout, "limit": request.limit,
            "torch": torch.__version__, "device": device,
            "evaluators": {name: _plain(options_of(request.given, name)) for name in chosen},
        },
        "probes": {who: scores for who, scores in table.items() if scores or who == _column(request)},
        "skipped": skipped,
        "seconds": seconds | {"features": {name: round(value, 3) for name, value in look.seconds.items()}},
    }  # fmt: skip


def _chosen(request: Request) -> list[str]:
    if request.only:
        return [name for name in EVALUATORS if name in request.only]
    return [name for name, one in EVALUATORS.items() if one.quick or request.everything]


def _recipe(request: Request) -> Any:
    """The recipe of a run, which names its probes' data. ExamError for what is none, where no data is named either."""
    from ..recipe import load_recipe

    path = Path(request.where)
    for folder in (path, path.parent.parent):
        if (folder / "recipe.yaml").is_file():
            return load_recipe(folder / "recipe.yaml")
    if path.is_dir():
        raise ExamError(
            f"{path} holds no run (no recipe.yaml); name the folder that `gristmill train --out` wrote, or give --data"
        )
    if not path.exists() and not request.where.startswith((TIMM, RANDOM, PIXELS)):
        raise ExamError(f"{path}: there is no such file or folder; name a run, a file of weights, or timm:NAME")
    raise ExamError(f"{request.where} has no recipe that names pictures to evaluate on; give --data FOLDER")


def _pictures(request: Request, recipe: Any) -> tuple[Pictures, Pictures | None, Any]:
    """Pictures to learn from, those to be asked about where there are some, and where both lie."""
    data, query, split, asked = request.data, request.query, request.split, request.query_split
    limit, query_limit = request.limit, request.limit
    if data is None:
        data = str(recipe.probes.reference or recipe.sources[0].path)
        query = query or (str(recipe.probes.query) if recipe.probes.query else None)
        limit = query_limit = request.limit or recipe.probes.images
    elif query is None and split is None and asked is None and (both := splits(data)):
        split, asked = both
    if query is None and asked is not None:
        query = data
    reference = open_pictures(data, split, request.level, limit)
    if query is None:
        return reference, None, None
    found = open_pictures(query, asked, reference.level if request.level else None, query_limit).like(reference)
    return reference, found, ((data, split), (query, asked))


def _held_out(reference: Pictures, request: Request) -> tuple[Pictures, Pictures]:
    """Two parts of what there is, classes in proportion; unlabelled pictures are both."""
    if reference.level is None or not bool((reference.labels >= 0).any()):
        return reference, reference
    held = torch.zeros(len(reference), dtype=torch.bool)
    held[draw_stratified(reference.labels, request.holdout, request.seed)] = True
    known = reference.labels >= 0
    return reference.take((~held & known).nonzero()[:, 0]), reference.take(held.nonzero()[:, 0])


def _column(request: Request) -> str:
    """What the network is called in the table."""
    return "network" if _is_file(request.where) or request.where.startswith((TIMM, RANDOM, PIXELS)) else request.who


def _is_file(where: str) -> bool:
    return "://" not in where and not Path(where).is_dir()


def _others(request: Request, main: Subject) -> dict[str, Subject]:
    """Raw pixels, and the same network before its first step where that can be had."""
    found: dict[str, Subject] = {}
    if request.where != PIXELS:
        found["pixels"] = open_subject(PIXELS, size=main.size)
    if _column(request) != "network":
        if "://" not in request.where:
            found["random"] = open_subject(f"{RANDOM}{request.where}", size=main.size)
    elif request.where.startswith(TIMM) and "." in request.where:
        found["random"] = open_subject(request.where.partition(".")[0], size=main.size, seed=request.seed)
    return found


def _prepare(
    look: Looker,
    subjects: Mapping[str, Subject],
    pictures: Sequence[Pictures | None],
    request: Request,
    chosen: list[str],
) -> None:
    """All that evaluators will look at, while all ranks are at it."""
    wanted = {1}
    if "linear" in chosen:
        wanted.add(options_of(request.given, "linear").blocks)
    for subject in subjects.values():
        for each in pictures:
            for blocks in sorted(wanted):
                if each is not None:
                    look(subject, each, blocks)


def _recipe_rows(
    table: dict[str, Scores],
    subjects: Mapping[str, Subject],
    reference: Pictures,
    query: Pictures | None,
    look: Looker,
    recipe: Any,
) -> dict[str, float]:
    """The same numbers as during training, by the names in the recipe; leaving one out where there are no queries."""
    names, k, seconds = list(reference.levels), recipe.probes.neighbours, {}
    probes: list[ProbeName] = [
        name for name in recipe.probes.names if name != "correspondence"
    ]  # an evaluator of its own
    codes: list[Tensor | None] = []
    for who, subject in subjects.items():
        start = time.perf_counter()
        kept = [None if each is None else look(subject, each, 1) for each in (reference, query)]
        codes = [
            None if each is None or seen is None or not names
            else torch.stack([each.levels[name][seen.rows] for name in names], 1)
            for each, seen in zip((reference, query), kept, strict=True)
        ]  # fmt: skip
        first, second = kept
        assert first is not None
        rows = second.features if second else None
        asked = Asked(first.features, codes[0], rows, codes[1], names, k, recipe.probes.temperature)
        table[who] |= measure(probes, asked)[0]
        if "chance" in table and not table["chance"]:
            table["chance"] |= chance(probes, asked)
        seconds[who] = round(time.perf_counter() - start, 3)
    return seconds


def _about(pictures: Pictures) -> dict[str, Any]:
    return {
        "where": pictures.where, "kind": pictures.kind, "identity": pictures.identity, "pictures": len(pictures),
        "level": pictures.level, "classes": len(pictures.classes),
        "damaged": {pictures.keys[row]: why for row, why in sorted(pictures.damaged.items())},
    }  # fmt: skip


def _plain(options: Any) -> Any:
    return None if options is None else asdict(options)


def _home(where: str) -> Path:
    """Where features are kept: in the run, or in the user's cache."""
    path = Path(where)
    for folder in (path, path.parent.parent):
        if "://" not in where and (folder / "recipe.yaml").is_file():
            return folder / "features"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gristmill" / "features"


__all__ = ["ExamError", "NotAskedError", "Request", "examine"]
