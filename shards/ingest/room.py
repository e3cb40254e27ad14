"""How many bytes a window of downloads may hold, so that memory stays flat whatever servers send.

The oldest input of the window always gets its bytes, for nothing leaves the window before it does. All others share the
rest. One that does not fit is told so, drops what it has, gives its turn back and waits: a download that waited with
its turn in hand could hold up the very one that it is waiting for, in this process or between two. So that this is
rare, downloads begin only while an eighth of the room is free; those that turn out larger than was guessed find it
there.
"""

from __future__ import annotations

import asyncio
import heapq

_LEAST = 1 << 16  # bytes set aside for a download whose size is not known yet


class NoRoom(Exception):
    """There is no room for a download of `size` bytes now."""

    def __init__(self, size: int) -> None:
        super().__init__(f"no room for {size} bytes")
        self.size = size


class Room:
    """`most` bytes for inputs in the order of their places. Belongs to one event loop; `taken` may be read by others."""

    def __init__(self, most: int) -> None:
        self.most, self._start = most, most - most // 8
        self.taken = 0
        self.head = 0
        self._mean = 0.0
        self._line: list[tuple[int, asyncio.Future[None], int]] = []

    @property
    def guess(self) -> int:
        """Bytes that a download may need: the mean of the last ones."""
        return max(_LEAST, int(self._mean))

    def learn(self, size: int) -> None:
        self._mean += (size - self._mean) / 32

    def fits(self, place: int, more: int, *, begun: bool) -> bool:
        """Whether a download may have `more` bytes, for one that has `begun` up to the last of the room."""
        return place <= self.head or self.taken + more <= (self.most if begun else self._start)

    async def wait(self, place: int, size: int) -> None:
        """Wait until a download of `size` bytes may begin, and take them."""
        if not self.fits(place, size, begun=False):
            free = asyncio.get_running_loop().create_future()
            heapq.heappush(self._line, (place, free, size))
            try:
                await free  # taken by whoever set it
            except asyncio.CancelledError:
                if free.done() and not free.cancelled():
                    self.give(size)
                raise
        else:
            self.taken += size

    def give(self, size: int) -> None:
        self.taken -= size
        self._serve()

    def advance(self, head: int, size: int) -> None:
        """`head` is the oldest now: the one before it left the window, and its `size` bytes with it."""
        self.head = head
        self.give(size)

    def _serve(self) -> None:
        while self._line:
            place, free, size = self._line[0]
            if not free.done():
                if not self.fits(place, size, begun=False):
                    return
                self.taken += size
                free.set_result(None)
            heapq.heappop(self._line)


class Hold:
    """What one download has of the room."""

    def __init__(self, room: Room, place: int) -> None:
        self._room, self.place, self.size = room, place, 0

    async def wait(self, size: int) -> None:
        """Begin again with `size` bytes, however long that takes. Only without a turn in hand."""
        self.settle(0)
        await self._room.wait(self.place, size)
        self.size = size

    def begin(self) -> None:
        """Have as many bytes as a download may need, now. Raises NoRoom."""
        self._have(self._room.guess, begun=False)

    def need(self, size: int) -> None:
        """Have at least `size` bytes now, for a download that has begun. Raises NoRoom."""
        self._have(size, begun=True)

    def _have(self, size: int, *, begun: bool) -> None:
        if size > self.size:
            if not self._room.fits(self.place, size - self.size, begun=begun):
                raise NoRoom(size)
            self._room.taken += size - self.size
            self.size = size

    def settle(self, size: int) -> None:
        """Keep `size` bytes of it, and give the rest back."""
        given, self.size = self.size - size, size
        self._room.give(given)
