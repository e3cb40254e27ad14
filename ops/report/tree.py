"""HCSC's tree on the page: nodes with the images that belong to them, and the negatives that selection takes for false."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

import numpy as np

from .charts import percent
from .crops import BROKEN, picture
from .curves import some
from .drawings import path_of
from .folder import RunFolder
from .missing import missing, stale
from .neighbours import thumbnail

DROPPED = {"hierarchy/instance_dropped": "of the queue", "hierarchy/prototype_dropped": "of the prototypes"}
STABLE = {f"hierarchy/level{level}_stable": f"level {level}" for level in range(6)}


def section(run: RunFolder) -> str:
    drawn = [
        some(run, DROPPED, heading="Negatives dropped as false", share=True),
        some(run, STABLE, heading="Prototypes that kept their number", share=True),
    ]
    charts = f'<div class="charts">{"".join(drawn)}</div>' if any(drawn) else ""
    path = path_of(run.path, "tree")
    if not path.exists():
        return missing(run, "tree", "tree with images") + charts
    try:
        with np.load(path, allow_pickle=False) as archive:
            held = {name: archive[name] for name in archive.files}
        content = _tree(held) + _removed(held)
    except BROKEN as error:
        return f'<p class="missing">{path.name} cannot be read: {escape(str(error))}</p>{charts}'
    return stale(run, "tree", int(held["position"])) + content + charts


def _tree(held: Mapping[str, np.ndarray]) -> str:
    total, levels, used = int(held["total"]), held["levels"].tolist(), held["used"].tolist()
    text = (
        f"Prototypes on {len(levels)} levels, {' under '.join(f'{k:,}' for k in levels)}, last clustered after "
        f"{int(held['clustered']):,} images. {total} images of the data set were walked down the tree; they reach "
        f"{' and '.join(map(str, used))} of them. Shown are the fullest nodes, each with the images that are surest of it."
    )
    depths = held["depth"].tolist()
    items, open_lists = [], 0
    for row, depth in enumerate(depths):
        while open_lists > depth + 1:
            items.append("</li></ul>")
            open_lists -= 1
        items.append('<ul class="tree">' if open_lists == depth else "</li>")
        open_lists = depth + 1
        items.append(f"<li>{_node(held, row, total)}")
    items.append("</li></ul>" * open_lists)
    return f"<p>{text}</p>{''.join(items)}"


def _node(held: Mapping[str, np.ndarray], row: int, total: int) -> str:
    number, images = int(held["number"][row]), int(held["images"][row])
    name = f"prototype {number}"
    shown = held["picture"][row][: int(held["pictures"][row])]
    pictures = "".join(f'<img alt="image of {name}" src="{picture(pixels, "webp")}">' for pixels in shown)
    words = f"{images} image{'s' if images != 1 else ''}, {percent(images / max(total, 1))}"
    return f'<div class="node"><span><b>{name}</b> {words}</span><span class="strip">{pictures}</span></div>'


def _removed(held: Mapping[str, np.ndarray]) -> str:
    rows = []
    for place, query in enumerate(held["query"]):
        gone = "".join(
            thumbnail(pixels, float(chance), what="probability of being dropped")
            for pixels, chance in zip(held["gone"][place], held["gone_chance"][place], strict=True)
        )
        kept = "".join(
            thumbnail(pixels, float(cosine))
            for pixels, cosine in zip(held["kept"][place], held["kept_cosine"][place], strict=True)
        )
        lines = f'<li><span class="eyes">dropped</span>{gone}</li><li><span class="eyes">nearest that stay</span>{kept}</li>'
        source = picture(query)
        rows.append(f'<div class="near"><img alt="query" width="96" src="{source}"><ul class="rows">{lines}</ul></div>')
    labels = "".join(
        f"<tr><th>{escape(str(name))}</th><td>{percent(float(right))}</td><td>{percent(float(chance))}</td></tr>"
        for name, right, chance in zip(held["label"], held["right"], held["by_chance"], strict=True)
    )
    table = (
        '<p>Labels, which training does not see, tell how often the dropped really are of the query\'s kind:</p><div class="scroll">'
        "<table><thead><tr><th>same label</th><th>of the dropped</th><th>of all pairs</th></tr></thead>"
        f"<tbody>{labels}</tbody></table></div>"
        if labels
        else ""
    )
    return (
        "<h3>False negatives that selection removes</h3><p>Contrast with the queue leaves out entries that seem to be of the "
        f"query's own cluster. Among these images it drops {percent(float(held['dropped']))} of all pairs. For each query: the "
        f"images likeliest dropped, with the probability, and the nearest of those "
        f"that are dropped less than the average pair, with the cosine.</p>{table}{''.join(rows)}"
    )
