"""A run with every objective, an ingest and a pair of ranks with every metric, watched by a real Prometheus; a browser online.

The made-up pair is there for panels that need a GPU or a cache, and for exact comparisons: its samples lie at known times, in
the exporter's own history and, as blocks, in Prometheus.
"""

from __future__ import annotations

import json
import math
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlencode
from zlib import crc32

from gristmill.ops.monitor.exporter import Exporter
from gristmill.ops.monitor.history import History
from gristmill.ops.monitor.intake import IngestCollector
from gristmill.ops.monitor.metrics import Metrics
from gristmill.ops.monitor.panels import wanted_samples
from gristmill.ops.monitor.panels_terms import Term, promql
from gristmill.shards.demo import make_demo_images
from gristmill.shards.ingest import IngestConfig, IngestStats, ingest
from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from ..servers import DIRECT, program
from ..waiting import wait_for
from ..workers import Worker, Workers
from .browser import Browser

TINY = (
    "batch=16", "images=160000", "student.patch_size=8", "student.image_size=32", "student.embed_dim=32",
    "student.depth=2", "student.heads=2", "views.teacher.size=32", "views.global.size=32", "views.local.size=16",
    "views.local.count=2", "objectives.hierarchy.levels=[8,4,2]", "objectives.hierarchy.memory=32", "objectives.hierarchy.queue=64",
    "objectives.hierarchy.warmup=0", "objectives.hierarchy.every=32", "objectives.dense.correspondence=features",
    "objectives.dense.queue=64", "objectives.instance.queue=64", "objectives.local_group.queue=64",
    "objectives.local_group.memory=64", "student.projections.dense.grid=4", "probes.at=[0.0,0.001]", "probes.size=32",
    "probes.neighbours=5", "checkpoint.every=256", "metrics.port=0", "watchdog=0", "threads=1",
)  # fmt: skip


PATIENCE = 300.0  # seconds for what takes a few on a machine that is not busy elsewhere


def ask(url: str, path: str, **query: str) -> Any:
    with DIRECT.open(f"{url}{path}?{urlencode(query)}", timeout=30) as answer:
        body = answer.read()
    return json.loads(body) if path.endswith("json") or "/api/" in path else body.decode()


def eventually(look: Callable[[], Any], seconds: float = PATIENCE) -> Any:
    """What it finds once it finds something; who does not answer yet is asked again."""

    def found() -> Any:
        try:
            return look()
        except OSError:
            return None

    return wait_for(found, seconds, "nothing", every=0.2)


class Everything(Collector):
    """Every metric of the catalogue for two ranks, each number a function of the time alone; `now` sets it."""

    def __init__(self) -> None:
        metrics = Metrics("every", {})
        metrics.observe(dict.fromkeys(metrics._places, 1.0))
        self.families = [family for family in metrics.registry.collect() if family.name.startswith("gristmill_")]
        for name, kind in (("process_resident_memory_bytes", "gauge"), ("process_cpu_seconds", "counter")):
            family = Metric(name, name, kind)
            family.add_sample(name if kind == "gauge" else f"{name}_total", {}, 1.0)
            self.families.append(family)
        self.now = 0.0

    def collect(self) -> Iterator[Metric]:
        for family in self.families:
            made = Metric(family.name, family.documentation, family.type)
            for rank in ("0", "1"):
                for sample in family.samples:
                    labels = {**sample.labels, "rank": rank}
                    made.add_sample(sample.name, labels, self.value(family, sample.name, labels))
            yield made

    def value(self, family: Metric, name: str, labels: dict[str, str]) -> float:
        mark = crc32(
            repr((name.removesuffix("_bucket"), sorted((k, v) for k, v in labels.items() if k != "le"))).encode()
        )
        part = (mark % 997 + 3) / 1000
        if family.name.endswith("timestamp_seconds"):
            return self.now - 100 * part
        if family.name == "gristmill_state":
            return float(labels["state"] == "training")
        if family.type in ("gauge", "info"):
            return part
        steps = self.now // 5 % 100_000  # that of samples: a counter grows by fits and starts
        grown = part * (steps + 0.3 * math.sin(steps))
        if family.name == "gristmill_read_bytes":
            grown = part * (steps % 17)  # and is begun anew
        return round(grown * self.reach(labels), 6)

    @staticmethod
    def reach(labels: dict[str, str]) -> float:
        """Share of the observations in a bucket."""
        return 1.0 if labels.get("le", "+Inf") == "+Inf" else min(1.0, (math.log10(float(labels["le"])) + 3.5) / 6)


def blocks(everything: Everything, registry: CollectorRegistry, history: History, folder: Path) -> float:
    """A minute and a half of `everything`, five seconds apart, for the history and as blocks for Prometheus; returns the last time."""
    end = time.time() // 5 * 5 - 3600
    lines: dict[str, list[str]] = {}
    for number in range(18):
        everything.now = end - 5 * (17 - number)
        history.sample(everything.now)
        for family in registry.collect():
            for sample in family.samples:
                if sample.name not in history.wanted:
                    continue
                labels = ",".join(
                    f"{name}={json.dumps(value)}" for name, value in {**sample.labels, "run": "every"}.items()
                )
                lines.setdefault(sample.name, []).append(f"{sample.name}{{{labels}}} {sample.value!r} {everything.now}")
    text = [line for name, rows in lines.items() for line in (f"# TYPE {name} unknown", *rows)]
    file = folder / "every.om"
    file.write_text("\n".join([*text, "# EOF", ""]))
    command = ["promtool", "tsdb", "create-blocks-from", "openmetrics", str(file), str(folder / "prometheus")]
    subprocess.run(command, check=True, capture_output=True)
    return end


TRAIN = """
from pathlib import Path
from gristmill.ops.recipe import load_recipe
from gristmill.ops.train import train
train(load_recipe("multigrain-vits16", overrides, tiny=True), Path(folder), quiet=True)
"""


class Watched:
    """A Prometheus with all three, and the running run. Nothing of it is left behind `close`, or where it cannot begin."""

    def __init__(self, root: Path, workers: Workers):
        """workers: what the run is forked from (tests/command.py)."""
        self.root = root
        make_demo_images(root / "images", images=96, instances=2, size=48)
        stats: list[IngestStats] = []
        config = IngestConfig(holdout=0.2)
        ingest([root / "images"], root / "data", config, progress=lambda now: stats.append(now) if not stats else None)
        data = (f"data={root / 'data' / 'train'}", f"probes.query={root / 'data' / 'probe'}")
        with ExitStack() as stack:
            self.training: Worker = workers.start(TRAIN, overrides=[*TINY, *data], folder=str(root / "run"))
            stack.callback(self.training.kill)
            registry = CollectorRegistry()
            registry.register(IngestCollector(lambda: stats[0]))
            self.intake = Exporter(registry, 0)
            stack.callback(self.intake.close)
            self.everything, self.registry = Everything(), CollectorRegistry()
            self.registry.register(self.everything)
            self.history = History(self.registry, wanted_samples(), {"run": "every"})
            self.end = blocks(self.everything, self.registry, self.history, root)
            scrapes = {
                "global": {"scrape_interval": "2s", "scrape_timeout": "2s"},
                "scrape_configs": [
                    {"job_name": "gristmill", "file_sd_configs": [{"files": [f"{root}/run/targets/*.json"], "refresh_interval": "1s"}]},
                    {"job_name": "gristmill-ingest", "static_configs": [{"targets": [f"127.0.0.1:{self.intake.port}"]}]},
                ],
            }  # fmt: skip
            (root / "prometheus.yml").write_text(json.dumps(scrapes))
            self.prometheus = stack.enter_context(program(root, "prometheus", root / "prometheus.yml"))
            self._stack = stack.pop_all()

    def begin(self) -> None:
        """Wait until the run has made what panels show."""
        self.url = eventually(self.told).removesuffix("/metrics")
        # Probes of both times, a clustering, a checkpoint: until then some panels have a right to be empty.
        want = "gristmill_probe_position_samples > 100 and gristmill_step_seconds_count > 60"
        eventually(lambda: self.query(f"({want}) and gristmill_checkpoint_last_position_samples > 0"))

    def told(self) -> str:
        assert self.training.poll() is None, self.training.output()
        file = self.root / "run" / "metrics.url"
        return file.read_text().strip() if file.exists() else ""

    def query(self, query: str, **more: str) -> list[dict[str, Any]]:
        return ask(self.prometheus, "/api/v1/query", query=query, **more)["data"]["result"]

    def values(self, term: Term, scope: tuple[str, ...], run: str, window: str, **more: str) -> dict[Any, float]:
        """What Prometheus says, by labels."""
        text = promql(term, scope).replace("$__rate_interval", window).replace("$run", run)
        text = text.replace("$rank", ".*").replace("$instance", ".*")
        found = {tuple(sorted(one["metric"].items())): float(one["value"][1]) for one in self.query(text, **more)}
        return {tuple(pair for pair in labels if pair[0] != "__name__"): value for labels, value in found.items()}

    def close(self) -> None:
        """End what was started."""
        self._stack.close()


class Online(Browser):
    """A browser that may ask this machine, and tells what it asked for."""

    def look(self, url: str, board: str, *, width: int = 1200, scheme: str = "light") -> None:
        self.call(
            "Network.emulateNetworkConditions", offline=False, latency=0, downloadThroughput=-1, uploadThroughput=-1
        )
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.call("Page.navigate", url="about:blank")
        self.events.clear()
        self.call("Page.navigate", url=f"{url}/#{board}")
        eventually(lambda: self.ask(f"document.getElementById('panels')?.dataset.drawn === {json.dumps(board)}"))

    def asked(self) -> list[str]:
        return [e["params"]["request"]["url"] for e in self.events if e["method"] == "Network.requestWillBeSent"]
