"""All alerts and recording rules of Gristmill, and the two files made of them: for Prometheus and for Alertmanager.

Files are rendered from data, so that tests, `gristmill status` and the runbooks read the same list, and so that an alert
and what it masks stand side by side. `render(scale=0.01)` gives the rules of a run that lives a hundred times faster.
"""

from typing import Any

import yaml

from . import alerts_data, alerts_learning, alerts_run
from .alert import Alert, Record, duration, scaled

__all__ = ["ALERTS", "RECORDS", "RUNBOOKS", "Alert", "Record", "duration", "render", "render_routes", "scaled"]

RUNBOOKS = "docs/runbooks"  # where `runbook_url` points unless told otherwise: a page for each alert, <name>.md
SUBJECTS = {"run": alerts_run, "data": alerts_data, "learning": alerts_learning}
RECORDS: tuple[Record, ...] = tuple(record for subject in SUBJECTS.values() for record in subject.RECORDS)
ALERTS: tuple[Alert, ...] = tuple(alert for subject in SUBJECTS.values() for alert in subject.ALERTS)

_SHOWN = {
    "ratio": "{{ $value | humanizePercentage }}",
    "seconds": "{{ $value | humanizeDuration }}",
    "bytes": "{{ $value | humanize1024 }}B",
    "number": "{{ $value | humanize }}",
}
_MADE = "# Made by `gristmill monitor rules` from ops/monitor/alerts*.py; change it there.\n"
_ROUTES = """\
# Fill in where the two receivers lead; amtool check-config says whether the file is well. With Alertmanager's own
# notifiers keep their keys in files (api_url_file, routing_key_file, auth_password_file), not in here.
"""


def render(scale: float = 1.0, *, shortest: float = 0.0, runbooks: str = RUNBOOKS) -> str:
    """The rules file as YAML. scale multiplies all durations, windows are at least `shortest` seconds; runbooks: URL or
    folder of the runbooks' pages."""
    groups: list[dict[str, Any]] = [
        {"name": "gristmill-records", "rules": [_record(record, scale, shortest) for record in RECORDS]}
    ]
    for name, subject in SUBJECTS.items():
        rules = [_alert(alert, scale, shortest, runbooks.rstrip("/")) for alert in subject.ALERTS]
        groups.append({"name": f"gristmill-{name}", "rules": rules})
    return _MADE + yaml.safe_dump({"groups": groups}, sort_keys=False, width=110)


def render_routes() -> str:
    """The configuration of Alertmanager as YAML: pages at once, warnings gathered, and causes that mask what follows
    from them in the same run."""
    inhibit = [
        {
            "source_matchers": [f'alertname="{alert.name}"'],
            "target_matchers": [f'alertname=~"{"|".join(alert.masks)}"'],
            "equal": ["run"],
        }
        for alert in ALERTS
        if alert.masks
    ]
    hook = {"send_resolved": True}
    config = {
        "route": {
            "receiver": "morning",
            "group_by": ["run"],
            "group_wait": "1m",
            "group_interval": "10m",
            "repeat_interval": "1d",
            "routes": [
                {
                    "matchers": ['severity="page"'],
                    "receiver": "pager",
                    "group_by": ["run"],
                    "group_wait": "30s",
                    "group_interval": "5m",
                    "repeat_interval": "4h",
                }
            ],
        },
        "receivers": [
            {"name": "pager", "webhook_configs": [{"url": "http://127.0.0.1:5001/page", **hook}]},
            {"name": "morning", "webhook_configs": [{"url": "http://127.0.0.1:5001/warn", **hook}]},
        ],
        "inhibit_rules": inhibit,
    }
    return _MADE + _ROUTES + yaml.safe_dump(config, sort_keys=False, width=110)


def _record(record: Record, scale: float, shortest: float) -> dict[str, Any]:
    return {"record": record.name, "expr": scaled(record.expr, scale, shortest)}


def _alert(alert: Alert, scale: float, shortest: float, runbooks: str) -> dict[str, Any]:
    rule: dict[str, Any] = {"alert": alert.name, "expr": scaled(alert.expr, scale, shortest)}
    if alert.hold:
        rule["for"] = duration(alert.hold * scale)
    if alert.keep:
        rule["keep_firing_for"] = duration(alert.keep * scale)
    rule["labels"] = {"severity": alert.severity}
    rule["annotations"] = {
        "summary": alert.summary,
        "cause": alert.cause,
        "value": _SHOWN[alert.value],
        "runbook_url": f"{runbooks}/{alert.name}.md",
    }
    return rule
