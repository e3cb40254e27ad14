"""An event loop on a thread of its own, for callers that are plain functions."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from typing import Any, TypeVar

T = TypeVar("T")


class LoopThread:
    """Runs coroutines for other threads, from when it is made until `close`.

    What a callback raises goes to `odd` by the name of its type: asyncio would log it with all that it holds, urls too.
    """

    def __init__(self, name: str, odd: Callable[[str], None]) -> None:
        self._loop = asyncio.new_event_loop()
        self._loop.set_debug(False)  # whatever the environment says, for the same reason
        self._loop.set_exception_handler(lambda _, context: odd(type(context.get("exception")).__name__))
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()

    def start(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Begin it there; its future here."""
        try:
            return asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        except RuntimeError:
            coroutine.close()
            raise

    def finish(self, coroutine: Coroutine[Any, Any, object]) -> None:
        """Run it there, and wait for it; on its own thread (a generator may be collected there) it is begun alone."""
        with suppress(RuntimeError, CancelledError):  # closed meanwhile, which is the end of all that runs
            future = self.start(coroutine)
            if threading.current_thread() is not self._thread:
                future.result()

    def call(self, function: Callable[..., object], *arguments: object) -> None:
        """Call a function there, soon. Nothing is done once the loop is closed."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *arguments)

    def close(self, last: Coroutine[Any, Any, object]) -> None:
        """Call off what runs, run `last`, and end the thread."""
        self.start(self._end(last)).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _end(self, last: Coroutine[Any, Any, object]) -> None:
        running = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        await last
        await asyncio.sleep(0)  # transports close in the next round
        await asyncio.get_running_loop().shutdown_asyncgens()
        await asyncio.get_running_loop().shutdown_default_executor()
