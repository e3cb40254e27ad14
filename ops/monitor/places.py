"""Where the exporters of a run are: its folder's `targets/*.json` or `metrics.url`, a folder of targets, or a URL.

Targets files are what Prometheus reads as file_sd: `{"targets": ["host:port"], "labels": {"rank": "0"}}`, one or a list of
them. A run that restarts writes them anew, so a view that goes on asks again. Files are read with care: any process of
any node wrote them.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from ...shards.errors import GristmillError
from .reading import printable

URL_FILE = "metrics.url"  # in the run folder: one line, where rank 0's metrics are
TARGETS = "targets"  # in the run folder: a file for each rank
ATTEMPTS = "attempts.jsonl"
FILES = 65536  # of a folder of targets
BYTES = 1 << 20  # of a targets file


class StatusError(GristmillError):
    """No run to look at: nothing of that name, or what answers is something else. Exit code 2."""


class SilentError(StatusError):
    """A run that does not answer: it has ended, or was killed. Exit code 1."""

    code = 1


class Place(NamedTuple):
    """One exporter. group: what it is shown under, "" until its answer names a run; complete: its file is one of a file for
    every rank."""

    url: str
    labels: dict[str, str]
    group: str
    written: float | None = None  # when its file was written
    complete: bool = False


def locate(targets: Sequence[str]) -> list[Place]:
    """The exporters behind run folders, folders or files of targets, URLs and host:port; [] means the newest run here.

    Raises StatusError where there is no such thing, and SilentError for a run that is known not to run.
    """
    found = [place for target in targets or [_newest()] for place in _locate(target)]
    return list({place.url: place for place in reversed(found)}.values())[::-1]


def _locate(target: str) -> list[Place]:
    if re.match(r"https?://", target) or (
        re.fullmatch(r"(\[[\w:.]+\]|[\w.-]+):\d+(/\S*)?", target) and not _exists(target)
    ):
        return [Place(_metrics(target), {}, "")]
    path = Path(target)
    if path.is_file() and path.suffix == ".json":
        return _read(path, None) or _none(f"{target} lists no targets")
    if not path.is_dir():
        raise StatusError(
            f"no run folder {printable(target)}; give the folder of a run, a folder of targets, or the URL of its metrics"
        )
    is_run = (path / URL_FILE).exists() or (path / "recipe.yaml").exists() or (path / TARGETS).is_dir()
    files = _files(path / TARGETS if is_run else path)
    found = [place for file in files for place in _read(file, str(path) if is_run else None)]
    if (path / URL_FILE).exists():
        place = _url(path)
        if not any(place.url == other.url for other in found) and not any(o.labels.get("rank") == "0" for o in found):
            found.append(place)
    if found:
        return found
    ended = ended_because(path)
    if ended is not None:
        raise SilentError(
            f"{printable(target)} does not run: its last attempt ended ({ended}); look at `gristmill report`"
        )
    return _none(
        f"{printable(target)} has no {URL_FILE} and no {TARGETS}: it is no run folder, its run has not begun, or it runs "
        "without metrics (metrics.port=off)"
    )


def _none(why: str) -> list[Place]:
    raise StatusError(why)


def _exists(target: str) -> bool:
    try:
        return Path(target).exists()
    except OSError:  # no name for a file
        return False


def _newest() -> str:
    """The folder of the newest run below this one."""
    files = [file for where in (".", "*", "runs/*") for file in Path().glob(f"{where}/{URL_FILE}")]
    if not files:
        raise StatusError("no run below this folder; name one: gristmill status RUN, or the URL of its metrics")
    return str(max(files, key=lambda found: found.stat().st_mtime).parent)


def _url(folder: Path) -> Place:
    file = folder / URL_FILE
    try:
        url, written = file.read_text(errors="replace")[:1000].strip(), file.stat().st_mtime
    except OSError as error:
        raise StatusError(f"{file} cannot be read: {error.strerror or error}") from error
    if not re.fullmatch(r"https?://\S+", url):
        raise StatusError(f"{file} holds no URL; delete it and start the run again, or give the URL of the metrics")
    return Place(_metrics(url), {"rank": "0"}, str(folder), written)


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.json"))[:FILES] if folder.is_dir() else []


def _read(file: Path, group: str | None) -> list[Place]:
    """The places of one targets file; what is no target is passed over, since the run may be writing it or be gone."""
    try:
        with file.open("rb") as opened:
            entries: Any = json.loads(opened.read(BYTES))
        written = file.stat().st_mtime
    except (OSError, ValueError, RecursionError):
        return []
    found: list[Place] = []
    for entry in entries if isinstance(entries, list) else [entries]:
        targets, labels = (entry.get("targets"), entry.get("labels")) if isinstance(entry, dict) else (None, None)
        labels = labels if isinstance(labels, dict) else {}
        has = {printable(str(k)): printable(str(v)) for k, v in labels.items() if isinstance(v, str | int)}
        for target in targets if isinstance(targets, list) else []:
            if isinstance(target, str) and re.fullmatch(r"[^\s/?#@]+:\d+", target):
                scheme = "https" if has.get("__scheme__") == "https" else "http"
                path = has.get("__metrics_path__", "/metrics")
                seen = {k: v for k, v in has.items() if not k.startswith("__")}
                found.append(Place(f"{scheme}://{target}{path}", seen, group or has.get("run", ""), written, True))
    return found


def _metrics(text: str) -> str:
    parts = urlsplit(text if "://" in text else f"http://{text}")
    return f"{parts.scheme}://{parts.netloc}{parts.path if parts.path not in ('', '/') else '/metrics'}"


def ended_because(folder: Path) -> str | None:
    """What the run folder says about why its last attempt ended; None if it does not, or if one may still run."""
    try:
        lines = (folder / ATTEMPTS).read_text(errors="replace").splitlines()
        last = json.loads(lines[-1])
        return printable(str(last["why"])) if last["what"] == "ended" else None
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None
