"""Whose a connection is: what limits count by."""

import pytest

from srpcd.monitor import connections
from srpcd.monitor.origins import Origin


@pytest.mark.parametrize("host", ["::ffff:192.0.2.7", "192.0.2.7"])
def test_a_socket_for_both_kinds_of_addresses_tells_them_apart(host: str) -> None:
    peer = connections._network_peer(Socket(), (host, 4711))  # type: ignore[arg-type]
    assert (peer.name, peer.origin) == ("192.0.2.7:4711", Origin("192.0.2.7", "192.0.2.0/24"))


class Socket:
    """One that takes any option."""

    def setsockopt(self, *_: int) -> None:
        pass
