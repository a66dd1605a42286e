"""When the time of a connection is over."""

from srpcd.config import Limits
from srpcd.gate.backlog import Backlog
from srpcd.gate.pace import Transfer
from srpcd.gate.tls import Plain
from srpcd.session.session import Session

REST_SECONDS = 1.0
"""Without traffic for so long, a connection needs no room for large transfers."""

TOO_SLOW = "a message came too slowly, or not to its end: the connection is closed"


class Deadlines:
    """The times of one open connection.

    active: when bytes were last exchanged. between: when the client was last seen not to be in the middle of a message, or
    to be in the middle of a TLS record.
    """

    __slots__ = ("_incoming", "_limits", "_moved", "_outgoing", "_stranger", "active", "between")

    def __init__(self, limits: Limits, now: float, *, records: bool) -> None:
        self.active = self.between = self._stranger = now
        self._limits = limits
        self._moved = 0
        self._incoming = Transfer(limits, records=records)
        self._outgoing = Transfer(limits, records=records)

    def opened(self, now: float) -> None:
        """Record that the handshake is over."""
        self.active = self._stranger = now

    def over(
        self, now: float, session: Session, backlog: Backlog, transport: Plain, *, reading: bool, hurried: bool
    ) -> str | None:
        """Look whether one of the times is over.

        Args:
            now: the loop's time, in seconds.
            session, backlog, transport: of the connection.
            reading: whether the client is being read from.
            hurried: whether it has to be faster than usual.

        Returns: None if not. Else why, as a sentence for the client; empty if none is to be sent.
        """
        limits = self._limits
        if session.known or session.serving:
            self._stranger = now
        if self._moved != transport.moved:  # some of a portion that TLS was given as one: it is not stuck
            self._moved = transport.moved
            backlog.since = now
        if not (reading and session.partial):
            self.between = now  # between two messages, or stopped by this end; `Connection` knows a third reason
        if now - self.active > REST_SECONDS:
            transport.rest()
        number = session.partials if session.partial else 0
        slow = self._incoming.late(now, number, -session.missing, session.pinned, hurried=hurried, halted=not reading)
        if slow or now - max(self.between, self.active) > limits.stall:
            return TOO_SLOW
        number = backlog.number if backlog.size else 0
        slow = self._outgoing.late(now, number, backlog.taken + transport.moved, backlog.held, hurried=hurried)
        quiet = not session.busy and not session.serving
        over = (
            slow
            or (backlog.size > 0 and now - backlog.since > limits.stall)
            or now - self._stranger > limits.authentication_timeout
            or (quiet and now - self.active > limits.idle_timeout)
        )
        return "" if over else None
