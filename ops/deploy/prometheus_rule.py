"""The alert rules as Kubernetes wants them: `python -m gristmill.ops.deploy.prometheus_rule` writes the manifest anew.

Prometheus' operator takes rules as an object whose spec is a rules file. There is one list of alerts (monitor/alerts.py)
and no second copy by hand; a test holds the manifest to it.
"""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

from ..monitor.alerts import render

MANIFEST = Path(__file__).parent / "kubernetes" / "base" / "prometheusrule.yaml"
HEAD = """\
# Made by `python -m gristmill.ops.deploy.prometheus_rule` from ops/monitor/alerts.py; change it there.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: gristmill
  labels:
    app.kubernetes.io/name: gristmill
spec:
"""


def prometheus_rule() -> str:
    """The manifest: all groups of recording and alert rules."""
    rules = "".join(line for line in render().splitlines(keepends=True) if not line.startswith("#"))
    return HEAD + textwrap.indent(rules, "  ")


def main() -> None:
    MANIFEST.write_text(prometheus_rule())
    sys.stdout.write(f"{MANIFEST}\n")


if __name__ == "__main__":
    main()
