"""One read from a server, in as many requests as it takes: what was received stays received.

After a cut the next request asks for the rest. A redirect is followed, and its target remembered until it fails. What
answers mean beyond the bytes, which errors last and whether the object is still the same, is the blob's to say.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from threading import Event
from typing import TYPE_CHECKING

from .connections import Answer
from .retry import Attempts, ChangedError, StorageError, Trouble

if TYPE_CHECKING:
    from .remote import HttpBlob

MAY_PASS = {408, 425, 429, 500, 502, 503, 504, 507, 509, 520, 521, 522, 523, 524}
_HOPS = 5  # redirects followed
_CONTENT_RANGE = re.compile(r"bytes (?:(\d+)-(\d+)|\*)/(\d+|\*)")


class Transfer:
    """Bytes [offset, offset + length) on their way: as many requests as it takes."""

    def __init__(
        self,
        blob: HttpBlob,
        offset: int,
        length: int,
        sink: Callable[[memoryview], None],
        *,
        whole: bool = False,  # an answer with the whole object will do
        probe: bool = False,  # only what the object is matters
        stop: Event | None = None,
    ) -> None:
        self.blob, self.sink, self.whole, self.probe = blob, sink, whole, probe
        self.next, self.end = offset, offset + length
        policy = blob.client.policy
        self.attempts = Attempts(policy, blob.url, allowance=length / policy.min_rate, stop=stop)

    def run(self) -> None:
        count = self.blob.client.count
        while self.next < self.end:
            begin = self.next
            try:
                try:
                    self._try()
                    continue
                except Trouble as trouble:
                    count(retry=trouble.reason)
                    self.blob._moved = None  # the first address may know a better place by now
                    self.attempts.after(trouble, progress=self.next > begin)
            except StorageError as error:
                count(failure=error.reason)
                raise

    def _try(self) -> None:
        blob = self.blob
        moved = blob._moved
        address = moved or blob._address
        for _ in range(_HOPS + 1):
            about = blob._about
            headers = {"Range": f"bytes={self.next}-{self.end - 1}", **(about.condition if about else {})}
            with blob.client.get(address, blob.headers(address, headers), self.attempts) as answer:
                if answer.status in (301, 302, 303, 307, 308):
                    address = blob.moved(answer, address)
                    answer.ok = True
                    answer.text()
                    continue
                if answer.status >= 400 and moved is not None and address == moved and answer.status not in MAY_PASS:
                    # Where it moved to may have been signed for a short time: ask the first address again.
                    answer.text()
                    blob._moved = moved = None
                    address = blob._address
                    continue
                refused = answer.status == 412
                if not refused:
                    self._take(answer)
            if refused:
                self._replaced()
            if address != blob._address:
                blob._moved = address
            return
        raise StorageError(blob.url, f"redirects more than {_HOPS} times", "name the final url itself", "redirect")

    def _take(self, answer: Answer) -> None:
        blob = self.blob
        if answer.status == 206:
            self._take_part(answer)
        elif answer.status == 200:
            self._take_whole(answer)
        elif answer.status == 416:
            found = _CONTENT_RANGE.fullmatch(answer.headers["Content-Range"] or "")
            if not found or not found[3].isdigit():
                raise StorageError(blob.url, "has no such bytes", "index the data set again", "range")
            answer.ok = True
            answer.text()
            blob.meet(answer, int(found[3]))
            self.end = self.next  # it ends before: nothing more to come
        else:
            raise blob.refusal(answer)

    def _replaced(self) -> None:
        """The server holds another object now. Find out which, and raise ChangedError."""
        before, fresh = self.blob._about, copy.copy(self.blob)
        fresh._about = fresh._expected = None
        raise ChangedError(self.blob.url, before.identity if before else "another object", fresh.identity())

    def _take_part(self, answer: Answer) -> None:
        blob = self.blob
        found = _CONTENT_RANGE.fullmatch(answer.headers["Content-Range"] or "")
        if not found or found[1] is None or not found[3].isdigit():
            raise StorageError(blob.url, "comes in parts that do not say which", "mend the server", "protocol")
        first, last, size = int(found[1]), int(found[2]), int(found[3])
        if first != self.next or last < first or last >= self.end:
            raise Trouble("protocol", f"bytes {first}-{last} instead of {self.next}-{self.end - 1}")
        blob.meet(answer, size)
        if not self.probe:
            self.end = min(self.end, size)
        self._pass_on(answer, last + 1)
        if self.probe:
            self.end = self.next

    def _take_whole(self, answer: Answer) -> None:
        blob = self.blob
        if answer.length is None:
            raise StorageError(
                blob.url, "ignores ranges and does not tell its length", "serve it by a plain file server", "ranges"
            )
        blob.meet(answer, answer.length)
        if self.probe:
            answer.ok = True
            self.end = self.next
        elif self.whole or (self.next == 0 and answer.length <= self.end):
            self.end = answer.length
            self._pass_on(answer, answer.length, skip=self.next)
        else:
            raise StorageError(
                blob.url,
                "comes whole whatever part is asked for (the server ignores Range)",
                "use a cache, which fetches it once, or a server that knows ranges",
                "ranges",
            )

    def _pass_on(self, answer: Answer, until: int, skip: int = 0) -> None:
        """Give the body to the sink, without its first `skip` bytes. Raises Trouble if it ends before `until`."""
        received, count = 0, self.blob.client.count
        try:
            for piece in answer.pieces():
                received += len(piece)
                fresh = piece[max(0, skip - (received - len(piece))) :] if received > skip else piece[:0]
                if self.next + len(fresh) > until:
                    raise Trouble("protocol", "more bytes than announced")
                if fresh:
                    self.sink(fresh)
                    self.next += len(fresh)
        finally:
            count(received=received)
        if self.next < until:
            raise Trouble("short", f"connection ended {until - self.next} bytes before the body")
        answer.ok = True
