"""Which alerts would fire, as far as one view of a run can tell: a small condition for each alert of alerts.py.

Prometheus remembers; a view does not. A condition is the alert's own, with its thresholds, over what the ranks say now or
said some seconds ago, and tells where it holds. Where an alert looks at an hour, a process that is younger is judged from
its beginning, and an older one by what happened while it was watched. Alerts that need more than that stand in UNKNOWN
with the reason, and are left to Prometheus. A test holds both tables and alerts.py together, names and thresholds.
"""

from collections.abc import Sequence
from typing import Any

from . import conditions_data, conditions_learning, conditions_run
from .alerts import ALERTS
from .reading import Rank
from .scene import Condition, Scene

CONDITIONS: dict[str, Condition] = {
    **conditions_run.CONDITIONS,
    **conditions_data.CONDITIONS,
    **conditions_learning.CONDITIONS,
}
UNKNOWN: dict[str, str] = {**conditions_run.UNKNOWN, **conditions_data.UNKNOWN, **conditions_learning.UNKNOWN}


def holding(run: dict[str, Any], ranks: Sequence[Rank], complete: bool) -> list[dict[str, Any]]:
    """The alerts whose condition holds now, pages first.

    complete: `ranks` are all that there should be. Each is name, severity, where (texts), summary, hold_seconds (for which
    it must hold until it fires), masked_by (another that holds and explains it, or None).
    """
    scene = Scene(run, ranks, complete)
    held = {alert.name: where for alert in ALERTS if (where := _where(alert.name, scene))}
    masks = {masked: alert.name for alert in reversed(ALERTS) if alert.name in held for masked in alert.masks}
    found = [
        {
            "name": alert.name,
            "severity": alert.severity,
            "where": held[alert.name],
            "summary": alert.summary,
            "hold_seconds": alert.hold,
            "masked_by": masks.get(alert.name),
        }
        for alert in ALERTS
        if alert.name in held
    ]
    return sorted(found, key=lambda one: (one["masked_by"] is not None, one["severity"] != "page"))


def _where(name: str, scene: Scene) -> list[str]:
    condition = CONDITIONS.get(name)
    return condition.holds(scene, *condition.limits) if condition else []
