"""What the page says in place of a drawing, or above one that is older than the run."""

from __future__ import annotations

from html import escape

from .folder import RunFolder


def missing(run: RunFolder, name: str, what: str) -> str:
    """That a drawing is not there, why, and how to get it."""
    why = run.undrawn.get(name)
    reason = f": {why.rstrip('.')}" if why else ""
    remedy = (
        "" if why else "; `gristmill report` draws it from the newest checkpoint and the data that the recipe names"
    )
    return f'<p class="missing">No {escape(what)} yet{escape(reason)}{remedy}.</p>'


def stale(run: RunFolder, name: str, position: int) -> str:
    """That a drawing that is there could not be brought up to date; "" if it could."""
    why = run.undrawn.get(name)
    return f'<p class="missing">Of image {position:,}; a newer one could not be drawn: {escape(why)}</p>' if why else ""
