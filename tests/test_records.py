"""Large data through TLS: what comes out is what went in, whatever the socket takes at a time, and small things between."""

import random
import socket
from collections.abc import Callable, Iterator

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from OpenSSL import SSL

from srpcd import records
from srpcd.records import RECORD, Records
from srpcd.wire.limits import LARGE, PORTION
from tests.gate.world import certificate

SIZES = [LARGE, LARGE + 1, PORTION - 1, PORTION, PORTION + 1, PORTION + LARGE - 1, PORTION + LARGE, 4 * PORTION + 5]


def pattern(size: int) -> bytes:
    return (bytes(range(251)) * (size // 251 + 1))[:size]


class End:
    """One end of a TLS connection: `tls` as it is, and `records`."""

    def __init__(self, sock: socket.socket, context: SSL.Context, accepts: bool) -> None:
        self.sock = sock
        self.tls = SSL.Connection(context, sock)
        if accepts:
            self.tls.set_accept_state()
        else:
            self.tls.set_connect_state()
        self.records = Records(self.tls, sock)

    def send(self, data: bytes | memoryview) -> int:
        """As the links do."""
        try:
            if len(data) >= LARGE or self.records.active:
                return self.records.send(data)
            return self.tls.send(data)
        except SSL.WantWriteError:
            return 0

    def receive(self, wanted: int) -> bytes:
        """As the links do: straight to its place what is large."""
        if wanted < LARGE and not self.records.active:
            try:
                return self.tls.recv(RECORD)
            except SSL.WantReadError:
                return b""
        room = bytearray(wanted)
        count, rest = self.records.receive(memoryview(room))
        return bytes(room[:count]) + (rest or b"")


Pair = tuple[End, End]
MakePair = Callable[..., Pair]


@pytest.fixture
def pair() -> Iterator[MakePair]:
    """Makes two ends that have shaken hands. size: of the sockets' buffers."""
    opened: list[socket.socket] = []

    def make(size: int = 0) -> Pair:
        key, pem = certificate()
        server = SSL.Context(SSL.TLS_SERVER_METHOD)
        server.use_certificate(x509.load_pem_x509_certificate(pem))
        server.use_privatekey(load_pem_private_key(key, None))  # type: ignore[arg-type]
        sockets = socket.socketpair()
        for sock in sockets:
            opened.append(sock)
            sock.setblocking(False)
            if size:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, size)
        ends = End(sockets[0], server, True), End(sockets[1], SSL.Context(SSL.TLS_CLIENT_METHOD), False)
        waiting = set(ends)
        while waiting:
            for end in ends:
                try:
                    end.tls.do_handshake()
                    waiting.discard(end)
                except SSL.WantReadError:
                    pass
        return ends

    yield make
    for sock in opened:
        sock.close()


def carry(sender: End, receiver: End, messages: list[bytes]) -> bytes:
    """Send all of it, each message anew where it was not taken to its end, and receive it meanwhile."""
    got, total = bytearray(), sum(map(len, messages))
    queue: list[bytes | memoryview] = list(messages)
    while len(got) < total:
        while queue:
            sent = sender.send(queue[0])
            if sent < len(queue[0]):
                queue[0] = memoryview(queue[0])[sent:]
                break
            queue.pop(0)
        got += receiver.receive(total - len(got))
    assert not queue
    return bytes(got)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("buffer", [0, 8192])
def test_what_comes_out_is_what_went_in(pair: MakePair, size: int, buffer: int) -> None:
    one, other = pair(buffer)
    data = pattern(size)
    for _ in range(2):
        assert carry(one, other, [data]) == data
        assert carry(other, one, [data[::-1]]) == data[::-1]
        assert not one.records.waits
        assert not other.records.waits


@pytest.mark.parametrize("seed", range(8))
def test_large_and_small_may_come_in_any_order(pair: MakePair, seed: int) -> None:
    chance = random.Random(seed)
    one, other = pair(chance.choice([0, 4096, 100_000]))
    for _ in range(4):
        sizes = [chance.choice([1, 20, 5000, RECORD, LARGE - 1, LARGE, 3 * PORTION + 7]) for _ in range(6)]
        messages = [chance.randbytes(size) for size in sizes]
        assert carry(one, other, messages) == b"".join(messages)
        assert carry(other, one, messages) == b"".join(messages)
        if chance.random() < 0.5:
            one.records.rest()
            other.records.rest()


def test_what_comes_behind_something_large_is_given_out_with_it(pair: MakePair) -> None:
    one, other = pair()
    data = pattern(LARGE)
    assert one.send(data) == len(data)
    assert one.send(b"behind") == 6
    room = bytearray(len(data))
    count, rest = other.records.receive(memoryview(room))
    assert (count, rest) == (len(data), b"behind")
    assert room == data
    assert other.records.receive(memoryview(room)) == (0, None)


def test_both_directions_go_on_while_one_waits(pair: MakePair) -> None:
    one, other = pair(16384)
    data = pattern(2 * PORTION)
    sent = one.send(data)
    assert sent < len(data)
    assert one.records.waits
    assert not one.records.owes
    one.records.rest()  # not now: it would be lost
    assert carry(other, one, [b"small"]) == b"small"
    assert carry(other, one, [data]) == data
    got = bytearray()
    while len(got) < len(data):
        if sent < len(data):
            sent += one.send(memoryview(data)[sent:])
        got += other.receive(len(data) - len(got))
    assert got == data


def test_what_went_out_while_something_was_awaited_is_not_sent_again_after_a_rest(pair: MakePair) -> None:
    one, other = pair(16384)
    data = pattern(LARGE - 1)  # once it rests, this is sent by the socket
    assert one.records.send(data) == 0
    got = bytearray()
    while one.records.waits:
        got += other.receive(LARGE)
        assert one.receive(LARGE) == b""
    one.records.rest()
    assert one.send(data) == len(data)
    for _ in range(3):
        got += other.receive(LARGE)
    assert got == data


def test_who_sends_little_again_and_again_or_rests_needs_no_memory_any_more(pair: MakePair) -> None:
    def active() -> list[bool]:
        return [end.records.active for end in (one, other)]

    one, other = pair()
    data = pattern(LARGE)
    assert active() == [False, False]
    assert carry(one, other, [data]) == data
    assert active() == [True, True]
    for number in range(10):
        assert carry(one, other, [b"%d" % number]) == b"%d" % number
    assert active() == [False, True]
    other.records.rest()
    assert active() == [False, False]
    assert carry(one, other, [b"still there"]) == b"still there"
    assert carry(other, one, [data]) == data


@pytest.mark.parametrize("how", ["shutdown", "close_notify"])
def test_an_end_is_an_end(pair: MakePair, how: str) -> None:
    one, other = pair()
    data = pattern(LARGE)
    assert one.send(data) == len(data)
    if how == "close_notify":
        one.tls.shutdown()
        one.records.flush()
    one.sock.shutdown(socket.SHUT_WR)
    room = memoryview(bytearray(2 * LARGE))
    count, rest = other.records.receive(room)
    assert count + len(rest or b"") == len(data)
    assert other.records.receive(room) == (0, b"")


def test_a_record_that_was_changed_on_the_way_is_an_error(pair: MakePair) -> None:
    one, other = pair()
    assert one.send(pattern(LARGE)) == LARGE
    stolen = bytearray(other.sock.recv(1 << 20))
    stolen[20_000] ^= 1
    one.sock.send(stolen)  # past its TLS
    with pytest.raises(SSL.Error):
        other.records.receive(memoryview(bytearray(LARGE)))


def test_a_socket_that_is_gone_is_an_error(pair: MakePair) -> None:
    one, other = pair()
    other.sock.close()
    with pytest.raises(OSError, match="pipe"):
        one.records.send(pattern(LARGE))


@pytest.mark.parametrize("wanted", [0, LARGE])
def test_the_last_words_of_one_who_took_no_more_are_heard(pair: MakePair, wanted: int) -> None:
    one, other = pair(8192)
    data = pattern(4 * PORTION)
    assert one.send(data) < len(data)
    assert one.records.waits
    last = b"too much of it: this is the end"
    assert other.send(last) == len(last)
    other.sock.close()
    room = bytearray(wanted)
    count, rest = one.records.receive(memoryview(room))
    assert bytes(room[:count]) + (rest or b"") == last
    with pytest.raises(OSError, match="pipe"):
        one.records.flush()


def test_two_threads_do_not_take_the_same_scratch(pair: MakePair, monkeypatch: pytest.MonkeyPatch) -> None:
    class Taken(list[object]):
        """What another thread has emptied since anybody looked."""

        def __bool__(self) -> bool:
            return True

    monkeypatch.setattr(records, "_idle", Taken())
    one, other = pair()
    data = pattern(2 * PORTION)
    assert carry(one, other, [data]) == data
