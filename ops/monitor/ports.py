"""Ports to listen at: opened for metrics, or refused with who holds them and what to do instead.

Two runs on one machine are common, so that a taken port has to be said well: /proc names the process that listens there,
as far as this user may see. Who asks decides what follows: `gristmill ingest` stops, a training takes another port.
"""

import errno
import os
import socket
from pathlib import Path

from ...shards.errors import GristmillError

PORT = 9464  # of local rank 0, unless the recipe says otherwise; the others follow
WAITING = 64  # connections that the kernel keeps until they are taken


class ExporterError(GristmillError):
    """The metrics cannot be served there."""


class PortTakenError(ExporterError):
    """Somebody else listens there, or this user may not."""


def listen(address: str, port: int, *, look: bool = True) -> socket.socket:
    """A TCP socket that listens at `address`; port 0 takes any free one. Raises ExporterError with the remedy.

    look: find out who holds a taken port, by a walk through /proc.
    """
    remedy = (
        "choose another with metrics.port=NUMBER, any free one with metrics.port=0, or go without with metrics.port=off"
    )
    if not 0 <= port <= 65535:
        raise ExporterError(f"metrics.port={port} is no port (0 to 65535); {remedy}")
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        return socket.create_server((address, port), family=family, backlog=WAITING)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            holder = port_holder(port) if look else None
            by = f" by {holder}" if holder else ""
            raise PortTakenError(f"port {port}, where metrics would be served, is taken{by}; {remedy}") from error
        if error.errno == errno.EACCES:
            raise PortTakenError(f"port {port} may not be opened by this user; {remedy}") from error
        raise ExporterError(
            f"metrics cannot be served at {address!r} ({error.strerror or error}): metrics.address must be an address "
            "of this machine, such as 127.0.0.1"
        ) from error


def port_holder(port: int) -> str | None:
    """'process 4711 (python)' that listens on a TCP port of this machine, as far as this user may see; else None."""
    inodes = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            lines = Path(table).read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            fields = line.split()
            if len(fields) > 9 and fields[3] == "0A" and int(fields[1].rpartition(":")[2], 16) == port:
                inodes.add(f"socket:[{fields[9]}]")
    if not inodes:
        return None
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if any(os.readlink(handle) in inodes for handle in (process / "fd").iterdir()):
                name = "".join(c for c in (process / "comm").read_text().strip() if c.isprintable())
                return f"process {process.name} ({name})"
        except OSError:  # gone meanwhile, or another user's
            continue
    return None
