"""Many addresses for clients, in the network namespace of a run.

The daemon counts all of 127.0.0.0/8 as one origin. Here 10.0.0.0/8 is on the loopback interface too: a route of type
local makes each address in it one of this machine's, which a client can bind.
"""

import itertools
import os
import socket
import struct
from collections.abc import Iterator

RTM_NEWROUTE, NLM_F_REQUEST_ACK_CREATE, RTA_DST, RTA_OIF = 24, 0x405, 1, 4
RT_TABLE_LOCAL, RTPROT_BOOT, RT_SCOPE_HOST, RTN_LOCAL = 255, 3, 254, 2

_series = itertools.count(1)


def make_addresses_local() -> None:
    """Let the loopback interface of this network namespace have all of 10.0.0.0/8. Raises OSError."""
    route = struct.pack("8BI", socket.AF_INET, 8, 0, 0, RT_TABLE_LOCAL, RTPROT_BOOT, RT_SCOPE_HOST, RTN_LOCAL, 0)
    route += struct.pack("HH4sHHI", 8, RTA_DST, socket.inet_aton("10.0.0.0"), 8, RTA_OIF, socket.if_nametoindex("lo"))
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as sock:
        sock.send(struct.pack("IHHII", 16 + len(route), RTM_NEWROUTE, NLM_F_REQUEST_ACK_CREATE, 1, 0) + route)
        (error,) = struct.unpack_from("i", sock.recv(4096), 16)
    if error:
        raise OSError(-error, f"a route for 10.0.0.0/8: {os.strerror(-error)}")


def addresses() -> Iterator[str]:
    """Source addresses that no other series has, each in a prefix of its own: what counts by origin does not mix."""
    number = next(_series)
    for count in range(255 * 254):
        yield f"10.{number}.{count % 255}.{count // 255 + 1}"
