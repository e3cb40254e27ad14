"""Dense contrast, streamed and plain: `python -m gristmill.ops.bench.dense_forms [--seconds 1]`, each way in a process of its own.

Forward and backward of one pair of crops: matching by features, InfoNCE of all places against the queue. Streamed as the
objective does it, or with the [places, queue + 1] logits of the formula, the official way. Sizes are DenseCL's: 32 images of
49 places (a ResNet's map at 224 pixels) or 196 (a ViT's patches of 16), 128 numbers, 65,536 rows. Memory is what one call adds at
its peak to what the process held, as in forms.py.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import click
import torch
import torch.nn.functional as F
from torch import Tensor

from ...objectives.correspondence import match_features
from ...objectives.dense import dense_contrast, negatives
from . import objectives
from .forms import Form, measured

SIZES: dict[str, Any] = {"images": 32, "places": [49, 196], "features": 384, "dim": 128, "queue": 65536}
TEMPERATURE = 0.2
WAYS = ("fast", "plain")


def unit(*shape: int) -> Tensor:
    return F.normalize(torch.randn(*shape), dim=-1)


def dense(fast: bool, s: dict[str, Any], places: int) -> Form:
    """One step's dense loss and its gradient; the loss is what a call returns."""
    queries = unit(s["images"], places, s["dim"]).requires_grad_()
    keys, queue = unit(s["images"], places, s["dim"]), unit(s["queue"], s["dim"])
    features = unit(s["images"], places, s["features"]), unit(s["images"], places, s["features"])

    def plain(matches: Any) -> Tensor:
        positive = (queries * keys.gather(1, matches.index.unsqueeze(2).expand_as(keys))).sum(2, keepdim=True)
        logits = (torch.cat([positive, queries @ queue.T], 2) / TEMPERATURE).flatten(0, 1)
        return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.int64))

    def run() -> float:
        matches = match_features(*features)
        if fast:
            lse, top = negatives(queries, queue, TEMPERATURE)
            loss = dense_contrast(queries, keys, matches, lse, top, TEMPERATURE).loss
        else:
            loss = plain(matches)
        loss.backward()
        queries.grad = None
        return float(loss.detach())

    return run


def compare(settings: dict[str, Any] | None = None, *, seconds: float = 1.0, threads: int = 0) -> dict[str, Any]:
    """By number of places: seconds, CPU seconds and MB of both ways, and their ratios. RuntimeError with what failed."""
    given = {**SIZES, **(settings or {}), "seconds": seconds, "threads": threads or len(os.sched_getaffinity(0))}
    fast, plain = (objectives._apart("dense_forms", way, json.dumps(given), threads=given["threads"]) for way in WAYS)
    return objectives._paired(fast, plain)


def both(way: str, settings: dict[str, Any]) -> dict[str, Any]:
    """One way at all numbers of places."""
    seconds = settings["seconds"]
    return {str(n): measured(dense(way == "fast", settings, n), seconds) for n in settings["places"]}


@click.command()
@click.option("--seconds", default=1.0, show_default=True, help="Spent on each form.")
@click.option("--threads", type=click.IntRange(0), default=0, help="Default: as many as this process may use.")
@click.option("--json", "as_json", is_flag=True, help="Print what was measured as JSON.")
def main(seconds: float, threads: int, as_json: bool) -> None:
    """Time and memory of dense contrast, streamed over plain."""
    found = compare(seconds=seconds, threads=threads)
    if as_json:
        click.echo(json.dumps(found))
        return
    for places, row in found.items():
        fast, plain = row["fast"], row["plain"]
        click.echo(
            f"{SIZES['images']} x {places} places: {fast['seconds']:.2f} s and {fast['memory_MB']:.0f} MB, plain "
            f"{plain['seconds']:.2f} s and {plain['memory_MB']:.0f} MB"
        )


if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1] in WAYS:
        asked = json.loads(sys.argv[2])
        torch.set_num_threads(asked["threads"])
        torch.set_flush_denormal(True)
        torch.manual_seed(0)
        sys.stdout.write(f"\n{json.dumps(both(sys.argv[1], asked))}\n")
    else:
        main()
