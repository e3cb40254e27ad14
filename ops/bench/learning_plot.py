"""The picture of `gristmill bench learning`: every arm on every probe, a column a granularity, a row a data set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .growth_plot import PlotError
from .learning_exam import GRANULARITIES

BEFORE = {"chance": ":", "pixels": "--", "random": "-"}
COLOURS = {"multigrain": "#b4553f", "Mugs": "#8a6d1f"}


def draw(found: dict[str, Any], path: Path) -> None:
    """A PNG of bars with spreads; lines are chance, raw pixels, the untrained network. Raises PlotError without matplotlib."""
    try:
        import matplotlib  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise PlotError("--plot needs matplotlib: `pip install matplotlib`, or leave --plot out") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot  # pyright: ignore[reportMissingImports]

    sets = found["sets"]
    height = 0.32 * max(len(part["arms"]) for part in sets.values()) + 0.5
    figure, axes = pyplot.subplots(len(sets), len(GRANULARITIES), figsize=(11, height * len(sets)), squeeze=False)
    for line, (name, part) in enumerate(sets.items()):
        arms = [arm for arm in part["arms"] if arm not in BEFORE][::-1]
        for column, probe in enumerate(GRANULARITIES):
            axis = axes[line][column]
            values = [tuple(100 * each for each in part["arms"][arm][probe]) for arm in arms]
            axis.barh(
                arms, [mean for mean, _ in values], xerr=[off for _, off in values],
                color=[COLOURS.get(arm, "#2f6f8f") for arm in arms], ecolor="#444444", height=0.7,
            )  # fmt: skip
            for before, style in BEFORE.items():
                if before in part["arms"]:
                    axis.axvline(100 * part["arms"][before][probe][0], color="#666666", linestyle=style, linewidth=1)
            axis.grid(axis="x", alpha=0.25)
            axis.tick_params(labelsize=8, labelleft=column == 0)
            axis.set_title(f"{name}: {probe}, %", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    pyplot.close(figure)
