"""Probes of a teacher on real data sets: during training at chosen places, and afterwards by `gristmill eval`.

The same stream that trains serves the probed images (whole, middle square), so a probe needs no second data path. Who
is compared: chance (computed), raw pixels, the network before its first step, and the teacher on its way. Labels are
read here and nowhere else.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...models.student import Student
from ...models.teacher import make_teacher
from ...pipeline.probing import probe_batches
from ...shards.labels import Labels
from ...shards.manifest import Manifest
from ...shards.mirror import open_manifest
from ..checkpoint import CheckpointError, newest
from ..networks import saved_networks
from ..recipe import ProbeConfig, Recipe, RecipeError
from ..report.crops import as_pixels
from ..report.neighbours import save_neighbours
from ..stores import open_store
from .chosen import Asked, chance, measure
from .features import Features, evaluating, extract, pixel_features
from .knn import nearest

if TYPE_CHECKING:
    from ..monitor.metrics import Metrics
    from ..run import Run
    from ..runlog import Notes

BATCH = 128  # images at once; features need no gradient, so this is small beside training
SHOWN = 10  # queries in the report, and as many of their neighbours as fit a row
THUMBNAIL = 64  # pixels
SHARES = ("_knn", "_retrieval", "_agreement", "_purity", "_linear", "_cell", "_pck")
PLACES = 128  # pictures on which correspondence is asked


class Probing:
    """The data sets that a recipe probes with, and what is measured on them."""

    def __init__(self, config: ProbeConfig, data: Path | str):
        self.config = config
        self.reference = open_manifest(config.reference or data)
        self.query = Manifest.open(config.query) if config.query else None
        self.labels = Labels.open(self.reference.root)

    @property
    def names(self) -> list[str]:
        return self.labels.names if self.labels else []

    def batches(self, manifest: Manifest) -> Iterator[tuple[list[str], Tensor]]:
        return probe_batches(manifest, self.config.size, BATCH, limit=self.config.images)

    def codes(self, keys: list[str]) -> np.ndarray:
        """Label codes int64 [n, levels] of the keys."""
        assert self.labels is not None
        return np.stack([self.labels.codes(keys, name) for name in self.names], axis=1)

    def features(self, model: Callable[[Tensor], Tensor], device: torch.device | str) -> list:
        """Features of `model` (images [B, 3, S, S] -> features [B, d]): [reference, query or None]."""
        return [extract(model, self.batches(m), device=device) if m else None for m in (self.reference, self.query)]

    def measure(self, model: Callable[[Tensor], Tensor], device: torch.device | str) -> tuple[dict[str, float], list]:
        """Scores of `model` and its features."""
        found = self.features(model, device)
        return self.scores(*found), found

    def scores(self, reference: Features | None, query: Features | None) -> dict[str, float]:
        assert reference is not None
        return dict(measure(self.config.names, self.asked(reference, query))[0])

    def asked(self, reference: Features, query: Features | None) -> Asked:
        """These features with their labels."""
        return Asked(
            reference.rows,
            self.codes(reference.keys) if self.names else None,
            query.rows if query else None,
            self.codes(query.keys) if self.names and query else None,
            self.names,
            k=self.config.neighbours,
            temperature=self.config.temperature,
        )

    def chance(self, reference: Features, query: Features | None) -> dict[str, float]:
        return dict(chance(self.config.names, self.asked(reference, query)))

    def places(self, backbone: nn.Module) -> dict[str, float]:
        """Correspondence of a backbone's patches, on pictures of the reference."""
        from .correspondence import run_correspondence
        from .pictures import open_pictures
        from .subject import Subject, eye_of

        device = next(backbone.parameters()).device
        subject = Subject("teacher", eye_of(copy.deepcopy(backbone)), self.config.size).to(device)
        found = run_correspondence(subject, open_pictures(self.reference.root, limit=PLACES), seed=0, images=PLACES)
        return {name: found[name] for name in ("correspondence_cell", "correspondence_pck")}

    def picture(self, path: Path, eyes: dict[str, list[Features | None]]) -> None:
        """Write the nearest neighbours of a few images as each of `eyes` sees them (who -> its features)."""
        reference, query = next(iter(eyes.values()))
        assert reference is not None
        asked = query or reference
        chosen = np.unique(np.linspace(0, len(asked.keys) - 1, SHOWN).astype(int))
        found: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        for who, (rows, questions) in eyes.items():
            assert rows is not None
            if questions is not None:
                cosine, index = nearest(rows.rows, questions.rows[torch.from_numpy(chosen)], k=SHOWN)
            else:
                cosine, index = (each[torch.from_numpy(chosen)] for each in nearest(rows.rows, k=SHOWN))
            found[who] = cosine.numpy(), index.numpy()
        used, where = np.unique(np.stack([index for _, index in found.values()]), return_inverse=True)
        where = where.reshape(len(found), len(chosen), -1)
        shown = [reference.keys[i] for i in used], [asked.keys[i] for i in chosen]
        pictures = _thumbnails((self.batches(m) for m in (self.reference, self.query) if m), {*shown[0], *shown[1]})
        # Instances are too few to fill a row, so of three levels the second one marks who belongs together.
        level = min(1, len(self.names) - 1)
        codes = [self.codes(keys)[:, level].tolist() for keys in reversed(shown)] if self.names else [None, None]
        save_neighbours(
            path,
            np.stack([pictures[key] for key in shown[1]]),
            {who: (cosine, where[row]) for row, (who, (cosine, _)) in enumerate(found.items())},
            np.stack([pictures[key] for key in shown[0]]),
            *codes,
        )


class OnlineProbes:
    """Measures the teacher where the recipe says (`probes.at`), and the baselines once at the start."""

    def __init__(self, run: Run, metrics: Metrics, notes: Notes):
        self.run, self.metrics, self.notes = run, metrics, notes
        self.probing = Probing(run.recipe.probes, run.recipe.sources[0].path)
        self.last = run.steps * run.recipe.batch
        self.due = {round(share * run.steps) * run.recipe.batch for share in run.recipe.probes.at}
        if (every := run.recipe.probes.every) is not None:
            batch = run.recipe.batch
            self.due |= {-(-at // batch) * batch for at in range(every, self.last + 1, every)}
        self.began, self.spent = time.perf_counter(), 0.0

    def maybe(self, position: int) -> None:
        """Measure if a probe is due at this position and was not made yet. Collective; rank 0 does the work."""
        if position not in self.due:
            return
        self.due.remove(position)
        # After a resume, what the log holds of this place is measured once more, for the exporter's sake, and not written.
        with self.run.engine.teacher.plain(lambda: make_teacher(self.run.build())) as teacher:
            if teacher is not None:
                self._measure(teacher, position)

    def _measure(self, teacher: nn.Module, position: int) -> None:
        start = time.perf_counter()
        features = class_token(teacher, self.run.engine.autocast)
        found = self.probing.features(features, self.run.device)
        cost = {"features": time.perf_counter() - start}
        names, asked = self.run.recipe.probes.names, self.probing.asked(*found)
        places = lambda: self.probing.places(teacher.backbone)  # noqa: E731  # pyright: ignore[reportArgumentType]
        scores, seconds = measure(names, asked, places)
        if position == 0:
            self._note("chance", position, self.probing.chance(*found))
            self._note("pixels", position, self.probing.measure(pixel_features, "cpu")[0])
        self._note("teacher" if position else "random", position, scores)
        if position == self.last:
            untrained = self.run.build().eval()
            eyes = {"teacher": found}
            eyes["random"] = self.probing.measure(class_token(untrained), self.run.device)[1]
            eyes["pixels"] = self.probing.measure(pixel_features, "cpu")[1]
            self.probing.picture(self.run.folder / "neighbours.npz", eyes)
        took = time.perf_counter() - start
        self.spent += took
        if (rest := took - sum(cost.values()) - sum(seconds.values())) > 0.05:
            seconds["baselines and pictures"] = rest
        self.metrics.observe_probe({"who": "teacher", "position": position, **scores}, took)
        share = self.spent / max(time.perf_counter() - self.began, 1e-9)
        parts = {name: round(value, 3) for name, value in (cost | seconds).items()}
        if position not in self.run.log.probed:
            self.run.log.write(
                "probe_cost", position=position, seconds=round(took, 3), share=round(share, 4), parts=parts
            )
        text = ", ".join(f"{name.replace('_', ' ')} {value:.1f}" for name, value in parts.items())
        left = "".join(f"; no {name.replace('_', ' ')}: {why}" for name, why in scores.skipped.items())
        so_far = f", {share:.1%} of the time since this start" if position else ""
        self.notes.note(f"probes took {took:.1f} s ({text}){so_far}{left}")

    def _note(self, who: str, position: int, scores: dict[str, float]) -> None:
        if position not in self.run.log.probed:
            self.run.log.write("probe", position=position, who=who, **scores)
        self.metrics.observe_probe({"who": who, **scores})
        text = ", ".join(f"{name.replace('_', ' ')} {shown(name, value)}" for name, value in scores.items())
        self.notes.note(f"probe at image {position}: {who}: {text}")


def class_token(network: nn.Module, autocast: Callable | None = None) -> Callable[[Tensor], Tensor]:
    """The probed feature, [B, d]: the class token after the last LayerNorm, as the papers evaluate, or a ResNet's average."""
    backbone: nn.Module = network.backbone  # pyright: ignore[reportAssignmentType]

    def features(images: Tensor) -> Tensor:
        with evaluating(backbone), nullcontext() if autocast is None else autocast():
            return backbone.norm(backbone(images)[:, 0])  # pyright: ignore[reportCallIssue]

    return features


def load_teacher(folder: Path, recipe: Recipe) -> tuple[Student, int]:
    """The teacher of the newest whole checkpoint, in evaluation mode, and its position."""
    saved, _ = newest(open_store(recipe.checkpoint.store or folder / "checkpoints"))
    if saved is None:
        raise RecipeError(f"{folder} holds no checkpoint yet; it is written every {recipe.checkpoint.every} images")
    try:
        (teacher,) = saved_networks(saved, recipe, "teacher")
    except ValueError as error:
        raise CheckpointError(
            f"{saved.path} does not fit {folder / 'recipe.yaml'}: {error}; use the recipe that it was written with"
        ) from error
    finally:
        saved.close()
    return teacher.eval(), saved.position


def shown(name: str, value: float) -> str:
    """Scores and shares in percent, effective ranks and the like as they are."""
    return f"{100 * value:.1f} %" if name.endswith(SHARES) else f"{value:.2f}"


def _thumbnails(sources: Iterable[Iterator[tuple[list[str], Tensor]]], wanted: set[str]) -> dict[str, np.ndarray]:
    pictures = {}
    for batches in sources:
        for keys, images in batches:
            chosen = [i for i, key in enumerate(keys) if key in wanted]
            if chosen:
                small = images[chosen]
                if small.shape[-1] > THUMBNAIL:
                    small = F.interpolate(small, size=(THUMBNAIL, THUMBNAIL), mode="area")
                pictures.update(zip((keys[i] for i in chosen), as_pixels(small.cpu().numpy()), strict=True))
    return pictures
