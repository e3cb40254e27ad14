"""The picture of a simulated cluster: what caches fetch and hit, how even ranks are, what checkpoints weigh."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .growth_plot import PlotError
from .scale_table import Row

BLUE, RED, GREY, OCHRE = "#2f6f8f", "#b4553f", "#666666", "#8a6d1f"


def draw(rows: list[Row], path: Path) -> None:
    """A PNG of six panels, of the parts that there are rows of. Raises PlotError without matplotlib."""
    try:
        import matplotlib  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise PlotError("--plot needs matplotlib: `pip install matplotlib`, or leave --plot out") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot  # pyright: ignore[reportMissingImports]

    of: dict[str, list[Row]] = {}
    for row in rows:
        of.setdefault(row["what"], []).append(row)
    figure, axes = pyplot.subplots(2, 3, figsize=(14, 8))
    panels = (("batches", _balance), ("working set", _fetched), ("working set", _windows), ("node", _hits))
    panels = (*panels, ("synthetic", _memory), ("checkpoints", _index))
    for axis, (what, panel) in zip(axes.flat, panels, strict=True):
        if what in of:
            panel(axis, of[what])
            axis.grid(alpha=0.25)
            axis.tick_params(labelsize=9)
        else:
            axis.axis("off")
    figure.tight_layout(pad=1.6)
    figure.savefig(path, dpi=85)
    pyplot.close(figure)


def _balance(axis: Any, rows: list[Row]) -> None:
    names = [f"{r['ranks']:,} ranks,\n{r['lanes']:,} lanes" for r in rows]
    kinds = (
        ("samples a rank", "rank_samples", GREY),
        ("bytes a rank", "rank_bytes", BLUE),
        ("bytes a node", "node_bytes", OCHRE),
    )
    for number, (label, key, colour) in enumerate(kinds):
        places = [place + 0.2 * number for place in range(len(rows))]
        axis.bar(places, [r[key]["most_over_mean"] for r in rows], 0.2, label=label, color=colour)
    places = [place + 0.6 for place in range(len(rows))]
    axis.bar(
        places, [r["node_worst_step"]["mean"] for r in rows], 0.2, label="bytes, busiest node of a step", color=RED
    )
    axis.set_xticks([place + 0.3 for place in range(len(rows))], names, fontsize=8)
    axis.set_ylim(0.9, 1.5)
    axis.set_title("Balance: most over mean", fontsize=11)
    axis.legend(fontsize=8, frameon=False, loc="upper left")


def _fetched(axis: Any, rows: list[Row]) -> None:
    rows = [r for r in rows if r["window"] == 65536]
    lanes = [f"{r['lanes']:,}" for r in rows]
    axis.bar(lanes, [r["times_fetched"] for r in rows], color=[RED, OCHRE, OCHRE, BLUE][: len(rows)], width=0.6)
    for place, row in enumerate(rows):
        axis.annotate(
            f"{row['times_fetched']:.0f}x", (place, row["times_fetched"]), ha="center", va="bottom", fontsize=9
        )
    axis.set_yscale("log")
    axis.set_ylim(0.7, 1500)
    axis.set_xlabel("lanes", fontsize=9)
    axis.set_title("All nodes' caches: data set fetched in an epoch", fontsize=11)


def _windows(axis: Any, rows: list[Row]) -> None:
    lanes = sorted({r["lanes"] for r in rows})
    for count, colour in zip((lanes[0], lanes[-1]), (RED, BLUE), strict=True):
        mine = sorted((r for r in rows if r["lanes"] == count), key=lambda r: r["window"])
        sizes = [r["working_set"]["bytes"] / 1e9 for r in mine]
        axis.plot([r["window"] for r in mine], sizes, "o-", color=colour, label=f"{count:,} lanes")
    axis.set_xscale("log", base=2)
    axis.set_ylim(bottom=0)
    shown = sorted({r["window"] for r in rows if r["lanes"] in (lanes[0], lanes[-1])})
    axis.set_xticks(shown, [f"{window:,}" for window in shown], fontsize=8)
    axis.set_xlabel("window, samples", fontsize=9)
    axis.set_title("Working set of a node's cache, GB", fontsize=11)
    axis.legend(fontsize=8, frameon=False)


def _hits(axis: Any, rows: list[Row]) -> None:
    for node, styles in zip(rows, ([RED, RED, RED], [OCHRE, GREY, BLUE]), strict=True):
        for budget, colour in zip(sorted({row["budget"] for row in node["rows"]}), styles, strict=True):
            mine = [row for row in node["rows"] if row["budget"] == budget]
            steps = [row["position"] / node["samples"] for row in mine]
            shown = [row["hits"] / row["turns"] for row in mine]
            if node is rows[0]:
                mean = sum(row["hits"] for row in mine) / sum(row["turns"] for row in mine)
                if colour is not None and budget == max(row["budget"] for row in node["rows"]):
                    axis.axhline(
                        mean, color=RED, linestyle="--", label=f"{node['lanes']:,} lanes, {budget / 1e9:,.0f} GB (mean)"
                    )
            else:
                axis.plot(
                    steps,
                    shown,
                    "-",
                    color=colour,
                    label=f"{node['lanes']:,} lanes, {budget / 1e9:,.0f} GB",
                    linewidth=1.3,
                )
    axis.axvline(1.0, color=GREY, linestyle=":", linewidth=1)
    axis.set_ylim(-0.03, 1.05)
    axis.set_xlabel("epochs", fontsize=9)
    axis.set_title("Share of turns that find their shard in a node's cache", fontsize=11)
    axis.legend(fontsize=8, frameon=False, loc="lower left", bbox_to_anchor=(0, 0.07))


def _memory(axis: Any, rows: list[Row]) -> None:
    names = [f"{r['samples']:.0e}\n{r['shards']:,}" for r in rows]
    axis.bar(names, [r["added_MB"] for r in rows], color=BLUE, width=0.6)
    for place, row in enumerate(rows):
        axis.annotate(f"{row['added_MB']:.0f}", (place, row["added_MB"]), ha="center", va="bottom", fontsize=9)
    axis.set_xlabel("samples, shards", fontsize=9)
    axis.set_title("Memory of the order in one process, MB", fontsize=11)


def _index(axis: Any, rows: list[Row]) -> None:
    found = rows[0]["rows"]
    for recipe, colour in zip(sorted({r["recipe"] for r in found}), (GREY, BLUE, OCHRE, RED), strict=False):
        for stage, style in ((1, "--"), (3, "-")):
            mine = [r for r in found if r["recipe"] == recipe and r["stage"] == stage]
            label = f"{recipe.removeprefix('multigrain-')}, ZeRO {'1, 2' if stage == 1 else 3}"
            axis.plot(
                [r["ranks"] for r in mine], [r["state_bytes"] / 1e6 for r in mine], style, color=colour, label=label
            )
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    shown = sorted({r["ranks"] for r in found})
    axis.set_xticks(shown, [f"{ranks:,}" for ranks in shown])
    axis.set_xlabel("ranks", fontsize=9)
    axis.set_title("state.json of a checkpoint, MB", fontsize=11)
    axis.legend(fontsize=7, frameon=False, ncol=2)
