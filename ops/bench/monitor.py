"""What watching costs: the calls that feed the metrics of a step, and a scrape a second, as shares of a tiny step.

    python -m gristmill.ops.bench.monitor [--recipe demo] [--steps 40] [--json] [KEY=VALUE ...]

A whole tiny run on drawn pictures with its exporter on, which another process scrapes once a second. What the loop
spends in its observer is taken inside that run, looks at storage, teacher and ledger included, and set against its steps:
both in processor time of the loop's own thread, so that whatever else a machine does changes nothing. A scrape is charged
with all of its rendering, as if the loop could do nothing meanwhile, though it gives way between any two lines.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
from prometheus_client import generate_latest

from ...shards.demo import make_demo_images
from ...shards.ingest import ingest_folder
from .. import train as training
from ..monitor.metrics import Metrics
from ..monitor.observer import Observer
from ..recipe import load_recipe

SKIPPED = 5  # steps at the beginning, which are slower than what follows
GOAL = 0.01
_SCRAPER = """
import sys, time, urllib.request
opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
while True:
    try:
        opener.open(open(sys.argv[1]).read().strip(), timeout=2).read()
    except OSError:
        pass
    time.sleep(1.0)
"""


def measure(recipe: str, steps: int, overrides: tuple[str, ...] = ()) -> dict[str, Any]:
    """Seconds a step, of them in the observer, of a rendering, and the two shares; series of the process."""
    spent: list[tuple[float, float]] = []  # the thread's time when a step was told, and of it in the observer
    kept: list[Metrics] = []

    class Timed(Observer):
        def step(self, verdict: Any, row: Any, phases: Any, loader: Any) -> None:
            begin = time.thread_time()
            super().step(verdict, row, phases, loader)
            spent.append((begin, time.thread_time() - begin))
            kept[:] = [self.metrics]

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_demo_images(root / "images", images=256, instances=2, size=64)
        ingest_folder(root / "images", root / "data")
        data = (f"data={root / 'data' / 'train'}", "probes.at=[]", "metrics.port=0", "watchdog=0")
        whole = load_recipe(recipe, [*data, *overrides], tiny=True)
        whole = whole.model_copy(update={"images": whole.batch * (steps + SKIPPED)})
        plain, training.Observer = training.Observer, Timed
        scraper = subprocess.Popen([sys.executable, "-c", _SCRAPER, str(root / "run" / "metrics.url")])
        try:
            training.train(whole, root / "run", quiet=True)
        finally:
            training.Observer = plain
            scraper.kill()
            scraper.wait()
    registry, seconds = kept[0].registry, [0.0] * 20
    for place in range(len(seconds)):
        begin = time.thread_time()
        page = generate_latest(registry)
        seconds[place] = time.thread_time() - begin
    counted = spent[SKIPPED:]
    step = (counted[-1][0] - counted[0][0]) / (len(counted) - 1)
    observed = sum(seconds for _, seconds in counted) / len(counted)
    scrape = sorted(seconds)[len(seconds) // 2]
    return {
        "recipe": recipe,
        "step_seconds": step,
        "observe_seconds": observed,
        "scrape_seconds": scrape,
        "observe_share": observed / step,
        "scrape_share": scrape,
        "series": sum(not line.startswith(b"#") for line in page.splitlines()),
    }


@click.command()
@click.option("--recipe", default="demo", show_default=True)
@click.option("--steps", default=40, show_default=True, help="Steps that are timed.")
@click.option("--json", "as_json", is_flag=True)
@click.argument("overrides", nargs=-1)
def main(recipe: str, steps: int, as_json: bool, overrides: tuple[str, ...]) -> None:
    """What watching a tiny run costs, as shares of its time."""
    found = measure(recipe, steps, overrides)
    if as_json:
        click.echo(json.dumps(found))
        return
    both = found["observe_share"] + found["scrape_share"]
    click.echo(
        f"{recipe}: of a tiny step, the calls that feed the metrics take {found['observe_share']:.2%}, and a scrape a second "
        f"of {found['series']} series {found['scrape_share']:.2%}: together {both:.2%}, {'within' if both < GOAL else 'above'} "
        f"the goal of {GOAL:.0%}"
    )


if __name__ == "__main__":
    main()
