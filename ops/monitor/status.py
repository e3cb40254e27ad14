"""`gristmill status`: a live view of a run in the terminal, read from its exporter like Prometheus reads it.

It asks the run and not its files, so what it shows is what an alert would see. A run folder names its exporter in
`metrics.url`; a URL works as well. Rates and shares are those of the last seconds while it watches, and of the
whole process in a single look. What another machine answers is not trusted to be printable or small.
"""

import json
import math
import re
import sys
import time
from collections import deque
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import ProxyHandler, build_opener

from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from ...shards.errors import GristmillError
from .exporter import URL_FILE
from .screen import draw

INTERVAL = 1.0  # seconds between two looks
WINDOW = 15  # looks that rates are taken over
PATIENCE = 10.0  # seconds without an answer until the live view ends
TIMEOUT = 3.0
PAGE_BYTES = 4 << 20

Labels = tuple[tuple[str, str], ...]


class StatusError(GristmillError):
    """No run to look at, or one that does not answer."""


class Reading:
    """The samples of one answer: a metric as a number, by one label, or by two. Missing metrics are None and {}."""

    def __init__(self, text: str):
        self.at = time.time()
        self.values: dict[str, dict[Labels, float]] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                labels = tuple(sorted((printable(k), printable(v)) for k, v in sample.labels.items()))
                self.values.setdefault(sample.name, {})[labels] = float(sample.value)

    def one(self, name: str) -> float | None:
        return next(iter(self.values.get(name, {}).values()), None)

    def by(self, name: str, label: str) -> dict[str, float]:
        return {dict(labels).get(label, ""): value for labels, value in self.values.get(name, {}).items()}

    def pairs(self, name: str, outer: str, inner: str) -> dict[str, dict[str, float]]:
        table: dict[str, dict[str, float]] = {}
        for labels, value in self.values.get(name, {}).items():
            table.setdefault(dict(labels).get(outer, ""), {})[dict(labels).get(inner, "")] = value
        return table

    def info(self) -> dict[str, str]:
        return dict(next(iter(self.values.get("gristmill_run_info", {})), ()))


def show_status(target: str, once: bool, as_json: bool) -> int:
    """Shows the run at `target`: a run folder, a URL, host:port, or "" for the newest run below this folder.

    once: one look and out, also wherever the output is no terminal; as_json: one look, as one JSON object.
    Returns the exit code: 0, or 1 if the run went away while it was watched. Raises StatusError, with the remedy.
    """
    url, written = locate(target)
    if not once and not as_json and sys.stdout.isatty():
        return watch(url, written, Console(highlight=False))
    summary = summarize(fetch(url), None, url, written)
    if as_json:
        print(json.dumps(_finite(summary), indent=2))
    else:
        Console(highlight=False).print(draw(summary))
    return 0


def watch(
    url: str, written: float | None, console: Console, interval: float = INTERVAL, patience: float = PATIENCE
) -> int:
    """The live view, until Ctrl-C (0) or until the run has not answered for `patience` seconds (1)."""
    readings = deque([fetch(url)], maxlen=WINDOW)
    try:
        with Live(console=console, auto_refresh=False, vertical_overflow="crop") as live:
            while True:
                view = draw(summarize(readings[-1], readings[0], url, written))
                silent = time.time() - readings[-1].at
                if silent >= interval * 2:
                    view = Group(view, Text(f"no answer for {silent:.0f} s", style="bold red"))
                live.update(view, refresh=True)
                if silent >= patience:
                    break
                time.sleep(interval)
                try:
                    readings.append(fetch(url))
                except StatusError:
                    continue  # shown above as silence, for as long as patience lasts
    except KeyboardInterrupt:
        return 0
    console.print("the run no longer answers: it has ended, or was killed", style="bold")
    return 1


def locate(target: str) -> tuple[str, float | None]:
    """(URL of the metrics, when the run folder's metrics.url was written or None where a URL was given)."""
    if re.match(r"https?://", target) or (re.fullmatch(r"[\w.-]+:\d+", target) and not Path(target).exists()):
        parts = urlsplit(target if "://" in target else f"http://{target}")
        return f"{parts.scheme}://{parts.netloc}{parts.path if parts.path not in ('', '/') else '/metrics'}", None
    if target:
        folder = Path(target)
        if not folder.is_dir():
            raise StatusError(f"no run folder {target}; give the folder of a run or the URL of its metrics")
        file = folder / URL_FILE
    else:
        files = [file for where in (".", "*", "runs/*") for file in Path().glob(f"{where}/{URL_FILE}")]
        if not files:
            raise StatusError("no run below this folder; name one: gristmill status RUN, or the URL of its metrics")
        file = max(files, key=lambda found: found.stat().st_mtime)
    try:
        url, written = file.read_text(errors="replace")[:1000].strip(), file.stat().st_mtime
    except OSError as error:
        raise StatusError(
            f"{file.parent} has no {URL_FILE}: it is no run folder, its run has not begun, or it runs without metrics "
            "(metrics.port=off)"
        ) from error
    if not re.fullmatch(r"https?://\S+", url):
        raise StatusError(f"{file} holds no URL; delete it and start the run again, or give the URL of the metrics")
    return url, written


def fetch(url: str) -> Reading:
    """One look at an exporter. Raises StatusError if nothing answers, or something that is not Gristmill."""
    try:
        with build_opener(ProxyHandler({})).open(url, timeout=TIMEOUT) as answer:  # loopback never goes by a proxy
            page = answer.read(PAGE_BYTES + 1)
    except (OSError, ValueError, HTTPException) as error:
        reason = error if isinstance(error, HTTPError) or not isinstance(error, URLError) else error.reason
        raise StatusError(
            f"nothing answers at {printable(url)} ({printable(str(reason))}): the run has ended, has not begun, or is "
            "on another machine (metrics are served on loopback unless metrics.address says otherwise)"
        ) from error
    try:
        reading = Reading(page.decode()) if len(page) <= PAGE_BYTES else None
    except (ValueError, LookupError):  # no exposition format
        reading = None
    if reading is None or "gristmill_run_info" not in reading.values:
        raise StatusError(f"what answers at {printable(url)} is no Gristmill run; check the port")
    return reading


def summarize(now: Reading, before: Reading | None, url: str, written: float | None = None) -> dict[str, Any]:
    """What is shown, as plain numbers and names; rates over the time since `before`, else over the whole process."""

    def grown(name: str) -> float:
        total, old = now.one(name) or 0.0, (before.one(name) or 0.0) if before else 0.0
        return total - old if total >= old else total

    if before is not None and grown("gristmill_steps_total") == 0:
        before = None  # nothing happened meanwhile: the whole process says more than 0/0
    steps, seconds = grown("gristmill_steps_total"), grown("gristmill_step_seconds_sum")
    phases = now.by("gristmill_step_phase_seconds_total", "phase")
    old = before.by("gristmill_step_phase_seconds_total", "phase") if before else {}
    spent = {name: max(total - old.get(name, 0.0), 0.0) for name, total in phases.items()}
    memories: dict[str, dict[str, float]] = {}
    buffers: dict[str, dict[str, float]] = {}
    for what, metric in (("fill", "fill_ratio"), ("age", "age_steps"), ("norm", "norm_mean")):
        for memory, value in now.by(f"gristmill_memory_{metric}", "memory").items():
            memories.setdefault(memory, {})[what] = value
    for metric in ("depth_batches", "capacity_batches", "starved_seconds_total", "blocked_seconds_total"):
        for buffer, value in now.by(f"gristmill_buffer_{metric}", "buffer").items():
            buffers.setdefault(buffer, {})[metric.rsplit("_", 1)[0]] = value
    started = now.one("process_start_time_seconds")
    reused = written is not None and started is not None and started > written + 2.0
    return {
        "url": printable(url),
        "warning": "this process began after the folder's metrics.url was written: another run" if reused else None,
        "run": now.info(),
        "progress": {
            "ratio": now.one("gristmill_progress_ratio"),
            "step": now.one("gristmill_step"),
            "position": now.one("gristmill_position_samples"),
            "images_per_second": grown("gristmill_images_total") / seconds if seconds else None,
            "step_seconds": seconds / steps if steps else None,
            "last_step_age_seconds": _age(now, "gristmill_last_step_timestamp_seconds"),
            "bad_steps": now.one("gristmill_bad_steps_total"),
        },
        "loss": {"all": now.one("gristmill_mixture_loss"), **now.by("gristmill_loss", "objective")},
        "schedules": {
            name: now.one(f"gristmill_{name}")
            for name in ("learning_rate", "weight_decay", "teacher_momentum", "teacher_temperature", "gradient_norm")
        },
        "phases": {name: part / sum(spent.values()) for name, part in spent.items()} if any(spent.values()) else {},
        "data_wait_ratio": now.one("gristmill_data_wait_ratio"),
        "samples": {
            "read": now.one("gristmill_read_samples_total"),
            "bytes": now.one("gristmill_read_bytes_total"),
            "substituted": now.one("gristmill_substituted_samples_total"),
            "quarantined": now.one("gristmill_quarantined_samples"),
        },
        "buffers": buffers,
        "memories": memories,
        "health": now.pairs("gristmill_objective_health", "objective", "name"),
        "probes": now.pairs("gristmill_probe_ratio", "probe", "who"),
        "checkpoint": {
            "age_seconds": _age(now, "gristmill_checkpoint_last_success_timestamp_seconds"),
            "bytes": now.one("gristmill_checkpoint_size_bytes"),
            **now.by("gristmill_checkpoints_total", "result"),
        },
    }


def printable(text: str) -> str:
    """A terminal obeys control characters, wherever they come from."""
    return "".join(c if c.isprintable() else "?" for c in text[:200])


def _age(now: Reading, name: str) -> float | None:
    stamp = now.one(name)
    return None if stamp is None else max(now.at - stamp, 0.0)


def _finite(value: Any) -> Any:
    """JSON has no NaN: what is not finite becomes null."""
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
