"""Watching thousands of ranks: target files, series, pages of nodes, and a real Prometheus that takes a share in.

A page is that of a rank with everything on: every name of the catalogue under every label that it may have, as
tests/ops/test_cardinality.py bounds it. One local server gives the same node's page to every target, so that Prometheus
does all of its own work; what it takes is measured with `taken` nodes and said for all, in proportion.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import subprocess
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

from prometheus_client import generate_latest

from ..monitor.catalogue import CATALOGUE
from ..monitor.labels import STATES
from ..monitor.metrics import Metrics
from ..monitor.node import merged
from ..monitor.targets import Target
from .scale import memory
from .scale_order import Cluster

INTERVAL = 15  # seconds between scrapes, as ops/deploy/prometheus/nodes.yml has it
PATIENCE = 90.0  # seconds for Prometheus to have scraped every target twice


def full_page() -> bytes:
    """What a rank serves that has a value for every series of the catalogue."""
    metrics = Metrics("scale", {"world": 1, "device": "cuda"})
    for name, (row, _) in metrics._places.items():
        if row.kind != "add":
            metrics.observe({name: 1.0})
    for state in STATES:
        metrics.observe_state(state)
    metrics.observe_step({"seconds": 0.1, "batch": 8, "phases": {}})
    metrics.observe_checkpoint(ok=True, seconds=1.0, size=10)
    metrics.observe_checkpoint(ok=False)
    missing = [
        row.metric
        for row in CATALOGUE
        if row.metric.removesuffix("_total").encode() not in generate_latest(metrics.registry)
    ]
    if missing:
        raise RuntimeError(f"the page lacks {missing[0]}")
    return generate_latest(metrics.registry)


def series(page: bytes) -> int:
    return sum(not line.startswith(b"#") for line in page.splitlines())


def measure(cluster: Cluster, taken: int) -> dict[str, Any]:
    """Files, bytes, seconds and series of a whole cluster; Prometheus' own with `taken` of its nodes."""
    page = full_page()
    own = dict.fromkeys(range(cluster.per_node), page)
    begin = time.process_time()
    node = merged(dict(own), cluster.per_node)
    merging = time.process_time() - begin
    found: dict[str, Any] = {
        "series_of_a_rank": series(page),
        "page_bytes": len(page),
        "series_of_a_node": series(node),
        "node_page_bytes": len(node),
        "merge_cpu_s": merging,
        "series": series(node) * cluster.nodes,
        "scrape_bytes": len(node) * cluster.nodes,
        "samples_per_s": series(node) * cluster.nodes / INTERVAL,
    }
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        begin = time.perf_counter()
        write_targets(root / "targets", root / "run", cluster, 9464)
        found["targets_write_s"] = time.perf_counter() - begin
        files = list((root / "targets").iterdir())
        found |= {"target_files": len(files), "target_bytes": sum(path.stat().st_size for path in files)}
        begin = time.perf_counter()
        Target(root / "targets", root / "run", 0).only(cluster.ranks)
        found["targets_sweep_s"] = time.perf_counter() - begin
        found["prometheus"] = prometheus(root, cluster, node, taken)
    return found


def write_targets(folder: Path, run: Path, cluster: Cluster, port: int, host: str = "") -> None:
    """The file of every rank; all of them answer at `host`, or each node at an address of its own."""
    for rank in range(cluster.ranks):
        node, local = divmod(rank, cluster.per_node)
        where = host or f"10.{node >> 16}.{node >> 8 & 255}.{node & 255}"
        Target(folder, run, rank).write(where, port + (0 if host else local), node=f"node{node:04d}", local_rank=local)


def prometheus(root: Path, cluster: Cluster, page: bytes, taken: int) -> dict[str, Any]:
    """A real one: seconds until it knows every target of the cluster; what `taken` nodes' pages cost it."""
    if shutil.which("prometheus") is None:
        return {"missing": "there is no prometheus on this machine"}
    some = Cluster(taken * cluster.per_node, taken * cluster.per_node, cluster.per_node)
    with _serving(page) as port:
        write_targets(root / "some", root / "run", some, port, "127.0.0.1")
        keep = {"source_labels": ["__local_rank__"], "regex": "0", "action": "keep"}
        jobs = [
            {"job_name": "all", "scrape_interval": "1h", "file_sd_configs": [{"files": [f"{root}/targets/*.json"]}]},
            {
                "job_name": "some",
                "honor_labels": True,
                "metrics_path": "/node",
                "scrape_interval": f"{INTERVAL}s",
                "relabel_configs": [keep, {"target_label": "pool", "replacement": "some"}],
                "file_sd_configs": [{"files": [f"{root}/some/*.json"]}],
            },
        ]
        (root / "prometheus.yml").write_text(json.dumps({"scrape_configs": jobs}))  # JSON is YAML
        with _started(root) as (process, url):
            begin = time.monotonic()
            known = _until(lambda: _targets(url, "all") == cluster.ranks)
            discovered = time.monotonic() - begin
            before = _seconds(process.pid)
            full = _until(lambda: _value(url, 'min(count_over_time(up{pool="some"}[10m]))') >= 2)
            wall, cpu = time.monotonic() - begin, _seconds(process.pid) - before
            head = json.loads(_ask(f"{url}/api/v1/status/tsdb") or b"{}").get("data", {}).get("headStats", {})
            return {
                "targets_known": known,
                "targets_known_s": discovered,
                "nodes_taken": taken,
                "all_scraped_twice": full,
                "up": _value(url, 'sum(up{pool="some"})'),
                "series_held": head.get("numSeries", 0),
                "resident_MB": memory("VmRSS", process.pid),
                "cpu_s": cpu,
                "wall_s": wall,
                "scrape_s": _value(url, 'avg(scrape_duration_seconds{pool="some"})'),
            }


@contextmanager
def _serving(page: bytes) -> Iterator[int]:
    """A server on loopback that gives this page to everybody."""
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain; version=0.0.4\r\nContent-Length: %d\r\n\r\n" % len(page)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await reader.readuntil(b"\r\n\r\n"):
                writer.write(head + page)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    loop = asyncio.new_event_loop()
    server = loop.run_until_complete(asyncio.start_server(answer, "127.0.0.1", 0))
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()


@contextmanager
def _started(root: Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = ["prometheus", f"--config.file={root / 'prometheus.yml'}", f"--storage.tsdb.path={root / 'tsdb'}"]
    process = subprocess.Popen(
        [*command, f"--web.listen-address={address}", "--log.level=error"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        _until(lambda: _ask(f"http://{address}/-/ready") is not None)
        yield process, f"http://{address}"
    finally:
        process.terminate()
        process.wait()


def _ask(url: str) -> bytes | None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=20) as answer:
            return answer.read()
    except OSError:  # not up yet
        return None


def _until(there: Any) -> bool:
    until = time.monotonic() + PATIENCE
    while not there():
        if time.monotonic() > until:
            return False
        time.sleep(0.2)
    return True


def _targets(url: str, job: str) -> int:
    found = json.loads(_ask(f"{url}/api/v1/targets?state=active&scrapePool={job}") or b"{}")
    return sum(one["scrapePool"] == job for one in found.get("data", {}).get("activeTargets", []))


def _value(url: str, query: str) -> float:
    found = json.loads(_ask(f"{url}/api/v1/query?query={quote(query)}") or b"{}")
    result = found.get("data", {}).get("result", [])
    return float(result[0]["value"][1]) if result else 0.0


def _seconds(pid: int) -> float:
    """CPU of a process, user and system."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
