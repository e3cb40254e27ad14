"""Numbers, sizes, times and shares as an operator reads them, and rows of them.

Names come from the wire, so they are always `Text`: rich would read [markup] in a plain string. A terminal that cannot
show blocks and arrows (a log, an ASCII locale) gets plain characters instead of an error.
"""

import codecs
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TextIO

from rich.console import Console, ConsoleOptions
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

PLAIN = {"█": "#", "░": ".", "→": ">", "▸": ">", "·": "-", "…": "~", "×": "x", "│": "|", "─": "-"}
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def table(label: int = 18) -> Table:
    """Rows of a label and what is said of it."""
    rows = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    rows.add_column(style="cyan", no_wrap=True, max_width=label, overflow="ellipsis")
    rows.add_column(overflow="fold")
    return rows


def heading(text: str) -> Text:
    return Text(text, style="bold cyan")


class Packed:
    """Pieces of text side by side, as many to a line as fit: a number never stands on another line than its name."""

    def __init__(self, parts: Iterable[Text | str | None]):
        self.parts = [Text(part) if isinstance(part, str) else part for part in parts if part] or [Text("-")]

    def lines(self, width: int) -> list[Text]:
        lines: list[Text] = []
        for part in self.parts:
            if lines and lines[-1].cell_len + 2 + part.cell_len <= width:
                lines[-1].append("  ").append_text(part)
            else:
                lines.append(part.copy())
        return lines

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        yield from self.lines(options.max_width)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        longest = max(part.cell_len for part in self.parts)
        whole = sum(part.cell_len + 2 for part in self.parts) - 2
        return Measurement(min(longest, options.max_width), min(whole, options.max_width))


def pairs(values: Mapping[str, Any]) -> list[Text]:
    """`name value` for every value there is."""
    return [
        Text.assemble((f"{name} " if name else "", "dim"), (v if isinstance(v, str) else number(v), _style(v)))
        for name, v in values.items()
        if v is not None
    ]


def bar(share: float | None, width: int = 24, label: bool = True) -> str:
    """A share as a bar with its percentage; what is out of [0, 1] fills or empties it."""
    known = share is not None and math.isfinite(share)
    full = round(min(max(share or 0.0, 0.0), 1.0) * width) if known else 0
    return f"{'█' * full}{'░' * (width - full)}" + (f" {percent(share):>4}" if label else "")


def percent(share: float | None) -> str:
    if share is None or not math.isfinite(share):
        return "-"
    return f"{share:.0%}" if abs(share) < 10 else ">999%"


def number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if math.isfinite(value) and value == int(value) and abs(value) < 1e15 else f"{value:.4g}"


def size(value: float | None) -> str:
    """Bytes."""
    if value is None or not math.isfinite(value):
        return "-"
    power = min(max(int(math.log(max(value, 1.0), 1024)), 0), len(_UNITS) - 1)
    return f"{value / 1024**power:.1f} {_UNITS[power]}" if power else f"{value:.0f} B"


def duration(seconds: float | None) -> str:
    """Seconds, in the unit that makes a readable number."""
    if seconds is None or not math.isfinite(seconds):
        return "-"
    for span, unit in ((86400.0, "days"), (3600.0, "h"), (60.0, "min")):
        if seconds >= 2 * span:
            return f"{f'{seconds / span:.1f}'.removesuffix('.0')} {unit}"
    if seconds >= 10 or seconds == 0:
        return f"{seconds:.0f} s"
    return f"{seconds:.2g} s" if seconds >= 0.1 else f"{seconds * 1000:.2g} ms"


def plain(stream: TextIO) -> None:
    """Lets a stream that cannot show what is drawn here show something like it. Others stay as they are."""
    encoding = (getattr(stream, "encoding", None) or "ascii").lower().replace("-", "")
    if not encoding.startswith("utf") and hasattr(stream, "reconfigure"):
        codecs.register_error("gristmill-plain", _plain)
        stream.reconfigure(errors="gristmill-plain")  # pyright: ignore[reportAttributeAccessIssue]


def _plain(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    return "".join(PLAIN.get(c, "?") for c in error.object[error.start : error.end]), error.end


def _style(value: Any) -> str:
    return "bold red" if isinstance(value, float) and not math.isfinite(value) else ""
