"""Connections that have come in.

The monitor accepts, so who is at the other end of a connection is its own knowledge. It keeps a duplicate of each
socket, from which it never reads, only to see when the connection is over: a hang-up of the peer, or the gate's shutdown.
"""

import array
import asyncio
import contextlib
import select
import socket
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from srpcd import passing
from srpcd.monitor.admission import Admission
from srpcd.monitor.launch import Identity
from srpcd.monitor.origins import Origin, of_host, of_uid, plain

if TYPE_CHECKING:
    from srpcd.monitor.authentication import Afid
    from srpcd.monitor.children import Gate, Session, Worker
    from srpcd.monitor.lines import Announcement, Endpoint

SO_PEERSEC, SO_PEERGROUPS = 31, 59
_ACCEPTS = 32
"""Connections taken in one round, so that a flood of them leaves the monitor time for everything else."""
NO_ROOM = "there are as many connections as there may be, of this user, from this address or in all: try again later"
"""What is said to a connection that would be one authenticated connection too many."""


class Peer(NamedTuple):
    """Who is at the other end. name: for people. host: for PAM, empty on the local socket. origin: what limits count by.
    identity: of the process, as the kernel says; None over the network."""

    name: str
    host: str
    origin: Origin
    identity: Identity | None


class Connection:
    """One connection. number: of its gate. duplicate: the monitor's own descriptor of the socket.

    known: a user has authenticated on it, or serves. pending: what is being decided for it.
    """

    def __init__(
        self, gate: "Gate", number: int, peer: Peer, duplicate: socket.socket, admission: "Admission[Connection]"
    ) -> None:
        self.gate = gate
        self.number = number
        self.peer, self.host, self.origin, self.identity = peer
        self.log_origin = self.origin.address  # whom lines about it in the log count for
        self.duplicate = duplicate
        self.admission = admission
        self.known = False
        self.over = False
        self.authenticating: Afid | None = None
        self.failures = 0
        self.pending = 0
        self.afids: dict[int, Afid] = {}
        self.sessions: dict[int, Session] = {}
        self.announcements: dict[int, tuple[Endpoint[Worker], Announcement]] = {}
        self.tasks: set[asyncio.Task[None]] = set()
        self.doubted: dict[Endpoint[Worker], None] = {}  # in this order, whether it may still serve these

    def becomes_known(self, user: str) -> bool:
        """Count it as a user's from now on. Returns False where that would be one connection too many."""
        self.known = self.admission.authenticated(self, user)
        return self.known


class HangUps:
    """Tells which connections are over, without ever reading from one."""

    def __init__(self, over: Callable[[Connection], None]) -> None:
        self._epoll = select.epoll()
        self._connections: dict[int, Connection] = {}
        self._over = over
        asyncio.get_running_loop().add_reader(self._epoll.fileno(), self._look)

    def add(self, connection: Connection) -> None:
        """Watch a connection."""
        fd = connection.duplicate.fileno()
        self._connections[fd] = connection
        self._epoll.register(fd, select.EPOLLRDHUP)  # and what is always told: EPOLLHUP, EPOLLERR; no EPOLLIN

    def remove(self, connection: Connection) -> None:
        """Watch it no longer, and close the duplicate, after making sure that the peer and the gate see the end too."""
        fd = connection.duplicate.fileno()
        del self._connections[fd]
        self._epoll.unregister(fd)
        with contextlib.suppress(OSError):
            connection.duplicate.shutdown(socket.SHUT_RDWR)
        passing.close(connection.duplicate.detach())

    def _look(self) -> None:
        for fd, _events in self._epoll.poll(0):
            connection = self._connections.get(fd)
            if connection is not None:
                self._over(connection)

    def close(self) -> None:
        """Stop watching."""
        asyncio.get_running_loop().remove_reader(self._epoll.fileno())
        self._epoll.close()


def accept(listener: socket.socket, room: int, labelled: bool) -> list[tuple[socket.socket, Peer]]:
    """Up to `room` new connections. labelled: SELinux is on. Raises OSError when out of descriptors."""
    accepted: list[tuple[socket.socket, Peer]] = []
    while len(accepted) < min(room, _ACCEPTS):
        try:
            sock, address = listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            break
        except OSError:  # out of descriptors: what was accepted before counts
            if accepted:
                break
            raise
        try:
            local = sock.family == socket.AF_UNIX
            peer = _local_peer(sock, labelled) if local else _network_peer(sock, address)
            accepted.append((sock, peer))
        except OSError:  # gone again already, or more groups than can be asked for
            sock.close()
    return accepted


def _network_peer(sock: socket.socket, address: tuple[str, int]) -> Peer:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    host = plain(address[0].partition("%")[0])  # a socket for both families has IPv4-mapped addresses
    name = f"{host}:{address[1]}" if host.version == 4 else f"[{host}]:{address[1]}"
    return Peer(name, str(host), of_host(str(host)), None)


def _local_peer(sock: socket.socket, labelled: bool) -> Peer:
    """By the kernel: uid, gid, the groups and the SELinux context that the process had when it connected (unix(7))."""
    _pid, uid, gid = struct.unpack("iII", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    groups = array.array("I")
    groups.frombytes(sock.getsockopt(socket.SOL_SOCKET, SO_PEERGROUPS, 1024))
    context = sock.getsockopt(socket.SOL_SOCKET, SO_PEERSEC, 1024).rstrip(b"\0").decode(errors="replace") if labelled else ""
    return Peer(f"uid:{uid}", "", of_uid(uid), Identity(uid, gid, tuple(sorted(set(groups) | {gid})), context))
