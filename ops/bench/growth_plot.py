"""The picture of `gristmill bench objectives --plot`: time and memory of fast and plain forms as a size grows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...shards.errors import GristmillError

MEASURES = {"cpu_seconds": ("CPU milliseconds", 1e3), "memory_MB": ("MB added at the peak", 1.0)}
COLOURS = {"plain": "#b4553f", "fast": "#2f6f8f"}


class PlotError(GristmillError):
    """The picture could not be drawn."""


def draw(growth: dict[str, Any], path: Path) -> None:
    """A PNG: a column an axis of growth, time above, memory below. Raises PlotError without matplotlib."""
    try:
        import matplotlib  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise PlotError("--plot needs matplotlib: `pip install matplotlib`, or leave --plot out") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot  # pyright: ignore[reportMissingImports]

    figure, axes = pyplot.subplots(2, len(growth), figsize=(3.0 * len(growth), 5.0), squeeze=False)
    for column, (name, row) in enumerate(growth.items()):
        sizes = [int(size) for size in row]
        for line, (measure, (title, factor)) in enumerate(MEASURES.items()):
            axis = axes[line][column]
            for way, colour in COLOURS.items():
                values = [leaf[way][measure] * factor for leaf in row.values()]
                axis.plot(sizes, values, "o-", color=colour, label=way, markersize=4)
            axis.set_ylim(bottom=0)
            axis.set_xticks(sizes, [f"{size // 1024}k" if size >= 1024 else str(size) for size in sizes])
            axis.grid(alpha=0.25)
            if line == 0:
                axis.set_title(name, fontsize=10)
            if column == 0:
                axis.set_ylabel(title)
    axes[0][0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    pyplot.close(figure)
