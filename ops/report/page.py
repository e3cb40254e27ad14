"""The report page: sections in the order in which a reader asks. What came out, how it got there, what went in.

Every string that comes from the run folder is escaped, and the page forbids itself scripts and network by a content
security policy, so that a file name or a recipe cannot do anything in the reader's browser.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from html import escape
from pathlib import Path

from . import crops, probes
from .charts import line_chart, percent, short
from .crops import BROKEN, data_uri, load_crops, sheet
from .folder import ReportError, RunFolder, read_run
from .neighbours import Neighbours, load_neighbours
from .style import STYLE

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
EYES = {"teacher": "teacher", "random": "untrained", "pixels": "raw pixels"}
QUERIES, NEAREST = 10, 8
SCHEDULES = ("lr", "learning_rate", "weight_decay", "momentum", "progress")
NAMES = {
    "loss": "Total loss",
    "ema": "EMA",
    "lr": "Learning rate",
    "weight_decay": "Weight decay",
    "momentum": "Teacher's momentum",
    "grad_norm": "Gradient norm",
    "seconds/data_wait": "Waiting for data, seconds a step",
}


def write_report(run_dir: Path) -> Path:
    """Write `run_dir/report.html` from what the folder holds and return its path. An older report is replaced at once.

    Works at any time of a run: what is missing is said on the page. Raises ReportError if the folder does not exist
    or cannot be written.
    """
    run_dir = Path(run_dir)
    run = read_run(run_dir)
    page = render(run)
    target, partial = run_dir / "report.html", run_dir / ".report.html.partial"
    try:
        partial.write_text(page, encoding="utf-8")
        os.replace(partial, target)
    except OSError as error:
        raise ReportError(
            f"{target} cannot be written ({error}). Free some space, or make the folder writable."
        ) from error
    return target


def render(run: RunFolder) -> str:
    """The whole page as text."""
    title = escape(str(run.recipe.get("name") or run.path.resolve().name))
    sections: list[tuple[str, str, Callable[[RunFolder], str]]] = [
        ("What was learned", "", probes.table),
        ("On the way", "", probes.curves),
        (
            "Losses",
            "Each objective's own loss, before its weight. The band is the range within a stretch of steps.",
            _losses,
        ),
        ("Schedules", "", _schedules),
        ("Time and gradients", "", _machine),
        ("What the network saw", "", _crops),
        ("Nearest neighbours", "", _neighbours),
        ("Events", "", _events),
        ("Everything else that was recorded", "", _others),
        ("Recipe", "", _recipe),
    ]
    body = [f"<h1>{title}</h1>", _lead(run), probes.tiles(run)]
    for heading, text, section in sections:
        if content := section(run):
            body.append(f"<section><h2>{heading}</h2>{f'<p>{text}</p>' if text else ''}{content}</section>")
    if run.problems:
        body.insert(2, "".join(f'<p class="missing">{escape(problem)}</p>' for problem in run.problems))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{title} · Gristmill</title><style>{STYLE}</style></head><body><main>{''.join(body)}</main></body></html>\n"
    )


def _lead(run: RunFolder) -> str:
    total, batch = run.recipe.get("images"), run.recipe.get("batch")
    if not run.steps:
        return '<p class="lead">No training step is recorded yet.</p>'
    last_batch = batch if isinstance(batch, int) and not isinstance(batch, bool) else 0
    seen = int(max(run.position, run.curves[next(iter(run.curves))].x[-1] + last_batch)) if run.curves else run.position
    text = f"{seen:,} images seen in {run.steps:,} steps"
    if isinstance(total, int) and total > 0:
        share = min(seen / total, 1)
        text += (
            " - the whole run"
            if seen + last_batch > total
            else f", {share:.0%} of the {total:,} that the recipe asks for"
        )
    waits, spent = run.curves.get("seconds/data_wait"), [c for n, c in run.curves.items() if n.startswith("seconds/")]
    seconds = sum(float(curve.y[curve.y > 0].sum()) for curve in spent)
    if seconds > 0:
        text += f"; {_duration(seconds)} of stepping"
        if waits is not None:
            text += f", {percent(float(waits.y[waits.y > 0].sum()) / seconds)} of it waiting for data"
    return f'<p class="lead">{escape(text.replace(" - ", " – "))}.</p>'


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"


def _charts(run: RunFolder, names: list[str], title: Callable[[str], str]) -> str:
    """Small charts of curves that move, and a line of text for those that do not."""
    moving = [line_chart(title(name), {name: run.curves[name]}) for name in names if not run.curves[name].constant]
    still = [f"{title(name)} {short(float(run.curves[name].y[0]))}" for name in names if run.curves[name].constant]
    text = f'<p class="soft">Constant: {escape(", ".join(still))}.</p>' if still else ""
    charts = "".join(moving)
    return (f'<div class="charts">{charts}</div>' if charts else "") + text


def _name(key: str) -> str:
    text = key.replace("_", " ").replace("/", " · ")
    return NAMES.get(key) or text[:1].upper() + text[1:]


def _is_loss(key: str) -> bool:
    return key == "loss" or key.startswith("loss/")


def _is_schedule(key: str) -> bool:
    return key in SCHEDULES or "temperature" in key or key.startswith(("weight/", "lr/"))


def _losses(run: RunFolder) -> str:
    names = sorted(filter(_is_loss, run.curves), key=lambda name: (name != "loss", name))
    return _charts(run, names, lambda key: _name(key.removeprefix("loss/")))


def _schedules(run: RunFolder) -> str:
    return _charts(run, list(filter(_is_schedule, run.curves)), _name)


def _machine(run: RunFolder) -> str:
    charts = _charts(run, [n for n in run.curves if n in ("seconds/data_wait", "data_wait") or "grad_norm" in n], _name)
    phases = {name.removeprefix("seconds/"): curve for name, curve in run.curves.items() if name.startswith("seconds/")}
    means = {name: float(curve.y[curve.y >= 0].mean()) for name, curve in phases.items() if (curve.y >= 0).any()}
    total = sum(means.values())
    if total <= 0:
        return charts
    rows = "".join(
        f"<tr><th>{escape(_name(name))}</th><td>{1000 * mean:.1f}</td><td>{percent(mean / total)}</td>"
        f'<td style="text-align:left"><span class="bar" style="width:{9 * mean / total:.2f}rem"></span></td></tr>'
        for name, mean in means.items()
    )
    return (
        f'{charts}<h3>Where a step\'s time goes</h3><div class="scroll"><table><thead><tr><th>phase</th>'
        f"<th>milliseconds</th><th>share</th><th></th></tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _others(run: RunFolder) -> str:
    def shown(key: str) -> bool:
        return _is_loss(key) or _is_schedule(key) or key.startswith("seconds/") or "grad_norm" in key or key == "time"

    content = _charts(run, [name for name in run.curves if not shown(name)], _name)
    return f"<details><summary>Show the curves</summary>{content}</details>" if content else ""


def _crops(run: RunFolder) -> str:
    if not (run.path / "crops.npz").exists():
        return '<p class="missing">No crops yet: the first batch leaves them here.</p>'
    try:
        views = load_crops(run.path / "crops.npz")
        parts = []
        for name, view in views.items():
            images, count, height, width, _ = view.shape
            text = f"{count} {'crop' if count == 1 else 'crops'} of {width} x {height} pixels for each image"
            picture = sheet(view)
            zoom = max(1, min(3, 128 // width))
            parts.append(
                f'<h3>{escape(name)}</h3><p class="soft">{text}; crops of one image stand together.</p><img class="sheet" '
                f'alt="{escape(f"{name}: {text}, {min(images, crops.ROWS)} images")}" width="{picture.width * zoom}" '
                f'src="{data_uri(picture)}">'
            )
    except BROKEN as error:
        return f'<p class="missing">crops.npz cannot be read: {escape(str(error))}</p>'
    return f"<p>Crops of the first batch, exactly as they were fed: cut, flipped, coloured.</p>{''.join(parts)}"


def _neighbours(run: RunFolder) -> str:
    if not (run.path / "neighbours.npz").exists():
        return '<p class="missing">No neighbours yet: a probe leaves them here.</p>'
    try:
        near = load_neighbours(run.path / "neighbours.npz")
        groups = "".join(_query(near, rows) for rows in near.by_query()[:QUERIES])
    except BROKEN as error:
        return f'<p class="missing">neighbours.npz cannot be read: {escape(str(error))}</p>'
    known = (near.match >= 0).any()
    legend = " A solid frame and ✓ mean the same label, a dotted frame and ✗ another one." if known else ""
    return (
        "<p>Each picture is followed by the pictures most similar to it, as the trained teacher, the untrained network "
        f"and the bare pixels see them. The number is the cosine similarity.{legend}</p>{groups}"
    )


def _query(near: Neighbours, rows: list[int]) -> str:
    lines = []
    for row in sorted(rows, key=lambda row: (list(EYES).index(near.who[row]) if near.who[row] in EYES else 9, row)):
        eyes = str(near.who[row])
        thumbs = "".join(
            _thumbnail(near.neighbour[row, place], float(near.similarity[row, place]), int(near.match[row, place]))
            for place in range(min(NEAREST, near.similarity.shape[1]))
        )
        lines.append(f'<li><span class="eyes">{escape(EYES.get(eyes, eyes))}</span>{thumbs}</li>')
    picture = _picture(near.query[rows[0]])
    return f'<div class="near"><img alt="query" width="96" src="{picture}"><ul class="rows">{"".join(lines)}</ul></div>'


def _thumbnail(pixels, similarity: float, match: int) -> str:
    kind, sign, words = {1: ("yes", "✓ ", "same label, "), 0: ("no", "✗ ", "another label, ")}.get(match, ("", "", ""))
    title = f"{words}cosine {similarity:.3f}"
    return (
        f'<figure class="thumb {kind}" title="{title}"><img alt="{title}" src="{_picture(pixels)}">{sign}{similarity:.2f}'
        "</figure>"
    )


def _picture(pixels) -> str:
    return data_uri(crops.Image.fromarray(pixels), "jpeg" if pixels.shape[0] > 32 else "png")


def _events(run: RunFolder) -> str:
    rows = []
    for event in run.events[-200:]:
        rest = {k: v for k, v in event.items() if k not in ("kind", "event", "position", "time")}
        text = ", ".join(f"{key.replace('_', ' ')}: {value}" for key, value in rest.items())
        at = event.get("position")
        where = f"{at:,}" if isinstance(at, int) else "-"
        what = str(event.get("event", "event")).replace("_", " ")
        rows.append(
            f'<tr><td>{where}</td><td style="text-align:left">{escape(what)}</td>'
            f'<td style="text-align:left;white-space:normal;overflow-wrap:anywhere">{escape(text[:400])}</td></tr>'
        )
    if not rows:
        return ""
    more = f"<p>The last 200 of {len(run.events)}.</p>" if len(run.events) > 200 else ""
    return (
        f'{more}<div class="scroll"><table><thead><tr><th>after images</th><th style="text-align:left">what</th>'
        f'<th style="text-align:left">details</th></tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    )


def _recipe(run: RunFolder) -> str:
    if not run.recipe_text:
        return ""
    return (
        f"<details><summary>Show recipe.yaml as it was resolved</summary><pre>{escape(run.recipe_text)}</pre></details>"
    )
