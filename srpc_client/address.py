"""Where a server is: `host`, `host:port`, `srpc://host:port`, `unix:/path/of/socket`, or nothing for this host's own."""

import getpass
import os
import pwd
import re
from errno import EHOSTUNREACH, ENOENT
from typing import NamedTuple, TypeAlias

from srpc_client.errors import SrpcError, Unreachable

PORT = 7443
CONNECT_TIMEOUT = 30.0
"""Seconds for connection and TLS handshake, where nothing else was said."""

LONGEST_WAIT = 7 * 24 * 3600.0
"""Seconds that the kernel is asked to wait at once: poll(2) counts milliseconds in 31 bits, and a timeout may be inf."""

SYSTEM_SOCKET = "/run/srpc/srpc.sock"


class Local(NamedTuple):
    """A Unix socket."""

    path: str

    def __str__(self) -> str:
        return f"unix:{self.path}"


class Remote(NamedTuple):
    """A host that is talked to by TLS over TCP."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


Address: TypeAlias = Local | Remote

_REMOTE = re.compile(r"(?:\[(?P<six>[0-9A-Fa-f:.%\w]+)\]|(?P<host>[^:/\[\]\s@?#]+))(?::(?P<port>\d{1,5}))?/?", re.ASCII)


def parse(address: "str | Address | None" = None) -> Address:
    """The address that a text means; the default local one for None and the empty text.

    Raises ValueError with what is wrong with it; Unreachable (ENOENT) where there is no default.
    """
    if isinstance(address, Local | Remote):
        return address
    if not address:
        return default()
    if address.startswith("unix:"):
        path = address.removeprefix("unix:").removeprefix("//")
        if not path.startswith("/"):
            raise ValueError(f"{address!r}: the path of a Unix socket begins with a slash")
        return Local(path)
    match = _REMOTE.fullmatch(address.removeprefix("srpc://"))
    if match is None:
        hint = " (an IPv6 address stands in brackets)" if address.count(":") > 2 else ""
        raise ValueError(f"{address!r} is no address: host, host:port, srpc://host:port or unix:/path{hint}")
    port = int(match["port"] or PORT)
    if not 0 < port < 65536:
        raise ValueError(f"{address!r}: a port is between 1 and 65535")
    return Remote(match["six"] or match["host"], port)


def default() -> Address:
    """$SRPC_ADDRESS; else the system's daemon; else the user's own, where its socket is there.

    Raises Unreachable (ENOENT) where none is.
    """
    named = os.environ.get("SRPC_ADDRESS")
    if named:
        return parse(named)
    if os.path.exists(SYSTEM_SOCKET):
        return Local(SYSTEM_SOCKET)
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    own = os.path.join(runtime, "srpc", "srpc.sock")
    if runtime.startswith("/") and os.path.exists(own):
        return Local(own)
    raise Unreachable(ENOENT, f"no sRPC daemon runs here ({SYSTEM_SOCKET} is not there): start srpcd, or name an address")


def refuse_proof(where: Local, pins: object, ca: object) -> None:
    """Raise ValueError where `pins` or `ca` is given: nobody would look at it, and another server may have been meant."""
    if pins is not None or ca is not None:
        raise ValueError(
            f"pins= and ca= are for a server on another host: {where} is a local socket, whose server has no key; that it "
            f"runs as root or as you is what is checked there"
        )


def own_name(where: Address) -> str:
    """The name of your own account: on a local socket the one that the kernel says, since a wrong $LOGNAME would be refused.

    Raises SrpcError (ENOENT) for a uid without an account, where the environment has no name either.
    """
    uid = os.geteuid()
    try:
        said = getpass.getuser()
        if isinstance(where, Remote):
            return said
    except (KeyError, OSError):
        raise SrpcError(
            ENOENT, f"uid {uid} has no account on this host: say as whom to log in (user=, or srpc --user)"
        ) from None
    try:
        known = pwd.getpwuid(uid).pw_name
    except KeyError:
        return said  # in a container that the host's socket is mounted in: the daemon may know the account
    try:
        return said if pwd.getpwnam(said).pw_uid == uid else known  # a uid may have several names
    except KeyError:
        return known


def from_os_error(fault: OSError, address: Address) -> Unreachable:
    """Why a connection could not be made, as ours."""
    # The resolver has numbers of its own, below 0.
    errno = fault.errno if fault.errno and fault.errno > 0 else EHOSTUNREACH
    return Unreachable(errno, f"can't connect to {address}: {fault.strerror or fault}")
