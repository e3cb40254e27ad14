"""Serving a training's metrics: a port for each rank, its file for Prometheus, the pages; and never a reason to end a run.

A laptop's user who named a taken port would rather be told than served elsewhere, but at two in the morning the port of a
restarted job is held by its predecessor, which is still leaving, and nobody is there to be told. So whatever cannot be had
is said in a line and replaced: a taken port by a free one (and the wanted one is taken as well if it is left within a
minute), an address of another machine by loopback, a target that cannot be written by none. Only https is never
replaced by something weaker: without its certificates nothing is served.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Literal, Protocol

from prometheus_client import CollectorRegistry

from .exporter import URL_FILE, Exporter, ExporterError, Handler, Tick, bracketed
from .node import Gathering, NodePage
from .ports import PORT, listen
from .targets import FOLDER, Target, run_label
from .tls import RENEWED, Files, Secured

LOOPBACK = "127.0.0.1"
RETAKE = 60.0  # seconds in which a predecessor may still be leaving
LOOK = 2.0  # seconds between two looks whether it has


class Wanted(Protocol):
    """`metrics` of a recipe."""

    @property
    def port(self) -> int | Literal["off"]: ...
    @property
    def address(self) -> str: ...
    @property
    def tls(self) -> Files | None: ...
    @property
    def targets(self) -> Path | None: ...
    @property
    def prometheus(self) -> str | None: ...


class Serving:
    """One rank's exporter and what points at it; `close(clean)` takes all of it away, but for a failed run's targets."""

    def __init__(self, exporter: Exporter, gathering: Gathering | None):
        self.exporter = exporter
        self.url = exporter.url
        self.files: list[Path] = []
        self.targets: list[Target] = []
        self._gathering = gathering

    def close(self, clean: bool) -> None:
        """clean: nothing went wrong; otherwise the targets stay, so that Prometheus finds nobody there and says so."""
        self.exporter.close()
        if self._gathering:
            self._gathering.leave()
        for file in self.files:
            with suppress(OSError):
                file.unlink(missing_ok=True)
        for target in self.targets if clean else []:
            target.remove()


def serve(
    config: Wanted,
    registry: CollectorRegistry,
    *,
    rank: int,
    world: int,
    folder: Path,
    notes: Callable[[str], None],
) -> Serving | None:
    """Serve `registry` as `config` wishes; None where that is not wished, or cannot be done. Never raises.

    rank, world: of the whole run, whose folder is `folder`; this process' place on its machine is LOCAL_RANK of
    LOCAL_WORLD_SIZE in the environment. notes: takes lines for the user; ranks but the first, which nobody listens to,
    write theirs to the error stream. Where nothing is served any more, an earlier attempt's targets are taken away.
    """
    tell = notes if rank == 0 else lambda line: print(f"rank {rank}: {line}", file=sys.stderr)
    if config.port == "off":
        if rank == 0:
            _forget(config, folder, tell)
        return None
    try:
        serving = _serve(config, config.port, registry, rank, world, folder, tell)
    except Exception as error:  # no thread, no file handle, or what nobody thought of
        tell(f"WARNING: metrics are not served: {error}")
        return None
    if rank == 0:
        tell(f"metrics: {serving.url}")
    return serving


def _serve(
    config: Wanted,
    port: int,
    registry: CollectorRegistry,
    rank: int,
    world: int,
    folder: Path,
    notes: Callable[[str], None],
) -> Serving:
    pages: dict[str, Handler] = {}
    ticks: list[Tick] = []
    local, ranks = (int(os.environ.get(name, other)) for name, other in (("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1)))
    secured = Secured(config.tls) if config.tls else None
    if secured:
        ticks.append((RENEWED, secured.look))
    gathering = None
    if ranks > 1:
        try:
            gathering = Gathering(folder, rank)
        except ExporterError as error:
            notes(f"/node of this rank speaks for itself only: {error}")
    node = NodePage(rank, ranks, gathering and gathering.folder)
    pages["node"] = node
    if rank == 0:
        _add_board(config, registry, world, folder, notes, pages, ticks)
    wanted = port + local if port else 0
    again = Again(config.address, wanted)
    ticks.append((LOOK, again.look))
    tls = secured.context if secured else None
    refused = None
    try:
        for address, number in ((config.address, wanted), (config.address, 0), (LOOPBACK, 0)):
            try:
                exporter = Exporter(registry, number, address, tls=tls, pages=pages, ticks=ticks)
                break
            except ExporterError as error:
                refused = refused or error
        else:
            raise refused or ExporterError("no port")
    except BaseException:
        if gathering:
            gathering.socket.close()
            gathering.leave()
        raise
    node.own = exporter.metrics
    if gathering:
        exporter.also(gathering.socket)
    if refused:
        loud = "WARNING: " if port != PORT or exporter.address != config.address else ""
        notes(f"{loud}{refused}. Training goes on, and they are served at {exporter.url} instead")
        if exporter.address == config.address:
            again.begin(exporter)
    serving = Serving(exporter, gathering)
    _tell(serving, config, rank, world, folder, local, notes)
    return serving


def _add_board(
    config: Wanted,
    registry: CollectorRegistry,
    world: int,
    folder: Path,
    notes: Callable[[str], None],
    pages: dict[str, Handler],
    ticks: list[Tick],
) -> None:
    """The page for people at `/`."""
    try:
        from .board import board

        found, clocks = board(registry, run=run_label(folder), rank=0, world=world, prometheus=config.prometheus)
    except Exception as error:
        notes(f"WARNING: no board at /: {error}")
        return
    pages.update(found)
    ticks.extend(clocks)


def _tell(
    serving: Serving, config: Wanted, rank: int, world: int, folder: Path, local: int, notes: Callable[[str], None]
) -> None:
    """Write where the metrics are: `metrics.url` for people, targets for Prometheus and for `gristmill status`."""
    exporter = serving.exporter
    try:
        if rank == 0:
            serving.files.append(folder / URL_FILE)
            serving.files[0].write_text(exporter.url + "\n")
    except OSError as error:
        notes(f"WARNING: `gristmill status` is not told of {exporter.url}: {error}")
    for place in _places(config, folder):
        target = Target(place, folder, rank)
        serving.targets.append(target)
        try:
            if rank == 0:
                target.only(world)
            target.write(
                bracketed(exporter.host),
                exporter.port,
                node=socket.gethostname(),
                local_rank=local,
                https=exporter.tls is not None,
            )
        except OSError as error:
            notes(f"WARNING: Prometheus is not told of {exporter.url}: {error}")


def _forget(config: Wanted, folder: Path, notes: Callable[[str], None]) -> None:
    """Take away what an attempt that was killed left: nobody will answer there, and that is as it should be."""
    for place in _places(config, folder):
        target = Target(place, folder, 0)
        try:
            target.only(0)
            target.remove()
        except OSError as error:
            notes(f"WARNING: Prometheus still looks for an earlier attempt's metrics: {error}")
    with suppress(OSError):
        (folder / URL_FILE).unlink(missing_ok=True)


def _places(config: Wanted, folder: Path) -> list[Path]:
    """Folders of targets: the run's own, and the one that the recipe names."""
    return [folder / FOLDER, *([config.targets] if config.targets else [])]


class Again:
    """Looks whether a port that was taken has been left, and serves there as well; for a minute, then never again."""

    def __init__(self, address: str, port: int) -> None:
        self._address, self._port = address, port
        self._exporter: Exporter | None = None
        self._until = 0.0

    def begin(self, exporter: Exporter) -> None:
        self._until = time.monotonic() + RETAKE
        self._exporter = exporter

    def look(self) -> None:
        if self._exporter is None:
            return
        if time.monotonic() > self._until:
            self._exporter = None
            return
        with suppress(ExporterError):
            self._exporter.also(listen(self._address, self._port, look=False), self._exporter.tls)
            self._exporter = None
