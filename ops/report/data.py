"""What the run reads: its data sets with what is in them, and the samples that are left out, with the reason.

A damaged or removed sample never costs more than its own slot: a substitute takes it each time it comes up. Files are read
plainly and never opened for writing, since the run may still be appending to them.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from html import escape
from pathlib import Path
from typing import Any

from .charts import percent
from .folder import RunFolder

NAMED = 10  # damaged samples listed one by one


def sources(recipe: dict[str, Any]) -> list[dict[str, Any]]:
    """The recipe's data sets: path, weight, where."""
    data = recipe.get("data")
    rows = data if isinstance(data, list) else [{"path": data}] if data else []
    return [row for row in rows if isinstance(row, dict)]


def about(path: Any) -> dict[str, Any]:
    """`dataset.json` of a data set in a folder; {} where it cannot be read here, as behind a url."""
    try:
        found = json.loads((Path(str(path)) / "dataset.json").read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def quarantined(folder: Path) -> list[dict[str, Any]]:
    """Entries of `quarantine.jsonl`, without repetition; [] without a file."""
    try:
        text = (folder / "quarantine.jsonl").read_text(errors="replace")
    except OSError:
        return []
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for raw in text.splitlines():
        try:
            line = json.loads(raw)
        except (ValueError, RecursionError):
            continue
        if isinstance(line, dict) and "shard" in line and "row" in line:
            found[str(line["shard"]), str(line["row"])] = line
    return list(found.values())


def cursor(folder: Path) -> dict[str, Any]:
    """The newest local checkpoint's place in the stream; {} where none can be read."""
    for state in sorted(folder.glob("checkpoints/[0-9]*/state.json"), reverse=True):
        try:
            found = json.loads(state.read_text())["state"]["cursor"]
            found = json.loads(found) if isinstance(found, str) else found
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            continue
        if isinstance(found, dict):
            return found
    return {}


def section(run: RunFolder) -> str:
    rows = sources(run.recipe)
    if not rows:
        return ""
    return _sources(rows) + _left_out(run)


def _sources(rows: list[dict[str, Any]]) -> str:
    weights = [row.get("weight", 1.0) for row in rows]
    total = sum(w for w in weights if isinstance(w, int | float))
    cells = []
    for row in rows:
        known = about(row.get("path"))
        counts = [
            f"{known[key]:,}" if isinstance(known.get(key), int) else "not readable here"
            for key in ("samples", "shards")
        ]
        weight = row.get("weight", 1.0)
        share = percent(weight / total) if isinstance(weight, int | float) and total > 0 else "–"
        cells.append(
            f'<tr><th class="long">{escape(str(row.get("path")))}</th><td>{counts[0]}</td><td>{counts[1]}</td>'
            f'<td>{share}</td><td class="text long">{escape(str(row.get("where") or "all"))}</td></tr>'
        )
    head = "".join(f"<th>{text}</th>" for text in ("data set", "images", "shards", "share of the stream"))
    return (
        f'<div class="scroll"><table><thead><tr>{head}<th class="text">taken</th></tr></thead>'
        f"<tbody>{''.join(cells)}</tbody></table></div>"
    )


def _left_out(run: RunFolder) -> str:
    damaged, at = quarantined(run.path), cursor(run.path)
    skipped = [r for r in at.get("skipped") or [] if isinstance(r, list) and len(r) == 2]
    removed = sum(r[0] for r in at.get("removed") or [] if isinstance(r, list) and r and isinstance(r[0], int))
    lines = []
    if isinstance(at.get("trained"), int):
        lines.append(f"{at['trained']:,} samples were trained on up to the newest checkpoint")
    if skipped:
        lost = sum(stop - start for start, stop in skipped if isinstance(start, int) and isinstance(stop, int))
        lines.append(f"{lost:,} were left out with their steps, which were bad (see the events)")
    if removed:
        lines.append(f"{removed:,} images were removed from the data on request; others took their slots")
    lines.append(
        f"{len(damaged):,} damaged {'sample is' if len(damaged) == 1 else 'samples are'} in quarantine, and substitutes "
        "take their slots"
        if damaged
        else "no sample was found damaged, so that every image took its own slot"
    )
    text = f"<p>{escape('; '.join(lines)[:1].upper() + '; '.join(lines)[1:])}.</p>"
    if not damaged:
        return text
    reasons = Counter(kind(str(entry.get("reason", "not said"))) for entry in damaged)
    by_reason = "".join(
        f'<tr><td class="text long">{escape(reason)}</td><td>{count:,}</td></tr>'
        for reason, count in reasons.most_common(20)
    )
    named = "".join(
        f'<tr><td class="text long">{escape(str(e.get("key", "")))}</td><td class="text long">{escape(str(e["shard"]))}</td>'
        f'<td>{escape(str(e["row"]))}</td><td class="text long">{escape(str(e.get("reason", ""))[:200])}</td></tr>'
        for e in damaged[:NAMED]
    )
    return (
        f'{text}<div class="scroll"><table><thead><tr><th class="text">why</th><th>samples</th></tr></thead><tbody>{by_reason}'
        f"</tbody></table></div><details><summary>The first {min(NAMED, len(damaged))} of them</summary>"
        f'<div class="scroll"><table><thead><tr><th class="text">key</th><th class="text">shard</th><th>row</th>'
        f'<th class="text">why</th></tr></thead><tbody>{named}</tbody></table></div></details>'
    )


def kind(reason: str) -> str:
    """A reason without its numbers, so that equal kinds of damage count together."""
    return re.sub(r"0x[0-9a-f]+|\d+", "…", reason)[:120]
