"""Moves bytes between a `ClientCore` and a `Link` while somebody waits: one write, one poll, one read for a lone call."""

import os
import time
from _thread import allocate_lock
from collections.abc import Callable
from select import POLLIN, POLLOUT, poll
from typing import Any
from weakref import WeakSet

from srpc_client.address import LONGEST_WAIT
from srpc_client.core import ClientCore
from srpc_client.errors import CallTimeout, ConnectionLost, SrpcError
from srpc_client.link import Link

_INTERRUPTED = "interrupted while bytes were moved, nobody knows how many: what came next would be taken for their rest"
"""Why a KeyboardInterrupt there ends the connection. While somebody waits (for a slow peer, and so mostly) it does not."""


HIGH_WATER = 1024 * 1024
"""Bytes that may wait to be sent before another request waits too. Without it each call that is given up, to a server that
reads nothing, would leave its payload here."""

_FORKED = "the connection was made before a fork, and belongs to the other process: dial again in this one"

_pumps: "WeakSet[Pump]" = WeakSet()
"""All that there are: a fork has to find them."""


class Slot:
    """Where one request's answer is put."""

    __slots__ = ("done", "error", "reply")

    def __init__(self) -> None:
        self.done = False
        self.reply: Any = None
        self.error: SrpcError | None = None

    def taken(self) -> Any:
        """The reply. Raises what the request was answered with."""
        if self.error is not None:
            raise self.error
        return self.reply


class Pump:
    """One connection's pump. core: to be asked directly, by whoever has claimed the pump.

    busy_poll: seconds for which it asks again and again whether an answer is there, before it sleeps.
    """

    def __init__(self, link: Link, busy_poll: float = 0.0) -> None:
        self.core: ClientCore[Slot] = ClientCore()
        self.fd = link.fd
        """What to wait on, for somebody who does not wait in `until_done`."""
        self.closed = False
        """Whether the connection is over."""
        self.on_over: Callable[[], object] | None = None
        """Called when the connection has ended, before its descriptor is closed."""
        self._link = link
        self._unsent: bytes | memoryview = b""
        self._poll = poll()
        self._poll.register(link.fd, POLLIN)
        self._writing = False  # it is polled for writing too
        self._mine = allocate_lock()
        self._busy_poll = busy_poll
        self._quick = True  # the last answer came within that time
        _pumps.add(self)

    def claim(self) -> None:
        """Be the only one to use it, until `release`. Raises RuntimeError where somebody else is at it."""
        if not self._mine.acquire(False):
            raise RuntimeError("the connection is in use by another thread: each thread needs one of its own")

    def release(self) -> None:
        """Others may use it."""
        self._mine.release()

    def call(self, fid: int, payload: bytes, metadata: bytes, deadline: float | None) -> tuple[bytes, bytes]:
        """Call the endpoint behind a fid: as `transact`, for what is done most often. Returns (payload, metadata)."""
        self.claim()
        try:
            if self.backlog > HIGH_WATER:
                self._make_room(deadline)
            slot = Slot()
            self._see_through(slot, self.core.call(fid, payload, metadata, slot), 0, deadline)
        finally:
            self._mine.release()
        if slot.error is not None:
            raise slot.error
        reply: tuple[bytes, bytes] = slot.reply
        return reply

    def transact(self, kind: int, body: bytes, fid: int, deadline: float | None) -> Any:
        """Make a request and pump until its answer is there; give it up where that does not happen.

        kind, body: as of `ClientCore.request`. fid: that it makes, or 0. deadline: by time.monotonic.
        Returns the reply. Raises CallError, CallTimeout, ConnectionLost, RuntimeError (`claim`).
        """
        self.claim()
        try:
            if self.backlog > HIGH_WATER:
                self._make_room(deadline)
            slot = Slot()
            self._see_through(slot, self.core.request(kind, body, slot), fid, deadline)
        finally:
            self._mine.release()
        return slot.taken()

    def _see_through(self, slot: Slot, seq: int, fid: int, deadline: float | None) -> None:
        try:
            self.until_done(slot, deadline)
        except BaseException:  # the time is over, or a KeyboardInterrupt
            if slot.done and slot.error is None and fid:
                self.core.clunk(fid)
            self.core.cancel(seq, fid)
            self.send()
            raise

    def _make_room(self, deadline: float | None) -> None:
        """Wait until the server has taken what earlier requests have left. Raises CallTimeout."""
        self.send()
        while self.backlog > HIGH_WATER and not self.closed:
            self._wait(deadline)

    def until_done(self, slot: Slot, deadline: float | None) -> None:
        """Send and receive until the slot is filled. Raises CallTimeout."""
        self.send()
        awake_until = self._poll_busily(slot, deadline) if self._busy_poll else 0.0
        while not slot.done:
            self._wait(deadline)
        if awake_until:
            self._quick = time.monotonic() < awake_until

    def _wait(self, deadline: float | None) -> None:
        """Move what can be moved once, as soon as it can. Raises CallTimeout."""
        if deadline is None:
            events = self._poll.poll()
        else:
            left = deadline - time.monotonic()
            if left <= 0:
                raise CallTimeout
            events = self._poll.poll(min(left, LONGEST_WAIT) * 1000 + 1)
        self._see_to(events)

    def _poll_busily(self, slot: Slot, deadline: float | None) -> float:
        """Wait without sleeping. Returns until when that was to be, at most: whoever takes longer is slept for next time,
        since to be awake for a part of the time would only cost, and keep a processor from those who work on the answer.
        """
        end = time.monotonic() + self._busy_poll
        until = end if deadline is None else min(end, deadline)
        while self._quick and not slot.done and time.monotonic() < until:
            self._see_to(self._poll.poll(0))
        return end

    def _see_to(self, events: list[tuple[int, int]]) -> None:
        for _fd, event in events:
            if event & ~POLLOUT:
                self.receive()
            if event & POLLOUT:
                self.send()

    @property
    def backlog(self) -> int:
        """Bytes that wait to be sent."""
        return len(self._unsent) + self.core.waiting

    def send(self) -> None:
        """Send as much as goes out now."""
        try:
            data = self._unsent or self.core.take()
            if not data and self._link.owes:
                self._link.flush()
            while data:
                sent = self._link.send(data)
                if sent < len(data):
                    data = memoryview(data)[sent:]
                    break
                data = self.core.take() if self.core.waiting else b""
            self._unsent = data
            self._watch()
        except ConnectionLost as fault:
            self.lose(fault)
        except BaseException:
            self.lose(ConnectionLost(message=_INTERRUPTED))
            raise

    def _watch(self) -> None:
        """Poll for writing too, if there is something to write."""
        writing = len(self._unsent) > 0 or self._link.owes
        if writing is not self._writing:
            self._writing = writing
            self._poll.modify(self._link.fd, POLLIN | POLLOUT if writing else POLLIN)

    def receive(self) -> None:
        """Take what has come in, and hand it to its slots."""
        core, count = self.core, 0
        try:
            if core.large:
                with core.room() as room:
                    count, data = self._link.receive_into(room)
                core.filled(count)
            else:
                data = self._link.receive()
            if self._link.owes:
                self._watch()
            if data is None:
                return
            if not data and not count:
                self.lose(None)
                return
            for slot, reply, error in core.receive(data):
                slot.reply = reply
                slot.error = error
                slot.done = True
        except ConnectionLost as fault:
            self.lose(fault)
            return
        except BaseException:
            self.lose(ConnectionLost(message=_INTERRUPTED))
            raise
        if core.failure is not None:
            self.lose(None)
        elif core.waiting:
            self.send()

    def lose(self, failure: SrpcError | None) -> None:
        """End the connection; each outstanding request gets its one error."""
        self._give_up(failure)
        if not self.closed:
            self.closed = True
            self._poll.unregister(self._link.fd)
            if self.on_over is not None:
                self.on_over()
            self._link.close()

    def _give_up(self, failure: SrpcError | None) -> None:
        self._unsent = b""
        for slot in self.core.lose(failure):
            slot.error = self.core.lost()
            slot.done = True

    def disown(self) -> None:
        """After a fork, in the child: let go of what stays the parent's.

        Nothing is sent, no goodbye either, and `on_over` is not called: an epoll that its caller has is the parent's too.
        """
        if not self.closed:
            self.closed = True
            self._mine = allocate_lock()  # another thread of the parent's may have held it
            self._give_up(ConnectionLost(message=_FORKED))
            os.close(self._link.detach())

    def say_goodbye(self) -> None:
        """Send what still waits, as far as that needs no waiting (clunks, mostly), and end the connection."""
        if not self.closed:
            self.send()
            self.lose(ConnectionLost(message="the connection was closed on this side"))


def _disown_all() -> None:
    for pump in list(_pumps):
        pump.disown()


# Two processes on one connection would take each other's answers, and break TLS; a child's goodbye would be for both.
os.register_at_fork(after_in_child=_disown_all)
