"""SIGHUP: the configuration is read again, all of it or nothing, and nobody who is there notices."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack
from errno import EAGAIN, ESHUTDOWN
from pathlib import Path
from typing import Any

import pytest

from srpc_client import SrpcError, blocking
from srpcd import config as configuration
from tests import realm
from tests.integration import stage
from tests.integration.raw import CALL, PING, Raw, call_body
from tests.realm import processes
from tests.realm.manager import ManagedDaemon, Manager

pytestmark = pytest.mark.needs_root


@pytest.fixture
def manager(open_directory: Path) -> Iterator[Manager]:
    made = Manager(open_directory)
    yield made
    made.close()


@pytest.fixture
def daemon(manager: Manager) -> Iterator[ManagedDaemon]:
    made = ManagedDaemon(manager, watchdog=20)
    made.start()
    manager.wait(READY="1")
    stage.make_directory(made.tree / "calc", "svc", "calc")
    stage.make_directory(made.tree / "tools")
    stage.program(made.tree / "tools/cat", "#!/bin/sh\nexec cat\n")
    yield made
    made._end(signal.SIGTERM, 20)


def reload(daemon: ManagedDaemon, config: "dict[str, Any] | None" = None) -> dict[str, Any]:
    """Write this configuration, have it read, and return what is logged of it."""
    if config is not None:
        daemon.configure(config)
    before = len(daemon.events("reload"))
    daemon.manager.hear()
    daemon.hang_up()
    event = daemon.wait_event("reload", 20, before + 1)
    assert daemon.manager.wait(RELOADING="1")["MONOTONIC_USEC"].isdigit()
    return event


def status(daemon: ManagedDaemon) -> str:
    return daemon.manager.wait(READY="1")["STATUS"]


def gates(daemon: realm.Daemon, kind: str) -> list[int]:
    return [each.pid for each in daemon.processes("gate", kind) if processes.alive(each)]


def test_a_configuration_that_is_wrong_changes_nothing(daemon: ManagedDaemon) -> None:
    before = gates(daemon, "tls") + gates(daemon, "local")
    with stage.dial(daemon, "alice") as alice:
        for wrong in ({"limits": {"workers": 0}}, {"users": {"memory": "much"}}, {"nonsense": {"x": 1}}):
            event = reload(daemon, wrong)
            assert (event["level"], event["outcome"]) == ("error", "refused")
            assert str(daemon.file) in event["reason"]
            assert event["reason"] in status(daemon)
            assert alice.call("/tools/cat", b"as before") == b"as before"
        daemon.file.write_text("[limits\nnot TOML at all\n")
        assert "srpcd.toml" in reload(daemon)["reason"]
        assert "\n" not in status(daemon)
        daemon.file.unlink()
        assert "no such file" in reload(daemon)["reason"]
        assert reload(daemon, {})["outcome"] == "done"
        assert "old one" not in status(daemon)
        assert alice.call("/tools/cat", b"as before") == b"as before"
    assert gates(daemon, "tls") + gates(daemon, "local") == before, "nothing changed for them"


def test_what_the_monitor_decides_by_itself_changes_at_once(daemon: ManagedDaemon) -> None:
    with stage.dial(daemon, "alice"):
        assert daemon.events(level="debug")
    assert reload_quiet(daemon, {"log": {"level": "error"}, "authentication": {"allow": ["carol"]}})
    seen = len(daemon.events())
    with stage.dial(daemon, "alice") as alice:
        assert alice.call("/tools/cat", b"x") == b"x"
    assert len(daemon.events()) == seen, "nothing below an error is written"
    assert reload_quiet(daemon, {"log": {"level": "debug", "format": "text"}})
    with stage.dial(daemon, "alice") as alice:
        assert alice.call("/tools/cat", b"x") == b"x"
    assert "\nattach outcome=granted" in daemon.log_text()


def reload_quiet(daemon: ManagedDaemon, config: dict[str, Any]) -> bool:
    """The same where the log says nothing, or not in JSON."""
    daemon.manager.hear()
    daemon.configure(config)
    daemon.hang_up()
    return "serving" in status(daemon)


def test_limits_hold_for_new_connections_and_sessions_and_old_ones_go_on(daemon: ManagedDaemon) -> None:
    with stage.dial(daemon, "alice") as alice, Raw.local(daemon.local, "bob") as bob:
        bob.login("bob")
        bob.walk("tools/cat", 2)
        assert alice.call("/tools/cat", b"x") == b"x"
        (worker,) = stage.workers(daemon, "alice")
        old = {kind: gates(daemon, kind) for kind in ("tls", "local")}
        assert reload(daemon, {"limits": {"call_timeout": 1, "connections_per_address": 1}})["outcome"] == "done"
        for kind, before in old.items():
            assert len(gates(daemon, kind)) == 2, "a new one for new connections, the old one for those it has"
            assert set(before) < set(gates(daemon, kind))
        assert alice.call("/tools/cat", b"still") == b"still"
        assert bob.call(2, b"still").payload == b"still"
        with pytest.raises((OSError, SrpcError)):  # alice's connection counts, whichever gate it has
            stage.dial(daemon, "bob", timeout=2)
        with Raw.tls(daemon.tcp, next(realm.addresses())) as other:
            other.login("alice")
            assert len(stage.workers(daemon, "alice")) == 2, "with the new bounds, for the new session"
            stage.program(daemon.tree / "tools/nap", "#!/bin/sh\nsleep 3\necho awake\n")
            other.walk("tools/nap", 2)
            assert other.call(2).errno == 110
            assert alice.call("/tools/nap", b"") == b"awake\n", "the old session goes by the old bound"
    assert stage.eventually(lambda: gates(daemon, "tls") != [] and set(old["tls"]).isdisjoint(gates(daemon, "tls")), 10)
    assert stage.eventually(lambda: set(old["local"]).isdisjoint(gates(daemon, "local")), 10)
    assert daemon.wait_event("process-end", role="gate", status=0, pid=old["tls"][0])
    assert daemon.events("gate-restart") == []
    assert worker in stage.workers(daemon, "alice"), "it has its idle time, as any other"


def test_a_service_that_was_announced_before_is_called_by_those_who_come_after(daemon: ManagedDaemon) -> None:
    with stage.service(daemon, "/calc/echo"):
        old = gates(daemon, "local")
        assert reload(daemon, {"limits": {"outstanding": 100}})["outcome"] == "done"
        assert len(gates(daemon, "local")) == 2
        with stage.dial(daemon, "alice") as alice:
            assert alice.call("/calc/echo", b"x").endswith(b":x")
        with stage.service(daemon, "/calc/slow"), stage.dial(daemon, "alice") as alice:
            assert alice.call("/calc/slow", b"0") == b"slept"
            assert alice.call("/calc/echo", b"x").endswith(b":x")
        assert set(old) < set(gates(daemon, "local"))
    assert stage.eventually(lambda: len(gates(daemon, "local")) == 1, 10)


def test_a_new_key_is_for_new_connections(daemon: ManagedDaemon) -> None:
    keys = daemon.directory / "keys"
    old_pin = daemon.pin
    with stage.dial(daemon, "alice") as alice:
        assert alice.call("/tools/cat", b"x") == b"x"
        for name in ("key.pem", "cert.pem"):
            (keys / name).unlink()
        assert reload(daemon)["outcome"] == "done"
        new_pin = str(daemon.events("ready")[-1]["pin"])
        assert new_pin != old_pin
        assert new_pin in status(daemon)
        assert alice.call("/tools/cat", b"same connection") == b"same connection"
        with pytest.raises(SrpcError, match="pin"):
            stage.dial(daemon, "bob")
        daemon.pin = new_pin
        with stage.dial(daemon, "bob") as bob:
            assert bob.call("/tools/cat", b"new key") == b"new key"
        assert len(gates(daemon, "local")) == 1, "the local gate has no key"
        assert len(gates(daemon, "tls")) == 2
    assert stage.eventually(lambda: len(gates(daemon, "tls")) == 1, 10)
    # And a gate that dies is started again with the new key.
    os.kill(gates(daemon, "tls")[0], signal.SIGKILL)
    assert stage.eventually(lambda: daemon.events("gate-restart") and dials(daemon), 20)


def dials(daemon: realm.Daemon) -> bool:
    try:
        stage.dial(daemon, "alice").close()
    except OSError:
        return False
    return True


def test_a_key_that_is_of_no_use_changes_nothing(daemon: ManagedDaemon) -> None:
    key = daemon.directory / "keys/key.pem"
    good, before = key.read_bytes(), gates(daemon, "tls")
    key.write_bytes(b"no key at all\n")
    event = reload(daemon, {"limits": {"outstanding": 77}})
    assert event["outcome"] == "refused"
    assert "key.pem" in event["reason"]
    assert gates(daemon, "tls") == before
    assert len(gates(daemon, "local")) == 1, "all of it or nothing"
    with stage.dial(daemon, "alice") as alice:
        assert alice.call("/tools/cat", b"x") == b"x"
    key.write_bytes(good)
    assert reload(daemon)["outcome"] == "done"
    assert stage.eventually(lambda: set(before).isdisjoint(gates(daemon, "tls")), 10)


def test_what_needs_a_restart_is_named_and_left(daemon: ManagedDaemon) -> None:
    changes = {
        "gate_user": "_srpcl",
        "local_gate_user": "_srpcd",
        "listen": {"tcp": ["127.0.0.1:0", "127.0.0.1:0"]},
        "paths": {"tree": "/somewhere/else"},
        "users": {"cgroups": False, "tasks": 99},
    }
    event = reload(daemon, changes)
    assert (event["level"], event["outcome"]) == ("warning", "done")
    named = event["restart"].split(", ")
    assert sorted(named) == ["gate_user", "listen.tcp", "local_gate_user", "paths.tree", "users.cgroups"]
    assert f"needs a restart: {event['restart']}" in status(daemon)
    with stage.dial(daemon, "alice") as alice:
        assert alice.call("/tools/cat", b"the same tree") == b"the same tree"
    event = reload(daemon, {})
    assert (event["level"], event.get("restart")) == ("info", None)


def test_old_gates_end_with_the_age_of_sessions(daemon: ManagedDaemon) -> None:
    assert reload(daemon, {"authentication": {"session_age": 4}, "limits": {"drain": 0.5}})["outcome"] == "done"
    with Raw.local(daemon.local) as raw, stage.dial(daemon, "alice") as alice:
        assert alice.call("/tools/cat", b"x") == b"x"
        old = gates(daemon, "tls") + gates(daemon, "local")
        begun = time.monotonic()
        assert reload(daemon, {"limits": {"outstanding": 99, "drain": 0.5}})["outcome"] == "done"
        raw.answer(raw.post(PING))
        assert stage.eventually(lambda: set(old).isdisjoint(gates(daemon, "tls") + gates(daemon, "local")), 15)
        assert time.monotonic() - begun > 3.5
        assert raw.over()
    assert daemon.events("process-kill") == []


def test_many_reloads_leave_a_bounded_number_of_gates(daemon: ManagedDaemon) -> None:
    with ExitStack() as stack:
        for number in range(7):
            raw = stack.enter_context(Raw.tls(daemon.tcp))
            raw.answer(raw.post(PING))
            assert reload(daemon, {"limits": {"outstanding": 100 + number, "drain": 0.5}})["outcome"] == "done"
        assert stage.eventually(lambda: len(gates(daemon, "tls")) <= 5, 10), "four old ones, and the one that serves"
        assert len(gates(daemon, "local")) == 1
    assert stage.eventually(lambda: len(gates(daemon, "tls")) == 1, 10)


def test_calls_in_flight_end_once_when_their_gate_has_to(daemon: ManagedDaemon) -> None:
    stage.program(daemon.tree / "tools/long", "#!/bin/sh\nsleep 60\n")
    assert reload(daemon, {"authentication": {"session_age": 2}, "limits": {"drain": 0.5}})["outcome"] == "done"
    with Raw.tls(daemon.tcp) as raw:
        raw.login("alice")
        raw.walk("tools/long", 2)
        calls = [raw.post(CALL, call_body(2)) for _ in range(5)]
        assert reload(daemon, {"limits": {"outstanding": 99, "drain": 0.5}})["outcome"] == "done"
        frames = raw.rest()
        assert sorted(each.seq for each in frames) == calls
        assert {each.errno for each in frames} <= {ESHUTDOWN, 127}, "the daemon drains, or the session was too old"


def test_signals_in_a_row_and_one_during_the_start(manager: Manager, private_realm: realm.Place) -> None:
    daemon = ManagedDaemon(manager)
    daemon.start()
    try:
        for _ in range(20):
            daemon.hang_up()
        assert stage.eventually(lambda: 1 <= len(daemon.events("reload", outcome="done")) <= 20, 20)
        time.sleep(1)
        assert len(gates(daemon, "tls")) == 1
        with stage.dial(daemon, "alice"):
            daemon.hang_up()
            os.kill(daemon.pid, signal.SIGTERM)
        assert daemon.wait(20) == 0
    finally:
        daemon._end(signal.SIGTERM, 20)


@pytest.mark.parametrize("limit", ["workers", "connections"])
def test_a_limit_that_is_raised_lets_in_who_was_refused(daemon: ManagedDaemon, limit: str) -> None:
    assert reload(daemon, {"limits": {limit: 1}})["outcome"] == "done"
    with Raw.tls(daemon.tcp) as alice:
        alice.login("alice")
        with pytest.raises((OSError, SrpcError)) as refused:
            stage.dial(daemon, "bob")
        assert limit == "connections" or getattr(refused.value, "errno", 0) == EAGAIN
        assert reload(daemon, {})["outcome"] == "done"
        with stage.dial(daemon, "bob") as bob:
            assert isinstance(bob, blocking.Connection)
            assert bob.call("/tools/cat", b"in") == b"in"


Old = configuration.Config


def test_what_a_reload_takes_over() -> None:
    old = Old(gate_user="a", log=configuration.Log(level="info"))
    new = Old(gate_user="b", log=configuration.Log(level="debug"), users=configuration.Users(cgroups=False, tasks=9))
    renewed, fixed = configuration.renew(old, new)
    assert fixed == ["users.cgroups", "gate_user"]
    assert renewed == Old(gate_user="a", log=new.log, users=configuration.Users(cgroups=True, tasks=9))
    assert configuration.renew(old, old) == (old, [])
