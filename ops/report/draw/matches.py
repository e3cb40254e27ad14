"""Which places of two crops the networks take for one another: the pictures of matches.py, kept for the report."""

from __future__ import annotations

import json

import numpy as np

from ....models.teacher import make_teacher
from ...matches import draw_pairs, grid_of, pictures_of, see
from ...networks import build_student
from .source import SHOWN, Source

MEASURED, BEST = 64, 24  # images that are counted; matches drawn of each


def draw_match_pictures(source: Source) -> dict[str, np.ndarray]:
    """picture uint8 [n, H, W, 3], keys [n], scores: of the trained and of the untrained network, JSON."""
    grid, pairs = grid_of(source.student), draw_pairs(source.recipe, MEASURED)
    untrained = build_student(source.recipe)
    seen = see(source.student, source.teacher, pairs, grid)
    scores = {
        "trained": seen.scores(),
        "random": see(untrained.eval(), make_teacher(untrained).eval(), pairs, grid).scores(),
    }
    pictures = pictures_of(pairs.head(SHOWN - 2), seen, BEST)
    return {
        "picture": np.stack([np.asarray(picture) for picture in pictures]),
        "keys": np.array(pairs.keys[: len(pictures)], dtype=np.str_),
        "scores": np.array(json.dumps(scores)),
        "measured": np.array(len(pairs.keys)),
    }
