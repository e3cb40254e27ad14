"""A row of the catalogue: under which name a number arrives, and what Prometheus is told it is."""

import re
from typing import NamedTuple

STEP_BUCKETS = tuple(0.001 * 2**k for k in range(17))  # 1 ms to 65 s
# Names in braces that Prometheus knows as another label; each name in braces is an enumeration of its own.
CALLED = {"centred": "objective", "spent": "state", "cuda": "kind", "retry": "reason"}
CHECKPOINT_BUCKETS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0)


class Row(NamedTuple):
    """One metric: the name under which values arrive, how they are taken, the metric's own name and help.

    kind: "gauge" takes the value, "add" adds it to a counter, "total" takes a running total and adds its growth
    (a total that fell was restarted), anything else is a histogram with these buckets. fixed: labels of this row alone.
    Counters begin at zero with the process, so that `increase()` sees the first event, but for `late` ones, which only
    some processes have, and which begin with what they are first told.
    """

    name: str
    kind: str | tuple[float, ...]
    metric: str
    help: str
    fixed: tuple[tuple[str, str], ...] = ()
    late: bool = False

    @property
    def free(self) -> tuple[str, ...]:
        """Enumerations that the name runs over, in order."""
        return tuple(re.findall(r"{(\w+)}", self.name))

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the labels: the fixed ones, then those in braces, in order."""
        return (*(label for label, _ in self.fixed), *(CALLED.get(name, name) for name in self.free))


class Group(NamedTuple):
    """Rows of one subject. source: who counts them, for the metric reference."""

    title: str
    source: str
    rows: tuple[Row, ...]
