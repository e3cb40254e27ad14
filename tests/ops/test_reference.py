"""docs/metrics.md says what the code serves: it is made from it, and names everything that any part of the monitor emits."""

import re
from pathlib import Path

from gristmill.ops.monitor import catalogue, reference
from gristmill.ops.monitor.catalogue import CATALOGUE, ENUMS, GROUPS
from gristmill.ops.monitor.labels import RETRIES
from gristmill.ops.monitor.row import Row
from gristmill.shards.retry import KINDS, kind_of

ROOT = Path(reference.__file__).parents[2]
FILE = ROOT / "docs" / "metrics.md"
# Recorded by rules or made up in examples, not served.
NO_METRIC = re.compile(r"gristmill_(node_rank|ingest)$")


def test_the_reference_is_up_to_date():
    assert FILE.read_text() == reference.render(), "run `gristmill monitor reference --out docs`"


def test_every_metric_and_every_label_value_is_in_it():
    text = reference.render()
    for row in CATALOGUE:
        assert text.count(f"| `{row.metric}` |") == 1, row.metric
    for name, values in ENUMS.items():
        assert all(re.search(rf"\b{re.escape(value)}\b", text) for value in values), name
    assert len([row for group in GROUPS for row in group.rows]) == len(CATALOGUE)


def test_whatever_the_monitor_emits_beside_the_catalogue_is_in_it():
    text = reference.render()
    for name in ("exporter.py", "node.py", "intake.py", "serving.py"):
        source = (Path(catalogue.__file__).parent / name).read_text()
        emitted = set(re.findall(r'(?:"|TYPE |HELP )(gristmill_[a-z_]+)\b', source))
        lacking = {each for each in emitted if f"`{each}" not in text}
        assert not lacking, (name, lacking)


def test_rows_of_one_metric_agree():
    described: dict[str, Row] = {}
    for row in CATALOGUE:
        first = described.setdefault(row.metric, row)
        assert (row.help, row.labels, row.kind, row.late) == (first.help, first.labels, first.kind, first.late), (
            row.metric
        )


def test_kinds_of_trouble_are_those_of_the_storage():
    assert RETRIES == KINDS
    told = {kind_of(reason) for reason in ("429", "503", "500", "stalled", "connect", "short", "https://x/?key=1", "")}
    assert told == set(KINDS)
