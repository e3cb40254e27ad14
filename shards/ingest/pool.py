"""Who does the work: this process, others on this machine, or a Ray cluster. All of them do the same calls.

A pool runs functions of importable modules on small arguments; what they make goes through files, and only counts come
back. So a Ray cluster needs a folder that all its machines see, and nothing else, and the output is the same. Whoever
works holds a lock meanwhile, so that an ingest that goes on after a kill does not begin beside workers that are not gone yet.
"""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import secrets
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import connection
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from .errors import IngestError

_PATIENCE = 60.0  # seconds for workers of an earlier start to end
_STORE = 80 << 20  # bytes of shared memory for Ray on this machine: only counts go through it


class Pool(Protocol):
    """Runs calls somewhere. `wait` gives at least one of those that are done, `result` its value or its error."""

    workers: int

    def submit(self, call: Callable[..., Any], *args: Any) -> Any: ...

    def wait(self, handles: Iterable[Any]) -> list[Any]: ...

    def result(self, handle: Any) -> Any: ...

    def close(self) -> None: ...


class Inline:
    """This process, call by call."""

    workers = 1

    def submit(self, call: Callable[..., Any], *args: Any) -> Future[Any]:
        done: Future[Any] = Future()
        try:
            done.set_result(call(*args))
        except Exception as error:
            done.set_exception(error)
        return done

    def wait(self, handles: Iterable[Future[Any]]) -> list[Future[Any]]:
        return list(handles)

    def result(self, handle: Future[Any]) -> Any:
        return handle.result()

    def close(self) -> None:
        pass


class Processes:
    """Processes on this machine, started afresh: a fork would take along threads' locks and not the threads."""

    def __init__(self, workers: int, lock: Path) -> None:
        self.workers = workers
        context = multiprocessing.get_context("forkserver")
        # webdataset brings torch along: once, and not in every process.
        context.set_forkserver_preload(
            [
                "gristmill.shards.ingest.unit",
                "gristmill.shards.ingest.fetch",
                "gristmill.shards.ingest.tarring",
                "webdataset.writer",
            ]
        )
        self._pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_begin, initargs=(str(lock),))

    def submit(self, call: Callable[..., Any], *args: Any) -> Future[Any]:
        try:
            with _no_script():
                return self._pool.submit(call, *args)
        except BrokenProcessPool as error:
            raise _died() from error

    def wait(self, handles: Iterable[Future[Any]]) -> list[Future[Any]]:
        return list(wait(list(handles), return_when=FIRST_COMPLETED).done)

    def result(self, handle: Future[Any]) -> Any:
        try:
            return handle.result()
        except BrokenProcessPool as error:
            raise _died() from error

    def close(self) -> None:
        """End the processes at once; what they had not finished leaves nothing that counts."""
        processes = list((self._pool._processes or {}).values())
        self._pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()


@contextmanager
def _no_script() -> Iterator[None]:
    """Processes that start meanwhile do not run the caller's script once more, as they would to find its functions."""
    script = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = script


def _died() -> IngestError:
    return IngestError(
        "a worker process was killed (out of memory, as a rule): start the same command again, with fewer --workers; what was "
        "done is kept"
    )


def _begin(lock: str) -> None:
    """The start of a worker process: it holds the lock as long as it lives, and does not outlive who started it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the coordinator decides what a Ctrl-C means
    fcntl.flock(os.open(lock, os.O_RDWR | os.O_CREAT, 0o600), fcntl.LOCK_SH)
    parent = multiprocessing.parent_process()
    assert parent is not None
    if not parent.is_alive():  # looked at with the lock in hand: whoever goes on has not begun while it lived
        os._exit(1)

    def follow() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    import cv2

    cv2.setNumThreads(1)  # one process a core


def wait_for_earlier(lock: Path) -> None:
    """Return once no worker of an earlier start is at work any more. IngestError when they do not end."""
    until = time.monotonic() + _PATIENCE
    handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > until:
                    raise IngestError(
                        f"workers of an earlier start still write to {lock.parent}: end them, then start the same command again"
                    ) from None
                time.sleep(0.01)
    finally:
        os.close(handle)


def _held(lock: str, call: Callable[..., Any], *args: Any) -> Any:
    """A call with the lock in hand."""
    handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_SH)
        return call(*args)
    finally:
        os.close(handle)


class RayPool:
    """Tasks on a Ray cluster: the one that RAY_ADDRESS names, or one on this machine with so many workers."""

    def __init__(self, workers: int | None, lock: Path) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        if not os.environ.get("RAY_ADDRESS"):  # before it is imported: a cluster of our own takes nobody else's word,
            os.environ.setdefault("RAY_AUTH_MODE", "token")
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # and leaves none in the user's home
        try:
            import ray
        except ImportError as error:
            raise IngestError("--engine ray needs Ray: pip install 'gristmill[ray]'") from error
        self._ray, self._lock = ray, str(lock)
        self._own = not ray.is_initialized()
        self._folder: str | None = None
        if self._own:
            self._start(workers)
        self.workers = workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
        self._remote = ray.remote(num_cpus=1, max_retries=3)(_held)

    def _start(self, workers: int | None) -> None:
        address = os.environ.get("RAY_ADDRESS")
        here: dict[str, Any] = {}
        if not address:
            self._folder = tempfile.mkdtemp(prefix="ray-")  # short: sockets lie in it
            here = {"num_cpus": workers or len(os.sched_getaffinity(0)), "include_dashboard": False}
            here |= {"object_store_memory": _STORE, "_temp_dir": self._folder, "_node_ip_address": "127.0.0.1"}
        before = signal.getsignal(signal.SIGTERM)
        try:
            self._ray.init(address=address, log_to_driver=False, configure_logging=False, **here)
        except (OSError, ValueError, RuntimeError) as error:  # ConnectionError is an OSError
            self.close()
            where = f"the Ray cluster at {address} does not answer" if address else "Ray did not start on this machine"
            raise IngestError(f"{where} ({str(error)[:300]}): mend that, or go without --engine ray") from error
        finally:
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, before)  # Ray's own handler would end this process with its own code

    def submit(self, call: Callable[..., Any], *args: Any) -> Any:
        return self._remote.remote(self._lock, call, *args)

    def wait(self, handles: Iterable[Any]) -> list[Any]:
        return self._ray.wait(list(handles), num_returns=1)[0]

    def result(self, handle: Any) -> Any:
        try:
            return self._ray.get(handle)
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except self._ray.exceptions.RayError as error:
            raise IngestError(
                f"a Ray worker was lost ({type(error).__name__}): start the same command again, what was done is kept"
            ) from error

    def close(self) -> None:
        if self._own:
            self._ray.shutdown()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


def make_pool(engine: str, workers: int | None, lock: Path) -> Pool:
    """`local` or `ray`. One local worker is this process. `lock`: held by whoever works."""
    if engine == "ray":
        return RayPool(workers, lock)
    count = workers or len(os.sched_getaffinity(0))
    return Inline() if count == 1 else Processes(count, lock)
