"""Descriptors that a peer sends along: refused by the kernel, or found, and released within a bound."""

import array
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from errno import EBADMSG, ENOPROTOOPT, EPERM

import pytest

from srpcd import passing
from tests import lingering, realm

LINGER_SECONDS = 30
"""Of the socket that is sent along: what its release waits for where nothing bounds it."""

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    """A sender and a receiver."""
    sender, receiver = socket.socketpair()
    with sender, receiver:
        yield sender, receiver


@pytest.fixture
def send_lingering() -> Iterator[Callable[[socket.socket], None]]:
    """Send the last descriptor of a TCP socket with SO_LINGER whose data its peer does not take."""
    kept: list[socket.socket] = []

    def send(sender: socket.socket) -> None:
        kept.append(lingering.send_lingering(sender, b"x", LINGER_SECONDS))

    yield send
    for each in kept:
        each.close()


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """No timer goes on after a test."""
    yield
    signal.setitimer(signal.ITIMER_REAL, 0.0)
    passing._releases.active = False


def send_descriptor(sender: socket.socket, fd: int) -> None:
    sender.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))])


def test_the_kernel_refuses_descriptors_and_passes_bytes(pair: Pair) -> None:
    sender, receiver = pair
    if not passing.refuse_descriptors(receiver):
        pytest.skip("needs Linux 6.16 (SO_PASSRIGHTS)")
    with pytest.raises(PermissionError) as caught:
        send_descriptor(sender, 0)
    assert caught.value.errno == EPERM
    sender.send(b"bytes")
    assert receiver.recv(10) == b"bytes"


def test_a_listener_refuses_for_what_it_has_not_accepted(tmp_path: os.PathLike[str]) -> None:
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as sender:
        if not passing.refuse_descriptors(listener):
            pytest.skip("needs Linux 6.16 (SO_PASSRIGHTS)")
        listener.bind(os.path.join(tmp_path, "sock"))
        listener.listen()
        sender.connect(listener.getsockname())
        with pytest.raises(PermissionError):
            send_descriptor(sender, 0)
        with listener.accept()[0], pytest.raises(PermissionError):
            send_descriptor(sender, 0)


def test_a_kernel_that_can_not_refuse_is_told_from_other_faults() -> None:
    class Old:
        def __init__(self, errno: int) -> None:
            self.errno = errno

        def setsockopt(self, *_: object) -> None:
            raise OSError(self.errno, "refused")

    assert not passing.refuse_descriptors(Old(ENOPROTOOPT))  # type: ignore[arg-type]
    with pytest.raises(PermissionError):
        passing.refuse_descriptors(Old(EPERM))  # type: ignore[arg-type]


def test_a_reader_finds_out_that_a_descriptor_came(pair: Pair) -> None:
    sender, receiver = pair
    receiver.setblocking(False)
    sender.send(b"bytes")
    assert passing.receive(receiver, 3) == b"byt"
    assert passing.receive(receiver, 9) == b"es"
    with pytest.raises(BlockingIOError):
        passing.receive(receiver, 9)
    before = os.listdir("/proc/self/fd")
    send_descriptor(sender, sender.fileno())
    with pytest.raises(OSError, match="descriptor") as caught:
        passing.receive(receiver, 9)
    assert caught.value.errno == EBADMSG
    assert os.listdir("/proc/self/fd") == before
    sender.close()
    assert passing.receive(receiver, 9) == b""


@pytest.mark.parametrize("how", ["read", "close", "close after reading"])
def test_the_release_of_a_lingering_socket_is_interrupted(
    pair: Pair, send_lingering: Callable[[socket.socket], None], how: str
) -> None:
    sender, receiver = pair
    if how != "close":
        sender.send(b"honest")
        assert passing.receive_bounded(receiver, 100) == b"honest"
    send_lingering(sender)
    begun = time.monotonic()
    if how == "read":
        with pytest.raises(OSError, match="descriptor"):
            passing.receive_bounded(receiver, 100)
    else:
        passing.close(receiver.detach())
    assert time.monotonic() - begun < LINGER_SECONDS / 3


def test_a_process_that_ends_while_they_are_on_ends_as_it_wants_to() -> None:
    code = "from srpcd import passing\npassing.TICK_SECONDS = 1e-4\npassing.interrupt_releases()\nraise SystemExit(3)"
    for _ in range(20):
        assert subprocess.run([sys.executable, "-c", code]).returncode == 3


def test_the_signals_stop_when_nothing_is_read_any_more(pair: Pair) -> None:
    pair[0].send(b"x")
    passing.receive_bounded(pair[1], 1)
    assert signal.getitimer(signal.ITIMER_REAL)[1] == pytest.approx(passing.TICK_SECONDS)
    end = time.monotonic() + 10 * passing.QUIET_TICKS * passing.TICK_SECONDS * realm.PACE
    while signal.getitimer(signal.ITIMER_REAL)[0] and time.monotonic() < end:
        time.sleep(0.05)
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    passing.close(pair[1].detach())
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
