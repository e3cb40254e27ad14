"""Mugs' local groups on the page: an image, those that the network mixes it with, and those nearest to it afterwards."""

from __future__ import annotations

from html import escape

import numpy as np

from .crops import BROKEN
from .curves import some
from .drawings import path_of, shown_position
from .folder import RunFolder
from .missing import missing, stale
from .neighbours import legend, load_neighbours, rows_of_pictures

EYES = {"memory": "mixed with", "mixed": "near afterwards"}
SIGNS = {
    "local_group/neighbour_similarity": "cosine to the neighbours",
    "local_group/neighbour_unique_ratio": "share of distinct neighbours",
}


def section(run: RunFolder) -> str:
    chart = some(run, SIGNS, heading="Neighbours in the memory")
    charts = f'<div class="charts">{chart}</div>' if chart else ""
    path = path_of(run.path, "groups")
    if not path.exists():
        return missing(run, "groups", "local groups") + charts
    try:
        near = load_neighbours(path)
        with np.load(path, allow_pickle=False) as archive:
            level = str(archive["level"])
        groups = rows_of_pictures(near, EYES)
    except BROKEN as error:
        return f'<p class="missing">{path.name} cannot be read: {escape(str(error))}</p>{charts}'
    text = (
        "The local-group objective mixes each image with its nearest rows in a memory before it compares them. Memories hold "
        "features without pictures, so images of the data set stand in for them: first those that the network would mix the "
        f"image with, then the nearest by the mixed feature.{escape(legend(near, f'{level} label'))}"
    )
    return f"{stale(run, 'groups', shown_position(run.path, 'groups') or 0)}<p>{text}</p>{groups}{charts}"
