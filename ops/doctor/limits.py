"""What the system lets this process have: memory, cores, open files, shared memory, and whether text is UTF-8.

A container's limits are not in /proc/meminfo or the number of cores: they are the smallest on the way from this process's
control group to the root (https://docs.kernel.org/admin-guide/cgroup-v2.html, and cgroup-v1/memory.html).
"""

from __future__ import annotations

import locale
import os
import resource
import sys
from pathlib import Path

from .finding import Asked, Finding, size

LEAST = 2 << 30  # bytes of memory a process; importing torch and DALI takes half of one
FILES = 1024  # open files below which shards are closed and opened all the time
SHARED = 1 << 30  # bytes of /dev/shm that NVIDIA gives its containers for NCCL (--shm-size=1g)


def check_memory(asked: Asked, proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> Finding:
    """Memory of the machine, and what of it the control group lets us have."""
    told = dict(line.split(":", 1) for line in (proc / "meminfo").read_text().splitlines() if ":" in line)
    total, free = (int(told[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    limit, used = memory_limit(proc, groups)
    capped = limit is not None and limit < total
    room = min(free, limit - used) if capped and limit is not None else free
    each = room / asked.local_world
    found = f"{size(room)} available of {size(total)}"
    if capped and limit is not None:
        found += f"; this container or job may have {size(limit)}, and has {size(used)}"
    if asked.local_world > 1:
        found += f"; {size(each)} for each of {asked.local_world} processes"
    figures = {"total_bytes": total, "available_bytes": free, "limit_bytes": limit if capped else None}
    why = "a process that wants more is killed without a word, usually at the first checkpoint or probe"
    if each < LEAST:
        where = "give the container or job more (--memory, --mem)" if capped and room < free else "end other programs"
        remedy = f"{where}, or start fewer processes a machine: {size(LEAST)} each is the least"
        return Finding("memory", "bad" if each < LEAST / 2 else "warn", found, why, remedy, figures)
    return Finding("memory", "ok", found, why, "", figures)


def check_cpus(asked: Asked, proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> Finding:
    """Cores by affinity and by quota, against the threads that would be started."""
    cores, machine = len(os.sched_getaffinity(0)), os.cpu_count() or 1
    quota = cpu_quota(proc, groups)
    text = os.environ.get("OMP_NUM_THREADS", "")
    threads = int(text) if text.isdecimal() and int(text) else max(1, cores // asked.local_world)
    have = min(cores, quota or cores)
    load = os.getloadavg()[0]
    found = f"{cores} of {machine} cores" + (f", a quota of {quota:.3g}" if quota else "")
    found += (
        f", {asked.local_world} process{'es' * (asked.local_world > 1)} with {threads} thread{'s' * (threads > 1)} each"
    )
    found += f" (OMP_NUM_THREADS={text})" if text else ""
    figures = {"cores": cores, "quota": quota, "threads": threads, "processes": asked.local_world, "load": load}
    why = "threads without a core of their own wait for each other in every operation"
    fits = max(1, int(have / asked.local_world))
    if have < asked.local_world:
        remedy = (
            f"start {max(1, int(have))} processes on this host, or ask for more cores (--cpus-per-task, resources.cpu)"
        )
        return Finding("cpus", "warn", found, why, remedy, figures)
    if threads > fits:
        remedy = f"add threads={fits} to the command line of `gristmill train`, and set OMP_NUM_THREADS={fits}"
        return Finding("cpus", "warn", found, why, remedy, figures)
    if load > 2 * machine:
        remedy = "others compute here (`top` shows who): wait, or measure nothing by this machine now"
        return Finding("cpus", "warn", f"{found}; a load of {load:.0f} without us", why, remedy, figures)
    return Finding("cpus", "ok", found, why, "", figures)


def check_files(asked: Asked) -> Finding:
    """Open files, sockets included."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    shown = ["no limit" if value == resource.RLIM_INFINITY else f"{value:,}" for value in (soft, hard)]
    found = f"{shown[0]} at once (ulimit -n; up to {shown[1]} without root)"
    why = "a reader keeps a quarter of them as open shards; downloads and ranks take sockets"
    figures = {"soft": soft, "hard": hard}
    if 0 <= soft < FILES:
        more = (
            "`ulimit -n 4096`"
            if hard < 0 or hard >= 4096
            else "nofile in /etc/security/limits.conf, --ulimit nofile=65536"
        )
        remedy = f"raise it before you start: {more}"
        return Finding("open files", "bad" if soft < 256 else "warn", found, why, remedy, figures)
    return Finding("open files", "ok", found, why, "", figures)


def check_shared(asked: Asked, folder: Path = Path("/dev/shm"), gpus: int | None = None) -> Finding:
    """/dev/shm, through which NCCL, Ray and semaphores go. gpus: in place of those whose device files are there."""
    why = "NCCL between GPUs of a host and `ingest --engine ray` go through it; training on CPUs needs none"
    larger = "start the container with --shm-size=1g or --ipc=host (Kubernetes: an emptyDir with medium: Memory there)"
    cards = len(list(Path("/dev").glob("nvidia[0-9]*"))) if gpus is None else gpus
    try:
        disk = os.statvfs(folder)
    except OSError:
        state = "bad" if cards > 1 else "warn"
        return Finding("shared memory", state, f"there is no {folder}", why, larger, {"size_bytes": 0})
    total, free = disk.f_blocks * disk.f_frsize, disk.f_bavail * disk.f_frsize
    found = f"{folder}: {size(free)} free of {size(total)}"
    figures = {"size_bytes": total, "free_bytes": free, "needed_bytes": SHARED if cards > 1 else 0}
    if not os.access(folder, os.W_OK):
        return Finding("shared memory", "bad", f"{found}; it cannot be written", why, larger, figures)
    if cards > 1 and free < SHARED:
        remedy = larger if total < SHARED else f"remove what ended processes left in {folder}"
        return Finding("shared memory", "bad" if free < SHARED // 16 else "warn", found, why, remedy, figures)
    return Finding("shared memory", "ok", found, why, "", figures)


def check_text(asked: Asked) -> Finding:
    """Encodings of file names and of text."""
    names, text, out = sys.getfilesystemencoding(), locale.getpreferredencoding(False), sys.stdout.encoding or "none"
    found = f"file names {names}, files {text}, output {out}"
    why = "names and captions of images are UTF-8; elsewhere they become question marks or errors"
    wrong = [code for code in (names, text) if code.lower().replace("-", "") != "utf8"]
    figures = {"names": names, "text": text, "output": out}
    if wrong:
        return Finding("text", "warn", found, why, "set PYTHONUTF8=1, or LANG=C.UTF-8", figures)
    return Finding("text", "ok", found, why, "", figures)


def memory_limit(proc: Path, groups: Path) -> tuple[int | None, int]:
    """Bytes that our control group may have, the smallest on the way to the root (None: no limit), and has there."""
    best: tuple[int | None, int] = (None, 0)
    for limit, used in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
        for folder in _ways(proc, groups, "memory"):
            value = _number(folder / limit)
            if value is not None and value < 1 << 60 and (best[0] is None or value < best[0]):
                best = value, _number(folder / used) or 0
    return best


def cpu_quota(proc: Path, groups: Path) -> float | None:
    """Cores' worth of time that our control group may have; None: no limit."""
    found: list[float] = []
    for folder in _ways(proc, groups, "cpu"):
        try:
            quota, period = (folder / "cpu.max").read_text().split()
            if quota != "max":
                found.append(int(quota) / int(period))
        except (OSError, ValueError):
            pass
        value, period = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
        if value and period and value > 0:
            found.append(value / period)
    return min(found, default=None)


def _ways(proc: Path, groups: Path, controller: str) -> list[Path]:
    """Folders of our control groups for a controller, innermost first, of either version; a container sees its own as /."""
    found: list[Path] = []
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return found
    for line in lines:
        number, names, path = line.split(":", 2)
        roots = [groups, groups / "unified"] if number == "0" else []
        if controller in names.split(","):
            roots = [groups / names, groups / controller]
        for root in roots:
            inner = root / path.strip("/")
            found += [folder for folder in (inner, *inner.parents) if folder == root or root in folder.parents]
    return [folder for folder in dict.fromkeys(found) if folder.is_dir()]


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
