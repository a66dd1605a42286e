"""Which connections count as one origin, and which origins share a prefix."""

import pytest

from srpcd.monitor.origins import LOOPBACK, Origin, of_host, of_uid


@pytest.mark.parametrize(
    ("host", "address", "prefix"),
    [
        ("192.0.2.7", "192.0.2.7", "192.0.2.0/24"),
        ("::ffff:192.0.2.7", "192.0.2.7", "192.0.2.0/24"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64", "2001:db8:1::/48"),
        ("fe80::1", "fe80::/64", "fe80::/48"),
        ("127.0.0.1", LOOPBACK, LOOPBACK),
        ("127.255.3.4", LOOPBACK, LOOPBACK),
        ("::ffff:127.1.2.3", LOOPBACK, LOOPBACK),
        ("::1", LOOPBACK, LOOPBACK),
        ("128.0.0.1", "128.0.0.1", "128.0.0.0/24"),
    ],
)
def test_an_address_counts_by_itself_and_by_its_prefix(host: str, address: str, prefix: str) -> None:
    assert of_host(host) == Origin(address, prefix)


def test_a_name_is_no_address() -> None:
    with pytest.raises(ValueError, match="does not appear to be an IPv4 or IPv6 address"):
        of_host("localhost")


def test_a_limit_counts_each_name_once() -> None:
    assert of_host("192.0.2.7").groups == ("192.0.2.7", "192.0.2.0/24")
    assert of_host("::1").groups == (LOOPBACK,)
    assert of_uid(1000).groups == ("uid:1000",)


def test_a_range_of_uids_is_a_prefix() -> None:
    assert of_uid(99_999).prefix == "uid:99999"
    assert of_uid(100_000).prefix == of_uid(165_535).prefix == "uids:0"
    assert of_uid(165_536).prefix == "uids:1"
