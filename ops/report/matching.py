"""DenseCL's matches on the page: drawn between two crops, counted against chance and the start, and over the run."""

from __future__ import annotations

import json
from html import escape

import numpy as np

from .charts import percent
from .crops import BROKEN, picture
from .curves import some
from .drawings import path_of
from .folder import RunFolder
from .missing import missing, stale

GROWTH = {
    "dense/correct": "right",
    "dense/correct_by_chance": "right by chance",
    "dense/matched": "places matched",
    "dense/same_place": "matched by their own number",
}
FORMS = {"features": "nearest feature", "mutual": "nearest both ways"}


def section(run: RunFolder) -> str:
    chart = some(run, GROWTH, heading="Matches in training", share=True)
    charts = f'<div class="charts">{chart}</div>' if chart else ""
    if _geometry(run) and chart:
        charts += (
            '<p class="soft">The recipe matches places by geometry, so that in training all are right; the pictures show what the '
            "features alone would match.</p>"
        )
    path = path_of(run.path, "matches")
    if not path.exists():
        return missing(run, "matches", "drawn matches") + charts
    try:
        with np.load(path, allow_pickle=False) as archive:
            pictures, keys, position = archive["picture"], archive["keys"].tolist(), int(archive["position"])
            scores, measured = json.loads(str(archive["scores"])), int(archive["measured"])
        drawn = "".join(_drawn(pixels, key) for pixels, key in zip(pictures, keys, strict=True))
        table = _table(scores)
    except (*BROKEN, TypeError) as error:
        return f'<p class="missing">{path.name} cannot be read: {escape(str(error))}</p>{charts}'
    text = (
        f"Which place of one crop the backbone's features take for which place of another, over {measured} images. A match is right "
        "if it lies within a cell of the place that shows the same point of the image; only places that both crops show are counted "
        f"({percent(scores['trained']['overlap'])}). Drawn are the surest of those that find each other: "
        '<span class="solid">right</span>, <span class="dashed">wrong</span>.'
    )
    return f'{stale(run, "matches", position)}<p>{text}</p>{table}<div class="pairs">{drawn}</div>{charts}'


def _geometry(run: RunFolder) -> bool:
    objectives = run.recipe.get("objectives")
    dense = objectives.get("dense") if isinstance(objectives, dict) else None
    return isinstance(dense, dict) and dense.get("correspondence") == "geometry"


def _drawn(pixels: np.ndarray, key: str) -> str:
    words = f"matches of places in two crops of {key}"
    return f'<img class="sheet" alt="{escape(words)}" src="{picture(pixels, "webp")}">'


def _table(scores: dict[str, dict[str, float]]) -> str:
    rows = []
    for form, words in FORMS.items():
        cells = [scores["trained"][f"{form}_chance"], scores["random"][f"{form}_correct"]]
        cells += [scores["trained"][f"{form}_{what}"] for what in ("correct", "matched", "same_place")]
        rows.append(f"<tr><th>{words}</th>{''.join(f'<td>{percent(cell)}</td>' for cell in cells)}</tr>")
    heads = ("", "right by chance", "before training", "now", "of all places", "of their own number")
    head = "".join(f"<th>{text}</th>" for text in heads)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
