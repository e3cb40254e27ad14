"""A pseudo terminal with what a person sees on it: `gristmill ...` runs there in a fork, and keys can be pressed."""

import fcntl
import os
import pty
import re
import select
import struct
import termios
import time
from collections.abc import Callable
from pathlib import Path

from ..command import COMMAND, MINUTES
from ..workers import Workers

CONTROL = re.compile(r"\x1b\[([?\d;]*)([A-Za-z])|\r|\n|[^\x1b\r\n]")


class Screen:
    """The text that a terminal shows, with all that scrolled away above. Knows what rich sends, and refuses the rest."""

    def __init__(self) -> None:
        self.rows: list[list[str]] = [[]]
        self.row = self.column = 0

    def feed(self, text: str) -> None:
        for found in CONTROL.finditer(text):
            what, count = found[2], int(found[1] or 1) if found[2] in ("A", "B", "C", "D") else 0
            if found[0] == "\r":
                self.column = 0
            elif found[0] == "\n":
                self.row += 1
                self.rows += [[]] * (self.row == len(self.rows))
            elif what is None:
                line = self.rows[self.row]
                line += " " * (self.column + 1 - len(line))
                line[self.column] = found[0]
                self.column += 1
            elif what == "A":
                self.row = max(0, self.row - count)
            elif what == "K":
                self.rows[self.row] = self.rows[self.row][: self.column] if found[1] != "2" else []
            else:
                assert what in "mhl", found[0]

    def __str__(self) -> str:
        return "\n".join("".join(row).rstrip() for row in self.rows)


class Terminal:
    """`gristmill arguments` on a terminal of so many columns, standing still before the step that begins at `hold`."""

    def __init__(self, workers: Workers, folder: Path, columns: int, *arguments: object, hold: int | None = None):
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self._there, self._go = folder / "there", folder / "go"
        held = None if hold is None else [hold, str(self._there), str(self._go), MINUTES]
        self.process = workers.start(FORK, arguments=list(map(str, arguments)), tty=os.ttyname(slave), hold=held)
        self._slave, self.screen, self._bytes = slave, Screen(), b""

    def until(self, happened: Callable[[], bool]) -> str:
        """Read on until it happened; what is on the screen then."""
        until = time.monotonic() + MINUTES
        while not happened():
            assert time.monotonic() < until, str(self.screen)
            if not self.read():
                assert self.process.poll() is None or happened(), (str(self.screen), self.process.output())
        return str(self.screen)

    def read(self, patience: float = 0.02) -> bool:
        """What has come, or comes in so many seconds; False if nothing did."""
        if not select.select([self._master], [], [], patience)[0]:
            return False
        self._bytes += os.read(self._master, 1 << 16)
        text = self._bytes.decode(errors="ignore")
        self._bytes = self._bytes[len(text.encode()) :]
        self.screen.feed(text)
        return True

    def sees(self, *words: str) -> str:
        """Once all words are there and the screen is at rest: a read may end inside a frame, above the rows that follow."""
        return self.until(lambda: not self.read(0.1) and all(word in str(self.screen) for word in words))

    def held(self) -> str:
        return self.until(self._there.exists)

    def go(self) -> None:
        self._go.touch()

    def press(self, keys: bytes) -> None:
        os.write(self._master, keys)

    def hang_up(self) -> None:
        os.close(self._slave)
        os.close(self._master)

    def finish(self) -> int:
        """Its exit code, with all that it said on the screen."""
        self.until(lambda: self.process.poll() is not None)
        while self.read(0.2):  # the kernel may still be passing on what was written last
            pass
        self.hang_up()
        return self.process.join()


FORK = """
import fcntl, termios
os.setsid()
terminal = os.open(tty, os.O_RDWR)
fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)
for number in range(3):
    os.dup2(terminal, number)
os.close(terminal)
signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup: a terminal that goes away does not end it
os.environ.update(TERM="xterm-256color")
for name in ("COLUMNS", "LINES", "NO_COLOR"):
    os.environ.pop(name, None)
"""
FORK += COMMAND
