"""What happened on the way, and the recipe as it was resolved."""

from __future__ import annotations

from html import escape

from .folder import RunFolder

LAST = 200


def section(run: RunFolder) -> str:
    """A table of the log's events, the last ones."""
    rows = []
    for event in run.events[-LAST:]:
        rest = {k: v for k, v in event.items() if k not in ("kind", "event", "position", "time")}
        text = ", ".join(f"{key.replace('_', ' ')}: {value}" for key, value in rest.items())
        at = event.get("position")
        where = f"{at:,}" if isinstance(at, int) else "-"
        what = str(event.get("event", "event")).replace("_", " ")
        rows.append(
            f'<tr><td>{where}</td><td class="text">{escape(what)}</td><td class="text long">{escape(text[:400])}</td></tr>'
        )
    if not rows:
        return ""
    more = f"<p>The last {LAST} of {len(run.events)}.</p>" if len(run.events) > LAST else ""
    return (
        f'{more}<div class="scroll"><table><thead><tr><th>after images</th><th class="text">what</th>'
        f'<th class="text">details</th></tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    )


def recipe(run: RunFolder) -> str:
    if not run.recipe_text:
        return ""
    return (
        f"<details><summary>Show recipe.yaml as it was resolved</summary><pre>{escape(run.recipe_text)}</pre></details>"
    )
