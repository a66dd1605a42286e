"""Bytes that wait for a slow reader."""

from collections import deque
from collections.abc import Callable

from srpcd.wire.limits import READ_SIZE


class Backlog:
    """Bytes in order. size: how many. since: when the reader last took some, by the loop's clock.

    number: of the time in which there are bytes without a break. taken: bytes that the reader has ever taken.
    """

    __slots__ = ("_chunks", "_gone", "number", "since", "size", "taken")

    def __init__(self) -> None:
        self._chunks: deque[bytes | memoryview] = deque()
        self._gone = 0  # bytes of the first chunk that were taken: they stay in memory with its rest
        self.number = 0
        self.size = 0
        self.since = 0.0
        self.taken = 0

    @property
    def held(self) -> int:
        """Bytes of memory that the chunks take."""
        return self.size + self._gone

    def add(self, data: bytes | memoryview, now: float) -> None:
        """Keep bytes. now: the loop's clock."""
        if not self.size:
            self.since = now
            self.number += 1
        self._chunks.append(data)
        self.size += len(data)

    def push(self, write: Callable[[bytes | memoryview], int], now: float) -> None:
        """Write as much as goes. write: returns how many bytes it took, 0 where it would block."""
        while self.size:
            chunk = self._next()
            taken = write(chunk)
            if not taken:
                return
            self.since = now
            self.size -= taken
            self.taken += taken
            if taken == len(chunk):
                self._gone = 0
                self._chunks.popleft()
            else:
                self._gone += taken
                self._chunks[0] = memoryview(chunk)[taken:]

    def clear(self) -> None:
        """Forget all of it."""
        self._chunks.clear()
        self.size = self._gone = 0

    def _next(self) -> bytes | memoryview:
        """The first chunk; small ones are joined to a good size.

        A TLS write that could not be finished has to be repeated with the same beginning: joining keeps to that.
        """
        chunks = self._chunks
        if len(chunks) > 1 and len(chunks[0]) + len(chunks[1]) <= READ_SIZE:
            parts, size = [], 0
            while chunks and size + len(chunks[0]) <= READ_SIZE:
                size += len(chunks[0])
                parts.append(chunks.popleft())
            chunks.appendleft(b"".join(parts))
            self._gone = 0
        return chunks[0]
