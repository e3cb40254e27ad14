"""One page for all ranks of a machine, made when it is asked for: `/node` of any rank's exporter.

An agent beside the ranks would be one more process to start, place and lose, on every scheduler. Instead each rank also
listens at a Unix socket in a folder that only its user may enter, and whichever rank is asked for `/node` asks the others
there at that moment. The socket needs no port, no list of ports, and no certificate (over loopback, mTLS would want
clients' certificates on every node); the kernel tells at once that a rank has died. If the rank whose port Prometheus
knows dies, `up` of that target says so, and the ranks beside it answer for the same node; in training, the death of one
rank ends all of them anyway.

A rank that does not answer in time is `gristmill_node_rank_up{rank="3"} 0`, and its metrics are left out. One that never came
up has no socket: `gristmill_node_ranks` says how many there should be. Ranks are known by name of their socket.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import os
import re
import socket
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .exporter import FRESH, TEXT, Page
from .ports import WAITING, ExporterError

PEER_DEADLINE = 2.0  # seconds for a rank to answer another of its machine
PAGE_BYTES = 4 << 20  # of one rank
_OF_TARGETS = re.compile(rb'(^|,)(job|run|rank|node|instance)="')
SWEPT = 64  # folders of other runs that are looked at, at most
LONGEST = 100  # bytes of a Unix socket's path; Linux takes 107


class NodePage:
    """Answers /node. own: this rank's page, to be set before the first request; ranks: how many this machine should have.

    peers: the folder of `Gathering`, or None where this rank is alone or could not join it.
    """

    def __init__(self, rank: int, ranks: int, peers: Path | None) -> None:
        self.own: Callable[[], bytes] = bytes
        self._rank, self._ranks, self._peers = rank, ranks, peers
        self._made: tuple[float, bytes] = (-1e9, b"")
        self._making: asyncio.Task[bytes] | None = None

    async def __call__(self, query: dict[str, str]) -> Page:
        """(content type, page). Whoever asks while a page is being made gets that one."""
        made_at, page = self._made
        if time.monotonic() - made_at >= FRESH:
            if self._making is None or self._making.done():
                self._making = asyncio.create_task(self._gather())
            page = await asyncio.shield(self._making)
        return TEXT, page

    async def _gather(self) -> bytes:
        sockets = {int(path.stem): path for path in _sockets(self._peers) if path.stem.isdecimal()}
        sockets.pop(self._rank, None)
        answers = await asyncio.gather(*map(_ask, sockets.values()))
        pages: dict[int, bytes | None] = {self._rank: self.own(), **dict(zip(sockets, answers, strict=True))}
        page = merged(pages, self._ranks)
        self._made = time.monotonic(), page
        return page


class Gathering:
    """A place where the ranks of one run on this machine find each other. Raises ExporterError where it cannot be had."""

    def __init__(self, run: Path, rank: int) -> None:
        mark = hashlib.sha256(str(run.resolve()).encode(errors="surrogateescape")).hexdigest()[:12]
        mine = f"gristmill-{os.getuid()}-"
        self.folder = Path(tempfile.gettempdir(), mine + mark)
        self._path = self.folder / f"{rank}.sock"
        if len(os.fsencode(self._path)) > LONGEST:
            raise ExporterError(
                f"the ranks of this node cannot meet: {self.folder} is too long a path; set TMPDIR=/tmp"
            )
        try:
            self.socket = self._join()
        except OSError as error:
            raise ExporterError(f"the ranks of this node cannot meet in {self.folder}: {error.strerror}") from error
        self._inode = self._path.stat().st_ino
        for other in sorted(self.folder.parent.glob(mine + "*"))[:SWEPT]:
            if other != self.folder:
                _sweep(other)

    def leave(self) -> None:
        """Take the socket's name away, unless another attempt has put its own there; the last one, the folder as well."""
        with suppress(OSError, ExporterError), _alone(self.folder):
            with suppress(FileNotFoundError):
                if self._path.stat().st_ino == self._inode:
                    self._path.unlink()
            self.folder.rmdir()  # refused while others are in it

    def _join(self) -> socket.socket:
        with _alone(self.folder):
            for path in _sockets(self.folder):
                if _is_dead(path):  # a killed attempt left it
                    path.unlink()
            listening = socket.socket(socket.AF_UNIX)
            try:
                self._path.unlink(missing_ok=True)
                listening.bind(str(self._path))
                listening.listen(WAITING)
            except BaseException:
                listening.close()
                raise
            return listening


def merged(pages: dict[int, bytes | None], ranks: int) -> bytes:
    """The pages of several ranks as one: every sample gets the label `rank`, every family stays together.

    pages: by rank, None for one that did not answer; in Prometheus' text format. Names that two ranks describe differently
    are described as the first does. Their own labels that are named like a target's become `exported_...`, as they would if
    Prometheus asked each rank: it is to honour the labels of this page.
    """
    heads: dict[str, list[bytes]] = {}
    samples: dict[str, list[bytes]] = {}
    for rank, page in sorted(pages.items()):
        family, mark = "", b'rank="%d"' % rank
        for line in (page or b"").split(b"\n"):  # a carriage return may be part of a label
            if found := re.match(rb"# (?:HELP|TYPE) (\S+)", line):
                family = found[1].decode()
                known = heads.setdefault(family, [])
                if not any(other[:7] == line[:7] for other in known):
                    known.append(line)
            elif line and not line.startswith(b"#"):
                samples.setdefault(family, []).append(_labelled(line, mark))
    own = [
        b"# HELP gristmill_node_ranks Ranks that this machine should have.",
        b"# TYPE gristmill_node_ranks gauge",
        b"gristmill_node_ranks %d.0" % ranks,
        b"# HELP gristmill_node_rank_up Whether a rank of this machine answered the one that was asked.",
        b"# TYPE gristmill_node_rank_up gauge",
        *(b'gristmill_node_rank_up{rank="%d"} %d.0' % (rank, page is not None) for rank, page in sorted(pages.items())),
    ]
    lines = [line for family, found in samples.items() for line in (*heads.get(family, []), *found)]
    return b"\n".join([*own, *lines, b""])


def _labelled(line: bytes, mark: bytes) -> bytes:
    name, brace, rest = line.partition(b"{")
    if brace and b" " not in name:
        # Within a value every quote is escaped, so that this is never part of one.
        return name + b"{" + mark + b"," + _OF_TARGETS.sub(rb'\1exported_\2="', rest)
    name, _, value = line.partition(b" ")
    return name + b"{" + mark + b"} " + value


def _sockets(folder: Path | None) -> list[Path]:
    with suppress(OSError):
        return sorted(folder.glob("*.sock")) if folder else []
    return []


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold a private folder, made if need be, against the other ranks: joining and leaving are many steps."""
    until = time.monotonic() + PEER_DEADLINE
    while (handle := _hold(folder)) is None:
        if time.monotonic() > until:
            raise ExporterError(f"the ranks of this node cannot meet in {folder}: another process holds it")
        time.sleep(0.01)
    try:
        yield
    finally:
        os.close(handle)


def _hold(folder: Path) -> int | None:
    """A handle of the folder that has its lock; None where it is not to be had at the moment."""
    folder.mkdir(mode=0o700, exist_ok=True)
    state = folder.lstat()
    if not stat.S_ISDIR(state.st_mode) or state.st_uid != os.getuid() or state.st_mode & 0o077:
        raise ExporterError(f"{folder} is not this user's alone (drwx------); remove it, or set TMPDIR")
    handle = None
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(handle).st_ino == folder.stat().st_ino:
            return handle
    except (BlockingIOError, FileNotFoundError):  # FileNotFoundError: the last one left, and took the folder away
        pass
    if handle is not None:
        os.close(handle)
    return None


def _sweep(folder: Path) -> None:
    """Take away what a killed run left: a folder of this user in which nobody listens."""
    with suppress(OSError, ExporterError):
        if (handle := _hold(folder)) is None:
            return
        try:
            found = _sockets(folder)
            if all(map(_is_dead, found)):
                for path in found:
                    path.unlink()
                folder.rmdir()
        finally:
            os.close(handle)


def _is_dead(path: Path) -> bool:
    """Whether nobody listens at a socket any more."""
    with socket.socket(socket.AF_UNIX) as client:
        client.setblocking(False)
        try:
            client.connect(str(path))
        except ConnectionRefusedError:
            return True
        except OSError:
            return False  # too busy to answer, but alive
    return False


async def _ask(path: Path) -> bytes | None:
    """The metrics of the rank that listens at `path`; None if it does not give them in time."""
    writer = None
    try:
        async with asyncio.timeout(PEER_DEADLINE):
            reader, writer = await asyncio.open_unix_connection(path, limit=PAGE_BYTES)
            writer.write(b"GET /metrics HTTP/1.1\r\n\r\n")
            head = await reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"\r\nContent-Length: (\d{1,9})\r\n", head)
            if not head.startswith(b"HTTP/1.1 200 ") or not length or int(length[1]) > PAGE_BYTES:
                return None
            return await reader.readexactly(int(length[1]))
    except (OSError, EOFError, ValueError, asyncio.LimitOverrunError):  # TimeoutError is an OSError
        return None
    finally:
        if writer:
            writer.transport.abort()
