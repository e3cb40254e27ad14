"""Asking exporters: one, or all of a run at once, each with a short patience; and Prometheus, for its alerts.

A rank that does not answer is a row of the view and no error. All of them are asked together, since a rank that hangs
would else delay what the others say.
"""

import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from typing import Any, NamedTuple

from .client import get
from .places import Place, SilentError, StatusError
from .reading import Rank, Reading, printable

TOGETHER = 32  # exporters asked at the same time


class Tls(NamedTuple):
    """Files of an https exporter: the authority that signed its certificate, and our own certificate with its key."""

    ca: str | None = None
    cert: str | None = None
    key: str | None = None


OPEN = Tls()
STRANGER = "this is no Gristmill run"


def fetch(url: str, tls: Tls = OPEN) -> Reading:
    """One look at an exporter. Raises SilentError if nothing answers, StatusError for something that is not Gristmill."""
    try:
        page = get(url, tls.ca, tls.cert, tls.key)
    except (OSError, ValueError, HTTPException) as error:
        raise silence(printable(url), _reason(error)) from error
    try:
        reading = Reading(page.decode())
    except (ValueError, LookupError):  # no exposition format
        reading = None
    if reading is None or "gristmill_run_info" not in reading.values:
        raise stranger(printable(url))
    return reading


def silence(url: str, why: str, more: str = "", cause: str = "") -> SilentError:
    """What to say where nothing answers, as far as that is known. more: other places that do not either."""
    cause = cause or (
        "the run has ended, has not begun, or is on another machine (metrics are served on loopback unless "
        "metrics.address says otherwise)"
    )
    return SilentError(f"nothing answers at {url} ({why}){more}: {cause}")


def stranger(url: str) -> StatusError:
    """What to say where something else answers."""
    return StatusError(f"what answers at {url} is no Gristmill run; check the port")


def look(places: Iterable[Place], tls: Tls = OPEN) -> list[tuple[Place, Rank]]:
    """All exporters, asked together: what each says, or why it does not. A node's page gives a Rank for each rank."""
    places = list(places)
    if not places:
        return []
    with ThreadPoolExecutor(min(TOGETHER, len(places)), thread_name_prefix="gristmill-status") as pool:
        return [one for ranks in pool.map(lambda place: _look(place, tls), places) for one in ranks]


def _look(place: Place, tls: Tls) -> list[tuple[Place, Rank]]:
    url = printable(place.url)
    try:
        reading = fetch(place.url, tls)
    except StatusError as error:
        cause = error.__cause__
        why = _reason(cause) if isinstance(error, SilentError) and cause else STRANGER
        return [(place, Rank(url, place.labels, why=why))]
    parts = reading.split()
    if parts:
        return [(place, _of_node(url, {**place.labels, **labels}, part)) for labels, part in parts.values()]
    return [(place, Rank(url, place.labels, reading))]


def _of_node(url: str, labels: dict[str, str], part: Reading) -> Rank:
    if "gristmill_run_info" in part.values:
        return Rank(url, labels, part)
    return Rank(url, labels, why="its node says that it does not answer")


def alerts(url: str, tls: Tls = OPEN) -> list[dict[str, Any]]:
    """Gristmill's alerts that a Prometheus holds pending or firing: name, state, severity, labels, summary, since.

    Raises StatusError, with the remedy, where that is no Prometheus.
    """
    place = f"{url if '://' in url else f'http://{url}'}".rstrip("/") + "/api/v1/alerts"
    try:
        answer = json.loads(get(place, tls.ca, tls.cert, tls.key))
        found = answer["data"]["alerts"]
        return [_alert(one) for one in found if str(one["labels"]["alertname"]).startswith("Gristmill")]
    except (OSError, HTTPException) as error:
        raise StatusError(
            f"no Prometheus answers at {printable(url)} ({_reason(error)}); check --prometheus"
        ) from error
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise StatusError(f"what answers at {printable(url)} is no Prometheus; check --prometheus") from error


def _alert(one: Mapping[str, Any]) -> dict[str, Any]:
    labels = {printable(str(k)): printable(str(v)) for k, v in one["labels"].items()}
    notes = one.get("annotations") or {}
    return {
        "name": labels.pop("alertname"),
        "state": "firing" if one.get("state") == "firing" else "pending",
        "severity": labels.pop("severity", "warn"),
        "labels": labels,
        "summary": printable(str(notes.get("summary", ""))),
        "since": printable(str(one.get("activeAt", ""))),
    }


def _reason(error: BaseException) -> str:
    return printable(getattr(error, "strerror", None) or str(error) or type(error).__name__)
