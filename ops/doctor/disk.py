"""Places that a run writes to: room, speed, and whether files behave as checkpoints and caches need them to.

A file is written, synced, renamed, read back (past the page cache, where the system lets us) and locked by two processes.
Where a place does not exist yet, the folder that it would be made in is looked at; nothing is left there.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import secrets
import shutil
import time
from contextlib import suppress
from pathlib import Path

from .finding import Asked, Finding, said, size

MOST = 64 << 20  # bytes that are written
PATIENCE = 3.0  # seconds for that
CHUNK = 4 << 20
LITTLE, LEAST = 20e9, 2e9  # bytes free: a few checkpoints of a ViT-B, one of a small ViT
SLOW = 30e6  # bytes/s below which a checkpoint of a ViT-B takes a minute
INODES = 10_000
MEMORY = ("tmpfs", "ramfs")
PREFIX = ".gristmill-doctor-"


def check_out(asked: Asked) -> Finding:
    """--out: where checkpoints go."""
    if not asked.out:
        why = "a disk that is full, slow or forgetful costs checkpoints"
        return Finding("out", "skipped", "not asked", why, "name the run folder with --out DIR")
    return look("out", Path(asked.out))


def check_cache(asked: Asked) -> Finding:
    """--cache: where shards behind urls are kept."""
    if not asked.cache:
        why = "shards behind urls are read once an epoch, or kept here"
        return Finding("cache", "skipped", "not asked", why, "name the folder of stream.cache with --cache DIR")
    return look("cache", Path(asked.cache))


def look(name: str, place: Path) -> Finding:
    """All about a folder that is, or will be. May hang where its server does."""
    why = "checkpoints go there" if name == "out" else "every byte of the data goes through it"
    folder = existing(place)
    if not folder.is_dir():
        return Finding(name, "bad", f"{folder} is no folder", why, f"name a folder with --{name}")
    kind, readonly = file_system(folder)
    disk = os.statvfs(folder)
    free, total = disk.f_bavail * disk.f_frsize, disk.f_blocks * disk.f_frsize
    inodes = disk.f_favail if disk.f_files else None
    figures: dict[str, object] = {
        "folder": str(folder), "type": kind, "free_bytes": free, "size_bytes": total, "free_inodes": inodes
    }  # fmt: skip
    found = f"{kind}, {size(free)} free of {size(total)}"
    other = f"name another place with --{name}"
    _sweep(folder)
    work = folder / f"{PREFIX}{secrets.token_hex(6)}"
    try:
        work.mkdir(mode=0o700)
    except OSError as error:
        mounted = "; it is mounted read-only" if readonly else ""
        remedy = f"make {folder} writable for this user, or {other}"
        return Finding(name, "bad", f"{folder} cannot be written ({said(error)}{mounted})", why, remedy, figures)
    try:
        rates, slow = _exercise(work, free)
        figures |= rates
        found += f"; writes {size(rates['write_bytes_per_s'])}/s and reads {size(rates['read_bytes_per_s'])}/s, "
        found += f"a sync takes {1000 * rates['sync_seconds']:.3g} ms"
        faults = [*slow, *_locks(work)]
    except OSError as error:
        full = (
            "make room there" if "space" in said(error).lower() or "quota" in said(error).lower() else f"mend {folder}"
        )
        return Finding(name, "bad", f"{found}; writing failed: {said(error)}", why, f"{full}, or {other}", figures)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    if faults:
        remedy = f"use another file system (NFS 4, or 3 with its lock daemon and without `nolock`), or {other}"
        return Finding(name, "bad", f"{found}; {'; '.join(faults)}", why, remedy, figures)
    troubles, remedies = [], []
    if free < LITTLE and total:
        troubles.append("little room: checkpoint.keep of them are there at once, and one more while it is written")
        remedies.append("make room, or lower checkpoint.keep")
    if inodes is not None and inodes < INODES:
        troubles.append(f"only {inodes:,} files more may be made there")
        remedies.append("remove small files")
    if kind in MEMORY:
        troubles.append("this is memory, and gone with the machine")
        remedies.append(other)
    if kind == "overlay" and name == "out":
        troubles.append("this lies inside a container, and is gone with it")
        remedies.append("mount a volume there (-v), or " + other)
    if rates["write_bytes_per_s"] < SLOW:
        troubles.append(
            f"slow: a checkpoint of a ViT-B (1.5 GB) takes {1.5e9 / rates['write_bytes_per_s'] / 60:.3g} min"
        )
        remedies.append("raise checkpoint.every, or " + other)
    if troubles:
        state = "bad" if free < LEAST and name == "out" else "warn"
        return Finding(name, state, f"{found}. {'; '.join(troubles)}", why, "; ".join(remedies), figures)
    return Finding(name, "ok", found, why, "", figures)


def _sweep(folder: Path) -> None:
    """Remove what a check that was killed left here, an hour ago or longer."""
    for left in folder.glob(f"{PREFIX}*"):
        with suppress(OSError):
            if time.time() - left.lstat().st_mtime > 3600:
                shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()


def existing(place: Path) -> Path:
    """The place, or the first folder above it that is there."""
    for folder in (place.absolute(), *place.absolute().parents):
        try:
            folder.stat()
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError:  # found out, and told, by whoever uses it
            pass
        return folder
    return Path("/")


def file_system(folder: Path) -> tuple[str, bool]:
    """(type, mounted read-only) of the file system that holds a folder, by the kernel's table of mounts."""
    real, best, found = os.path.realpath(folder), -1, ("unknown", False)
    try:
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return found
    for line in lines:
        before, _, after = line.partition(" - ")
        fields, about = before.split(), after.split()
        point = fields[4].encode().decode("unicode_escape")  # blanks are \040
        inside = real == point or real.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= best:  # of two at one place, the later hides the earlier
            best, found = len(point), (about[0], "ro" in fields[5].split(",") or "ro" in about[-1].split(","))
    return found


def _exercise(work: Path, free: int) -> tuple[dict[str, float], list[str]]:
    """Rates, and what did not come back as it was written."""
    faults: list[str] = []
    block = os.urandom(CHUNK)  # what compresses well would flatter some file systems
    most = max(CHUNK, min(MOST, free // 4 // CHUNK * CHUNK)) if free > 2 * CHUNK else 1 << 16
    block = block[:most]
    draft, final = work / "draft", work / "final"
    begin, written = time.perf_counter(), 0
    with draft.open("wb", buffering=0) as file:
        while written < most and time.perf_counter() - begin < PATIENCE:
            if file.write(block) != len(block):
                raise OSError(28, "No space left on device")
            written += len(block)
        os.fsync(file.fileno())
        writing = time.perf_counter() - begin
        with suppress(OSError):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    os.rename(draft, final)
    begin, read = time.perf_counter(), 0
    with final.open("rb", buffering=0) as file:
        while chunk := file.read(len(block)):
            if chunk != block[: len(chunk)]:
                faults.append("what was written comes back changed")
                break
            read += len(chunk)
            if time.perf_counter() - begin > PATIENCE:
                break
        reading = time.perf_counter() - begin
        try:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
                if view[:64] != block[:64]:
                    faults.append("what was written comes back changed when it is mapped")
        except OSError as error:
            faults.append(f"files cannot be mapped into memory ({said(error)}), which is how checkpoints are read")
    syncs = []
    with (work / "small").open("wb", buffering=0) as file:
        for _ in range(3):
            begin = time.perf_counter()
            file.write(b"-")
            os.fsync(file.fileno())
            syncs.append(time.perf_counter() - begin)
    rates = {
        "write_bytes_per_s": written / max(writing, 1e-9), "read_bytes_per_s": read / max(reading, 1e-9),
        "sync_seconds": sorted(syncs)[1], "bytes": float(written),
    }  # fmt: skip
    return rates, faults


def _locks(work: Path) -> list[str]:
    """What is wrong with flock, as two processes see it: caches, indices and run folders are shared by it."""
    path = work / "lock"
    try:
        with path.open("w") as mine:
            fcntl.flock(mine, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Another open file has another lock, also in one process; so no fork is needed among threads.
            with path.open("w") as other:
                try:
                    fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    return []
                return ["locks do not lock: two may write one run folder"]
    except OSError as error:
        return [f"files cannot be locked ({said(error)})"]
