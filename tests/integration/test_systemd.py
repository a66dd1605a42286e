"""What the daemon and a service manager say to each other, and the sockets that live longer than the daemon."""

import os
import signal
import socket
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from srpcd.monitor.systemd import Manager as Told
from tests import realm
from tests.integration import stage
from tests.integration.raw import CALL, PING, Raw, call_body
from tests.realm import labels, processes
from tests.realm.manager import ManagedDaemon, Manager

pytestmark = pytest.mark.needs_root

MakeDaemon = Callable[..., ManagedDaemon]


@pytest.fixture
def manager(open_directory: Path) -> Iterator[Manager]:
    made = Manager(open_directory)
    yield made
    made.close()


@pytest.fixture
def make(manager: Manager) -> Iterator[MakeDaemon]:
    made: list[ManagedDaemon] = []

    def make(config: dict[str, object] | None = None, **options: float) -> ManagedDaemon:
        made.append(ManagedDaemon(manager, config, **options))
        return made[-1]

    yield make
    for each in made:
        if each.running:
            each._end(signal.SIGTERM, 20)


def tcp_listener() -> socket.socket:
    with labels.sockets_of(labels.DAEMON):
        return socket.create_server(("127.0.0.1", 0), backlog=64)


def local_listener(path: Path) -> socket.socket:
    with labels.sockets_of(labels.DAEMON):
        sock = socket.socket(socket.AF_UNIX)
    sock.bind(str(path))
    path.chmod(0o666)
    sock.listen(64)
    return sock


def gate(daemon: realm.Daemon, kind: str) -> int:
    (found,) = [each.pid for each in daemon.processes("gate", kind) if processes.alive(each)]
    return found


def served(raw: Raw) -> bool:
    """Whether a gate answers."""
    return raw.answer(raw.post(PING)).kind == PING + 1


# --- what it is told -----------------------------------------------------------------------------------------------------


def test_it_is_ready_when_all_gates_have_proved_themselves(make: MakeDaemon, manager: Manager) -> None:
    daemon = make().start()
    message = manager.wait(READY="1")
    assert manager.sender == daemon.pid, "NotifyAccess=main takes it from nobody else"
    assert [each["name"] for each in daemon.events("sandbox")] in (["tls", "local"], ["local", "tls"])
    assert message["STATUS"] == f"serving {daemon.address}, {daemon.local}, pin {daemon.pin}"
    with Raw.tls(daemon.tcp) as raw:
        assert served(raw)
    daemon._end(signal.SIGTERM, 20)
    told = manager.wait(STOPPING="1")
    assert int(told["EXTEND_TIMEOUT_USEC"]) > 10e6


def test_it_is_not_ready_while_a_gate_is_not(make: MakeDaemon, manager: Manager, tmp_path: Path) -> None:
    script = tmp_path / "silent.py"
    script.write_text("import time\ntime.sleep(60)\n")
    manager.environment.pop("SOCKETS")  # `programs` start it in another way
    daemon = realm.Daemon(programs={"gate": script}, environment=manager.environment | {"WATCHDOG_USEC": "400000"})
    daemon.begin()
    try:
        daemon.wait_event("process-start", 10, count=2, role="gate")
        time.sleep(1.5)
        heard = manager.hear()
        assert not [each for each in heard if "READY" in each or "WATCHDOG" in each], heard
    finally:
        daemon._end(signal.SIGTERM, 30)


def test_the_watchdog_hears_of_it_while_it_is_well_and_not_while_it_hangs(make: MakeDaemon, manager: Manager) -> None:
    daemon = make(watchdog=0.6).start()
    manager.wait(READY="1")
    for _ in range(4):
        manager.wait(0.6, WATCHDOG="1")
    os.kill(daemon.pid, signal.SIGSTOP)
    try:
        time.sleep(0.2)
        manager.hear()
        time.sleep(0.8)
        assert not manager.hear()
    finally:
        os.kill(daemon.pid, signal.SIGCONT)
    manager.wait(WATCHDOG="1")
    assert daemon.events("process-kill") == [], "its gates have done nothing wrong meanwhile"


def test_what_is_told_to_nobody_is_not_told(private_realm: realm.Place) -> None:
    for environment in ({}, {"NOTIFY_SOCKET": ""}, {"NOTIFY_SOCKET": "vsock:2:1"}):
        told = Told(environment)
        assert not told.there
        told.ready("serving")
        assert told.passed == []


def test_a_manager_in_the_abstract_name_space_or_one_that_is_gone(private_realm: realm.Place) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(f"\0srpc-test-{os.getpid()}")
        sock.settimeout(5)
        told = Told({"NOTIFY_SOCKET": f"@srpc-test-{os.getpid()}"})
        told.ready("well")
        assert sock.recv(4096) == b"READY=1\nSTATUS=well"
        told.reloading()
        reloading, since = sock.recv(4096).split(b"\n")
        assert reloading == b"RELOADING=1"
        assert 0 <= time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000 - int(since.partition(b"=")[2]) < 5e6
    told.ready("well")  # and nobody is there
    _close(told)


def test_a_manager_that_does_not_read_is_not_waited_for(private_realm: realm.Place) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(f"\0srpc-deaf-{os.getpid()}")
        told = Told({"NOTIFY_SOCKET": f"@srpc-deaf-{os.getpid()}", "WATCHDOG_USEC": "1000000"})
        assert told._socket
        with told._socket:
            told._socket.settimeout(0.05)
            begun = time.monotonic()
            while time.monotonic() - begun < 0.05:
                begun = time.monotonic()
                told.alive()
            assert time.monotonic() - begun < 1


def _close(told: Told) -> None:
    if told._socket:
        told._socket.close()


@pytest.mark.parametrize("other", ["WATCHDOG_PID", "LISTEN_PID"])
def test_what_is_meant_for_another_process_is_left_alone(other: str) -> None:
    environment = {"NOTIFY_SOCKET": "/nowhere", "WATCHDOG_USEC": "9000000", "LISTEN_FDS": "1", "LISTEN_PID": "1", other: "1"}
    told = Told(environment)
    assert told.passed == []
    assert told.watchdog == (0 if other == "WATCHDOG_PID" else 9)
    _close(told)


# --- sockets of a socket unit --------------------------------------------------------------------------------------------


def test_passed_sockets_are_used_and_left_alone_at_the_end(make: MakeDaemon, manager: Manager, open_directory: Path) -> None:
    path = open_directory / "passed.sock"
    tcp, local = tcp_listener(), local_listener(path)
    manager.passed += [("srpcd.socket", tcp), ("srpcd.socket", local)]
    daemon = make().start()
    assert daemon.tcp == tcp.getsockname()
    assert not daemon.local.exists(), "it made none of its own"
    assert manager.store == [], "they are not ours to store"
    assert "listen.tcp is not used" in daemon.wait_event("warning")["text"]
    stage.make_directory(daemon.tree / "tools")
    stage.program(daemon.tree / "tools/cat", "#!/bin/sh\nexec cat\n")
    with Raw.local(path, "alice") as raw:
        raw.login("alice")
        raw.walk("tools/cat", 2)
        assert raw.call(2, b"over the passed socket").payload == b"over the passed socket"
    with stage.dial(daemon, "alice") as alice:
        assert alice.call("/tools/cat", b"tls") == b"tls"
    gates = [gate(daemon, kind) for kind in ("tls", "local")]
    # Soon, because the pipes of a session that has just ended are closed after it.
    assert realm.until(lambda: len({len(processes.fds(each)) for each in gates}) == 1), "a gate has inherited one"
    daemon._end(signal.SIGTERM, 20)
    assert stat.S_ISSOCK(path.stat().st_mode)
    with ExitStack() as stack:  # nobody serves, and nobody is refused
        waiting = [stack.enter_context(socket.create_connection(tcp.getsockname(), 2)) for _ in range(5)]
        neighbour = stack.enter_context(socket.socket(socket.AF_UNIX))
        neighbour.connect(str(path))
        daemon.start()
        for sock in waiting:
            sock.settimeout(10)
        with Raw(neighbour) as raw:
            assert served(raw)


def test_one_socket_for_both_kinds_of_addresses_tells_them_apart(make: MakeDaemon, manager: Manager) -> None:
    with labels.sockets_of(labels.DAEMON):
        sock = socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    manager.passed.append(("srpcd.socket", sock))
    daemon = make().start()
    port = sock.getsockname()[1]
    with Raw.tls(("127.0.0.1", port)) as one:
        assert served(one)
        assert daemon.wait_event("connection", state="accepted")["peer"].startswith("127.0.0.1:")


def refused_start(daemon: realm.Daemon) -> str:
    daemon.begin()
    assert daemon.wait(20) == 1
    return str(daemon.events("stop")[0]["reason"])


@pytest.mark.parametrize(("config", "words"), [({"tcp": []}, "listen.tcp: it is switched off"),
                                               ({"local": False}, "listen.local: it is switched off")])  # fmt: skip
def test_what_is_switched_off_is_not_switched_on_by_a_socket_unit(
    make: MakeDaemon, manager: Manager, open_directory: Path, config: dict[str, object], words: str
) -> None:
    manager.passed += [("srpcd.socket", tcp_listener()), ("srpcd.socket", local_listener(open_directory / "s"))]
    assert words in refused_start(make({"listen": config}))


def test_a_socket_of_another_kind_is_refused(make: MakeDaemon, manager: Manager) -> None:
    with labels.sockets_of(labels.DAEMON):
        manager.passed.append(("srpcd.socket", socket.socket(socket.AF_INET, socket.SOCK_DGRAM)))
    assert "'srpcd.socket' is no listening stream socket" in refused_start(make())


# --- the store -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_its_own_sockets_are_kept_over_a_restart(make: MakeDaemon, manager: Manager, how: signal.Signals) -> None:
    daemon = make({"listen": {"tcp": ["127.0.0.1:0", "127.0.0.2:0"]}}).start()
    manager.wait(READY="1")
    assert sorted(name for name, _sock in manager.store) == sorted(
        ["own-127.0.0.1_0", "own-127.0.0.2_0", f"own-{daemon.local}"]
    )
    before, inode = daemon.tcp, daemon.local.stat().st_ino
    daemon._end(how, 20)
    with ExitStack() as stack:
        waiting = stack.enter_context(socket.create_connection(before, 2))
        neighbour = stack.enter_context(socket.socket(socket.AF_UNIX))
        neighbour.connect(str(daemon.local))
        daemon.start()
        assert daemon.tcp == before
        assert daemon.local.stat().st_ino == inode
        with Raw(neighbour) as raw:
            assert served(raw)
        waiting.settimeout(5)
    with Raw.tls(before) as raw:
        assert served(raw)
    manager.hear()
    assert len(manager.store) == 3, "nothing was put there twice"


def test_sockets_that_are_no_longer_configured_are_given_up(make: MakeDaemon, manager: Manager) -> None:
    daemon = make({"listen": {"tcp": ["127.0.0.1:0", "127.0.0.2:0"]}}).start()
    manager.wait(READY="1")
    gone = next(sock for name, sock in manager.store if name == "own-127.0.0.2_0").getsockname()
    daemon._end(signal.SIGTERM, 20)
    daemon.configure({"listen": {"tcp": ["127.0.0.1:0"], "local": False}})
    daemon.start()
    manager.wait(READY="1")
    assert [name for name, _sock in manager.store] == ["own-127.0.0.1_0"]
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(gone, 2)


def test_a_kept_socket_whose_file_is_gone_is_made_anew(make: MakeDaemon, manager: Manager) -> None:
    daemon = make().start()
    manager.wait(READY="1")
    daemon._end(signal.SIGKILL, 5)
    daemon.local.unlink()
    daemon.start()
    manager.wait(READY="1")
    assert sorted(name for name, _sock in manager.store) == sorted(["own-127.0.0.1_0", f"own-{daemon.local}"])
    with Raw.local(daemon.local) as raw:
        assert served(raw)


# --- hung gates ----------------------------------------------------------------------------------------------------------


def test_a_gate_that_hangs_is_replaced_and_the_other_one_does_not_notice(make: MakeDaemon, manager: Manager) -> None:
    daemon = make(watchdog=4).start()
    manager.wait(READY="1")
    stage.make_directory(daemon.tree / "tools")
    stage.program(daemon.tree / "tools/cat", "#!/bin/sh\nexec cat\n")
    hung = gate(daemon, "tls")
    with Raw.tls(daemon.tcp) as one, Raw.tls(daemon.tcp) as idle, Raw.local(daemon.local, "bob") as bob:
        one.login("alice")
        one.walk("tools/cat", 2)
        bob.login("bob")
        bob.walk("tools/cat", 2)
        os.kill(hung, signal.SIGSTOP)
        outstanding = [one.post(CALL, call_body(2, b"x")) for _ in range(20)]
        begun = time.monotonic()
        while daemon.events("process-kill", role="gate") == []:
            assert bob.call(2, b"unmoved").payload == b"unmoved"
            assert time.monotonic() - begun < 20
            time.sleep(0.2)
        assert daemon.events("process-kill")[0]["reason"] == "does not answer"
        answered = [each.seq for each in one.rest()]
        assert [each for each in answered if each in outstanding] == [], "the connection ends, which is their one error"
        assert idle.over()
        assert bob.call(2, b"after").payload == b"after"
    daemon.wait_event("gate-restart", 10, gate="tls")
    assert stage.eventually(lambda: len(daemon.events("ready")) == 2, 15)
    with stage.dial(daemon, "alice") as alice:
        assert alice.call("/tools/cat", b"again") == b"again"
    assert gate(daemon, "tls") != hung
    told = [each for each in manager.told + manager.hear() if "WATCHDOG" in each]
    assert len(told) > 5
