"""The sockets that the daemon listens on, from one of three hands.

What a socket unit passes takes the place of `listen.tcp` or `listen.local`. Else what the manager kept in its store over a
restart is taken back, where it is still configured. The rest is bound here, and put into that store. So whoever connects
while the service is restarted waits in the queue of a socket that is never closed.
"""

import contextlib
import os
import socket
import stat
from typing import NamedTuple

from srpcd.config import Listen, tcp_address
from srpcd.monitor.faults import StartFault
from srpcd.monitor.systemd import Manager
from srpcd.passing import refuse_descriptors

_KEPT = "own-"
"""How the names in the manager's store begin. A socket unit's are the unit's name, unless it says otherwise."""

_QUEUE = 4096
"""Connections that wait to be accepted: the kernel takes net.core.somaxconn, by default the same, if that is less."""


Named = list[tuple[str, socket.socket]]


class Listeners(NamedTuple):
    """What there is to listen on. remove: the Unix socket's file, if it is ours to remove at the end, else empty.

    warning: for the log, or empty.
    """

    tcp: list[socket.socket]
    local: list[socket.socket]
    remove: str
    warning: str


def listen(wanted: Listen, path: str, manager: Manager, personal: bool) -> Listeners:
    """Listen. path: of the Unix socket. Raises StartFault, and then whatever was passed stays with the manager."""
    tcp, local, kept = _sort(manager.passed)
    for sockets, configured, key in ((tcp, wanted.tcp, "tcp"), (local, wanted.local, "local")):
        if sockets and not configured:
            raise StartFault(
                f"listen.{key}: it is switched off, but systemd's socket unit passes {address_of(sockets[0])}: "
                f"take that away there (systemctl edit srpcd.socket)"
            )
    warning = ""
    if tcp and wanted.tcp != Listen().tcp:
        warning = f"listen.tcp is not used: systemd's socket unit says {', '.join(map(address_of, tcp))}"
    for sock in local:
        refuse_descriptors(sock)
    remove = path if wanted.local and not local and not manager.there else ""
    if not tcp:
        tcp = [_taken(kept, address, manager) or _bind(address, manager, personal) for address in wanted.tcp]
    if not local and wanted.local:
        local = [_taken(kept, path, manager) or _bind(path, manager, personal)]
    for name, sock in kept:  # what nobody wants any more
        manager.forget(name)
        sock.close()
    return Listeners(tcp, local, remove, warning)


def address_of(sock: socket.socket) -> str:
    """The address of a listening socket as people write it."""
    name = sock.getsockname()
    if sock.family == socket.AF_UNIX:
        return os.fsdecode(name)
    return f"[{name[0]}]:{name[1]}" if sock.family == socket.AF_INET6 else f"{name[0]}:{name[1]}"


def _sort(passed: Named) -> tuple[list[socket.socket], list[socket.socket], Named]:
    """What a socket unit passed, of the network and local, and what the store kept. Raises StartFault for anything else."""
    tcp: list[socket.socket] = []
    local: list[socket.socket] = []
    kept: Named = []
    for name, sock in passed:
        listening = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) and sock.type == socket.SOCK_STREAM
        if not listening or sock.family not in (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6):
            raise StartFault(f"what systemd passes as {name!r} is no listening stream socket (ListenStream=, Accept=no)")
        if name.startswith(_KEPT):
            kept.append((name, sock))
        else:
            (local if sock.family == socket.AF_UNIX else tcp).append(sock)
    return tcp, local, kept


def _name(address: str) -> str:
    return _KEPT + address.replace(":", "_")  # FDNAME= must not contain one


def _taken(kept: Named, address: str, manager: Manager) -> socket.socket | None:
    """The socket that the manager kept for an address, taken out of `kept`; None if there is none of use."""
    name = _name(address)
    found = next((each for each in kept if each[0] == name), None)
    if found is None:
        return None
    kept.remove(found)
    if address[0] == "/" and not _is_socket(address):  # its file is gone, so nobody can reach it
        manager.forget(name)
        found[1].close()
        return None
    return found[1]


def _is_socket(path: str) -> bool:
    try:
        return stat.S_ISSOCK(os.lstat(path).st_mode)
    except FileNotFoundError:
        return False


def _bind(address: str, manager: Manager, personal: bool) -> socket.socket:
    try:
        sock = _bind_local(address, personal) if address[0] == "/" else _bind_tcp(*tcp_address(address))
    except OSError as fault:
        raise StartFault(f"listen.{'local' if address[0] == '/' else 'tcp'}: {address}: {fault.strerror}") from None
    manager.store(_name(address), sock)
    return sock


def _bind_tcp(host: str, port: int) -> socket.socket:
    """A listening socket; of IPv6, for that alone. Raises OSError."""
    sock = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=_QUEUE)
    sock.setblocking(False)
    return sock


def _bind_local(path: str, personal: bool) -> socket.socket:
    """The listening Unix socket: everybody may connect, and the kernel says who it is. Raises OSError."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    refuse_descriptors(sock)
    sock.bind(path)
    os.chmod(path, 0o600 if personal else 0o666)
    sock.listen(_QUEUE)
    return sock
