"""Where a connection comes from, as limits count it.

A client that has a whole prefix of addresses must not count as many clients, so an origin has two names: the address and
its prefix. A limit looks at both. What every user of this host can use as a source address at will is one origin.

This module does no I/O.
"""

import ipaddress
from typing import NamedTuple

IPV4_PREFIX, IPV6_ADDRESS, IPV6_PREFIX = 24, 64, 48
"""Bits that make the prefix of an IPv4 address, what counts as one IPv6 address, and the prefix of that.

A network gets a /64 for each link, so one host has 2^64 addresses. A site gets a /48 at most (RFC 6177). A /24 is the
longest IPv4 prefix that is routed by itself."""

SUBUID_MIN, SUBUID_COUNT = 100_000, 65_536
"""Where useradd(8) begins to give out ranges of uids, and their size (SUB_UID_MIN, SUB_UID_COUNT in login.defs(5))."""

LOOPBACK = "loopback"
"""The one name of 127.0.0.0/8 and ::1: a local process chooses its address there among 16 million."""


class Origin(NamedTuple):
    """Where a connection comes from.

    address: an IPv4 address, an IPv6 /64, "loopback", or "uid:N" for the local socket. prefix: the IPv4 /24 or the
    IPv6 /48 around it, or the range of uids; the same as `address` where that has no neighbours.
    """

    address: str
    prefix: str

    @property
    def groups(self) -> tuple[str, ...]:
        """The names that a limit counts this origin under, the narrowest first, none twice."""
        return (self.address,) if self.address == self.prefix else (self.address, self.prefix)


def of_host(host: str) -> Origin:
    """The origin of a numeric IPv4 or IPv6 address. An IPv4-mapped IPv6 address is the IPv4 address in it.

    Args:
        host: without a scope ("%eth0").

    Raises:
        ValueError: `host` is not an address.
    """
    address = plain(host)
    if address.is_loopback:
        return Origin(LOOPBACK, LOOPBACK)
    if address.version == 4:
        return Origin(str(address), str(_network(address, IPV4_PREFIX)))
    return Origin(str(_network(address, IPV6_ADDRESS)), str(_network(address, IPV6_PREFIX)))


def of_uid(uid: int) -> Origin:
    """The origin of a local user's processes.

    A user can have a range of further uids for its user namespaces (subuid(5)): such a range is a prefix.
    """
    name = f"uid:{uid}"
    return Origin(name, name if uid < SUBUID_MIN else f"uids:{(uid - SUBUID_MIN) // SUBUID_COUNT}")


def plain(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """The address that a text names; of an IPv4-mapped one the IPv4 address. Raises ValueError."""
    address = ipaddress.ip_address(host)
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address


def _network(address: ipaddress.IPv4Address | ipaddress.IPv6Address, bits: int) -> object:
    return ipaddress.ip_network((address, bits), strict=False)
