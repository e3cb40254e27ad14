"""Debian's Prometheus and Alertmanager on free loopback ports, and an inbox for what they would wake somebody with.

Rules and routes are the product's own, rendered so that `scale` times a second passes as one: what an operator waits ten
minutes for comes in seconds. Nothing leaves loopback, and both programs end with the block that started them.
"""

from __future__ import annotations

import json
import re
import threading
import time
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import yaml
from gristmill.ops.monitor import alerts

from ..servers import DIRECT, program

ROUTES = Path(alerts.__file__).parent / "rules" / "alertmanager.yml"
SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
WAITS = ("group_wait", "group_interval", "repeat_interval")
FORGOTTEN = 6.0  # seconds after which a target that was taken away is scraped no more


@dataclass(frozen=True)
class Notice:
    """One alert in one notification. at: by time.time()."""

    at: float
    name: str
    labels: dict[str, str]
    firing: bool


class Inbox:
    """A webhook receiver: every alert of every notification, in the order of arrival. Use as a context."""

    def __init__(self) -> None:
        self.notices: list[Notice] = []
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                told = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                now = time.time()
                owner.notices += [
                    Notice(now, one["labels"]["alertname"], one["labels"], one["status"] == "firing")
                    for one in told["alerts"]
                ]
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:
                """Quiet."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    def __enter__(self) -> Inbox:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@dataclass
class Watchers:
    """The two programs, and what arrived."""

    inbox: Inbox
    scale: float
    prometheus: str  # its address, http://127.0.0.1:port
    alertmanager: str
    late: dict[str, float]  # seconds by which alerts are held longer than the scale has it, by name

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Prometheus' answer to an instant query: [{"metric": labels, "value": [time, text]}, ...]."""
        return self._ask(f"/api/v1/query?query={urllib.parse.quote(expression)}")["result"]

    def rules(self) -> list[dict[str, Any]]:
        """All rules with their health and last error."""
        return [rule for group in self._ask("/api/v1/rules")["groups"] for rule in group["rules"]]

    def alerts(self) -> list[dict[str, Any]]:
        """Alerts as Prometheus has them, before Alertmanager looked: {"labels", "state", "activeAt", "value"}."""
        return self._ask("/api/v1/alerts")["alerts"]

    def _ask(self, path: str) -> Any:
        with DIRECT.open(self.prometheus + path, timeout=30) as answer:
            return json.load(answer)["data"]


@contextmanager
def watchers(folder: Path, targets: Path, *, scale: float, scrape: float) -> Iterator[Watchers]:
    """Both programs, asking what the file_sd files in the folder `targets` name every `scrape` seconds."""
    folder.mkdir(parents=True)
    with Inbox() as inbox:
        routes = folder / "alertmanager.yml"
        routes.write_text(yaml.safe_dump(_routed(yaml.safe_load(ROUTES.read_text()), inbox.url, scale)))
        rules = folder / "gristmill.yml"
        text, late = _ruled(scale, scrape)
        rules.write_text(text)
        with program(folder, "prometheus-alertmanager", routes, "--cluster.listen-address=") as alertmanager:
            often = alerts.duration(scrape)
            config = {
                "global": {"scrape_interval": often, "scrape_timeout": often, "evaluation_interval": often},
                "rule_files": [str(rules)],
                "alerting": {
                    "alertmanagers": [{"static_configs": [{"targets": [alertmanager.removeprefix("http://")]}]}]
                },
                "scrape_configs": [
                    {
                        "job_name": "gristmill",
                        "file_sd_configs": [{"files": [str(targets / "*.json")], "refresh_interval": "1s"}],
                    }
                ],
            }
            (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
            with program(folder, "prometheus", folder / "prometheus.yml") as prometheus:
                yield Watchers(inbox, scale, prometheus, alertmanager, late)


def _ruled(scale: float, scrape: float) -> tuple[str, dict[str, float]]:
    """The product's rules, and by how many seconds some are late. A window holds some scrapes at any scale.

    Prometheus takes a changed file_sd file in every 5 seconds, which at scale 1 is nothing to the minutes for which a rank
    may be away: here, what looks at `up` has to wait at least until a run that ended well has been forgotten.
    """
    rules = yaml.safe_load(alerts.render(scale, shortest=5 * scrape))
    late = {}
    for rule in (rule for group in rules["groups"] for rule in group["rules"]):
        if "alert" in rule and re.search(r"\bup\b", rule["expr"]):
            hold = _seconds(rule.get("for", "0s"))
            rule["for"] = alerts.duration(max(hold, FORGOTTEN))
            late[rule["alert"]] = max(0.0, FORGOTTEN - hold)
    return yaml.safe_dump(rules), late


def _routed(config: dict[str, Any], url: str, scale: float) -> dict[str, Any]:
    """The product's routes with their waits scaled, all of whose receivers are the inbox."""

    def scaled(route: dict[str, Any]) -> None:
        for wait in WAITS:
            if wait in route:
                route[wait] = alerts.duration(scale * _seconds(route[wait]))
        for inner in route.get("routes", []):
            scaled(inner)

    scaled(config["route"])
    for receiver in config["receivers"]:
        name = receiver["name"]
        receiver.clear()
        receiver.update(name=name, webhook_configs=[{"url": url, "send_resolved": True}])
    return config


def _seconds(duration: str) -> float:
    return sum(float(number) * SECONDS[unit] for number, unit in re.findall(r"(\d+)(ms|[smhd])", duration))
