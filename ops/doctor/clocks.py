"""Clocks: whether the kernel holds this one for set by a time server, and whether it is past what it cannot be before."""

from __future__ import annotations

import ctypes
import time
from pathlib import Path

from .finding import Asked, Finding

UNSYNC, ERROR = 0x40, 5  # STA_UNSYNC of timex.h; what adjtimex returns of a clock that nobody sets
MOST = 1.0  # seconds of error that the kernel may estimate
WHY = "signed urls and certificates go by it, and so do the wall time and goodput of a run over several hosts"


class _Timex(ctypes.Structure):
    """The beginning of struct timex of 64-bit Linux, man 2 adjtimex; times in microseconds."""

    _fields_ = (
        ("modes", ctypes.c_uint), ("offset", ctypes.c_long), ("freq", ctypes.c_long), ("maxerror", ctypes.c_long),
        ("esterror", ctypes.c_long), ("status", ctypes.c_int), ("rest", ctypes.c_char * 256),
    )  # fmt: skip


def check_clock(asked: Asked, now: float | None = None) -> Finding:
    """This host's clock by itself. now: in place of it, seconds since 1970."""
    now = time.time() if now is None else now
    shown = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(now))
    made = Path(__file__).stat().st_mtime
    remedy = "let a time server set it: `timedatectl set-ntp true`, or chrony; in a container, on its host"
    if now < made - 86400:
        found = f"{shown} is before this program was installed"
        return Finding("clock", "bad", found, WHY, remedy, {"now": now, "installed": made})
    told = _Timex()
    try:
        answer = ctypes.CDLL(None, use_errno=True).adjtimex(ctypes.byref(told))
    except AttributeError:
        answer = -1
    if answer < 0:
        return Finding("clock", "ok", f"{shown}; the kernel does not say who sets it", WHY, "", {"now": now})
    known = not (told.status & UNSYNC) and answer != ERROR
    error = told.maxerror / 1e6
    figures = {"now": now, "synchronised": known, "error_seconds": error}
    if not known:
        return Finding("clock", "warn", f"{shown}, set by no time server", WHY, remedy, figures)
    if error > MOST:
        return Finding("clock", "warn", f"{shown}, off by up to {error:.1f} s", WHY, remedy, figures)
    return Finding(
        "clock", "ok", f"{shown}, set by a time server, off by {1000 * error:.3g} ms at most", WHY, "", figures
    )
