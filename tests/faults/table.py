"""The table of faults: one row a fault, counted by the tests, as Markdown in docs/faults.md."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from .streams import Found

DOCS = Path(__file__).parents[2] / "docs" / "faults.md"
HEAD = [
    "fault", "injected", "slots checked", "damaged", "substituted: expected = found", "skipped, repeated, astray",
    "counters and what became of it",
]  # fmt: skip


@dataclass
class Row:
    """What one fault did. `varies` where times or chance decide about the numbers, and only what holds is asserted."""

    fault: str
    varies: bool = False
    injected: int = 0
    total: Found = field(default_factory=Found)
    counters: dict[str, int] = field(default_factory=dict)
    became: str = ""

    def add(self, found: Found, injected: int = 0, became: str = "", **counters: int) -> None:
        """Count a stream in, and what was injected into it. Counters of the same name are added up."""
        for name, value in vars(found).items():
            setattr(self.total, name, getattr(self.total, name) + value)
        self.injected += injected
        self.became = became or self.became
        for name, value in counters.items():
            self.counters[name] = self.counters.get(name, 0) + int(value)

    def markdown(self) -> str:
        total = self.total
        numbers = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in self.counters.items())
        cells = [
            self.fault + (" *" if self.varies else ""),
            str(self.injected),
            str(total.slots),
            str(total.damaged),
            f"{total.damaged} = {total.substituted}",
            f"{total.skips}, {total.repeats}, {total.astray}",
            ". ".join(part for part in (self.became, numbers) if part),
        ]
        return "| " + " | ".join(cells) + " |"


def render(rows: list[Row]) -> str:
    """The whole table, a line a fault."""
    lines = ["| " + " | ".join(HEAD) + " |", "| --- | ---: | ---: | ---: | ---: | ---: | --- |"]
    return "\n".join([*lines, *(row.markdown() for row in rows)]) + "\n"


def documented() -> dict[str, str]:
    """The docs' rows by fault."""
    lines = [line for line in DOCS.read_text().splitlines() if line.startswith("| ")] if DOCS.exists() else []
    return {line.split("|")[1].strip().removesuffix(" *"): line for line in lines[2:]}
