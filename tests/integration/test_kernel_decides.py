"""Who may call what is what the kernel says at that very call."""

import os
import time
from collections.abc import Callable, Iterator
from errno import EACCES, EAGAIN, ENOENT, ENXIO, ESTALE
from pathlib import Path

import pytest

from srpc_client import SrpcError, blocking
from tests import realm
from tests.integration import stage

pytestmark = pytest.mark.needs_root


@pytest.fixture(scope="module")
def daemon(private_realm: realm.Place) -> Iterator[realm.Daemon]:
    with realm.Daemon({"limits": {"worker_idle": 30}}) as running:
        stage.make_directory(running.tree / "calc", "svc", "calc")
        stage.make_directory(running.tree / "tools")
        stage.program(running.tree / "tools/wc", "#!/bin/sh\nexec wc -c\n", 0o750, "calc")
        with stage.service(running, "/calc/echo"):
            yield running


@pytest.fixture
def alice(daemon: realm.Daemon) -> Iterator[blocking.Connection]:
    with stage.dial(daemon, "alice") as connection:
        yield connection


@pytest.fixture
def bob(daemon: realm.Daemon) -> Iterator[blocking.Connection]:
    with stage.dial(daemon, "bob") as connection:
        yield connection


@pytest.fixture
def as_found(daemon: realm.Daemon) -> Iterator[None]:
    """Puts modes and groups back after a test that changes them."""
    paths = [daemon.tree, *sorted(daemon.tree.rglob("*"))]
    before = [(path, path.stat()) for path in paths]
    yield
    for path, stat in before:
        os.chown(path, stat.st_uid, stat.st_gid)
        path.chmod(stat.st_mode & 0o7777)


def test_a_member_of_the_group_calls_a_service_and_a_program(alice: blocking.Connection) -> None:
    who = realm.account("alice")
    assert alice.call("/calc/echo", b"hi") == f"alice:{who.uid}:{who.gid}:hi".encode()
    assert alice.call("/tools/wc", b"12345").strip() == b"5"


def test_somebody_else_is_refused_by_the_kernel(bob: blocking.Connection, daemon: realm.Daemon) -> None:
    assert stage.errno_of(bob, "/calc/echo") == EACCES
    assert stage.errno_of(bob, "/tools/wc") == EACCES
    event = daemon.wait_event("refused", user="bob", endpoint="/calc/echo")
    assert event["errno"] == EACCES
    assert event["peer"].startswith("127.0.0.1:")


@pytest.mark.parametrize("endpoint", ["calc/echo", "tools/wc"])
def test_chmod_on_the_endpoint_binds_from_the_next_call(
    alice: blocking.Connection, daemon: realm.Daemon, endpoint: str, as_found: None
) -> None:
    file = daemon.tree / endpoint
    mode = file.stat().st_mode & 0o777
    assert stage.errno_of(alice, f"/{endpoint}") == 0
    file.chmod(0o600)
    assert stage.errno_of(alice, f"/{endpoint}") == EACCES
    file.chmod(mode)
    assert stage.eventually(lambda: stage.errno_of(alice, f"/{endpoint}") == 0)


@pytest.mark.parametrize("endpoint", ["calc/echo", "tools/wc"])
def test_chgrp_on_the_endpoint_binds_from_the_next_call(
    alice: blocking.Connection, bob: blocking.Connection, daemon: realm.Daemon, endpoint: str, as_found: None
) -> None:
    file = daemon.tree / endpoint
    mode = file.stat().st_mode & 0o777
    assert stage.errno_of(bob, f"/{endpoint}") == EACCES
    os.chown(file, -1, realm.account("bob").gid)
    file.chmod(mode)
    assert stage.errno_of(bob, f"/{endpoint}") == 0
    assert stage.errno_of(alice, f"/{endpoint}") == EACCES


@pytest.mark.parametrize(("endpoint", "right"), [("calc/echo", "w"), ("tools/wc", "rx")])
def test_an_acl_entry_grants_and_denies_from_the_next_call(
    alice: blocking.Connection, bob: blocking.Connection, daemon: realm.Daemon, endpoint: str, right: str, as_found: None
) -> None:
    file = daemon.tree / endpoint
    assert stage.errno_of(bob, f"/{endpoint}") == EACCES
    realm.grant(file, right, uid=realm.account("bob").uid)
    try:
        assert stage.errno_of(bob, f"/{endpoint}") == 0
        realm.grant(file, "", uid=realm.account("alice").uid)
        assert stage.errno_of(alice, f"/{endpoint}") == EACCES
    finally:
        realm.strip(file)


@pytest.mark.parametrize("endpoint", ["calc/echo", "tools/wc"])
def test_a_directory_above_that_closes_binds_from_the_next_call(
    alice: blocking.Connection, daemon: realm.Daemon, endpoint: str, as_found: None
) -> None:
    for directory in ((daemon.tree / endpoint).parent, daemon.tree):
        assert stage.eventually(lambda: stage.errno_of(alice, f"/{endpoint}") == 0)
        directory.chmod(0o700)
        assert stage.errno_of(alice, f"/{endpoint}") == EACCES
        directory.chmod(0o755)


def test_an_acl_on_the_directory_above_binds_from_the_next_call(
    alice: blocking.Connection, daemon: realm.Daemon, as_found: None
) -> None:
    directory = daemon.tree / "calc"
    assert stage.errno_of(alice, "/calc/echo") == 0
    realm.grant(directory, "", uid=realm.account("alice").uid)
    try:
        assert stage.errno_of(alice, "/calc/echo") == EACCES
    finally:
        realm.strip(directory)


def test_a_worker_has_the_ids_of_the_account_and_nothing_else(alice: blocking.Connection, daemon: realm.Daemon) -> None:
    alice.call("/calc/echo", b"")
    (worker,) = stage.workers(daemon, "alice")
    who = realm.account("alice")
    assert (worker.uid, worker.gid) == (who.uid, who.gid)
    assert set(worker.groups) == {who.gid, *map(realm.group, who.groups)}


def test_gates_and_workers_have_no_capability_in_any_set_and_no_new_privileges(
    alice: blocking.Connection, daemon: realm.Daemon
) -> None:
    confined = daemon.processes("gate") + daemon.processes("worker")
    assert len(daemon.processes("gate")) == 2
    assert confined
    for process in confined:
        status = realm.status(process.pid)
        assert {name: int(status[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == dict.fromkeys(
            ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"), 0
        ), process
        assert status["NoNewPrivs"] == "1"
        assert process.uid != 0


def test_the_monitor_keeps_the_five_capabilities_that_it_needs(daemon: realm.Daemon) -> None:
    status = realm.status(daemon.pid)
    wanted = sum(1 << each for each in (5, 6, 7, 8, 29))
    assert [int(status[name], 16) for name in ("CapPrm", "CapEff", "CapBnd")] == [wanted] * 3
    assert [int(status[name], 16) for name in ("CapInh", "CapAmb")] == [0, 0]


def test_a_second_session_of_a_user_makes_no_new_process(alice: blocking.Connection, daemon: realm.Daemon) -> None:
    alice.call("/calc/echo", b"")
    before = {each.pid for each in stage.workers(daemon, "alice")}
    with stage.dial(daemon, "alice") as second:
        assert second.call("/calc/echo", b"again").endswith(b":again")
        assert {each.pid for each in stage.workers(daemon, "alice")} == before


def test_the_tree_is_what_the_caller_may_see(
    alice: blocking.Connection, bob: blocking.Connection, daemon: realm.Daemon
) -> None:
    secret = stage.make_directory(daemon.tree / "staff", group="staff2", mode=0o750)
    stage.program(secret / "list", "#!/bin/sh\nexit 0\n")
    try:
        assert "list" in alice.list("/staff")
        with pytest.raises(SrpcError) as refused:
            bob.list("/staff")
        assert refused.value.errno == EACCES
        assert "staff" in bob.list("/")
    finally:
        (secret / "list").unlink()
        secret.rmdir()


def test_another_file_at_the_path_is_called_after_walking_again(alice: blocking.Connection, daemon: realm.Daemon) -> None:
    file = daemon.tree / "tools/version"
    stage.program(file, "#!/bin/sh\necho one\n")
    assert alice.call("/tools/version", b"") == b"one\n"
    stage.program(daemon.tree / "tools/new", "#!/bin/sh\necho two\n")
    (daemon.tree / "tools/new").rename(file)
    assert alice.call("/tools/version", b"") == b"two\n"
    file.unlink()
    assert stage.errno_of(alice, "/tools/version") == ENOENT


def test_nobody_serving_is_enxio_and_a_service_that_comes_back_is_called(daemon: realm.Daemon) -> None:
    stage.make_directory(daemon.tree / "late", "svc", "calc")
    with stage.dial(daemon, "alice") as connection:
        with stage.service(daemon, "/late/echo"):
            assert stage.errno_of(connection, "/late/echo") == 0
        fifo = daemon.tree / "late/echo"
        if not fifo.exists():
            os.mkfifo(fifo)
            os.chown(fifo, realm.account("svc").uid, realm.group("calc"))
            fifo.chmod(0o620)
        assert stage.errno_of(connection, "/late/echo") in (ENXIO, ESTALE)
        with stage.service(daemon, "/late/echo"):
            assert stage.errno_of(connection, "/late/echo") == 0


def test_several_processes_serve_one_endpoint(alice: blocking.Connection, daemon: realm.Daemon) -> None:
    stage.make_directory(daemon.tree / "many", "svc", "calc")
    with stage.service(daemon, "/many/echo"), stage.service(daemon, "/many/echo") as second:
        assert stage.errno_of(alice, "/many/echo") == 0
        second.kill()
        assert stage.eventually(lambda: stage.errno_of(alice, "/many/echo") == 0)


TRUST: dict[str, Callable[[Path], object]] = {
    "writable for its group": lambda path: path.chmod(0o775),
    "writable for everybody": lambda path: path.chmod(0o757),
    "not owned by root": lambda path: os.chown(path, realm.account("svc").uid, -1),
    "setuid": lambda path: path.chmod(0o4755),
    "setgid": lambda path: path.chmod(0o2755),
    "writable by ACL": lambda path: realm.grant(path, "rwx", uid=realm.account("svc").uid),
}


@pytest.mark.parametrize("fault", TRUST)
def test_a_program_that_others_could_change_is_not_executed(
    alice: blocking.Connection, daemon: realm.Daemon, fault: str
) -> None:
    file = stage.program(daemon.tree / "tools/doubtful", "#!/bin/sh\necho ran\n")
    try:
        assert alice.call("/tools/doubtful", b"") == b"ran\n"
        TRUST[fault](file)
        assert stage.errno_of(alice, "/tools/doubtful") == EACCES
    finally:
        file.unlink()


@pytest.mark.parametrize("fault", sorted(set(TRUST) - {"setuid", "setgid"}))
def test_a_program_in_a_directory_that_a_service_may_write_is_not_executed(
    alice: blocking.Connection, daemon: realm.Daemon, fault: str
) -> None:
    directory = stage.make_directory(daemon.tree / "svcdir")
    inner = stage.make_directory(directory / "inner")
    file = stage.program(inner / "planted", "#!/bin/sh\necho ran\n")
    try:
        assert alice.call("/svcdir/inner/planted", b"") == b"ran\n"
        TRUST[fault](directory)
        assert stage.errno_of(alice, "/svcdir/inner/planted") == EACCES
    finally:
        file.unlink()
        inner.rmdir()
        directory.rmdir()


def test_a_program_s_environment_holds_nothing_that_the_client_sent(
    alice: blocking.Connection, daemon: realm.Daemon
) -> None:
    file = stage.program(daemon.tree / "tools/env", "#!/bin/sh\nexec env\n")
    try:
        lines = dict(line.split("=", 1) for line in alice.call("/tools/env", b"").decode().splitlines())
        assert set(lines) - {"PWD", "_", "SHLVL", "OLDPWD"} == {
            "SRPC_ENDPOINT", "SRPC_USER", "SRPC_PEER", "PATH", "LANG", "HOME",
        }  # fmt: skip
        assert lines["SRPC_ENDPOINT"] == "/tools/env"
        assert lines["SRPC_USER"] == "alice"
        assert lines["HOME"] == "/"
        assert lines["SRPC_PEER"].startswith("127.0.0.1")
    finally:
        file.unlink()


def test_a_resident_program_keeps_running_between_calls(alice: blocking.Connection, daemon: realm.Daemon) -> None:
    file = stage.program(daemon.tree / "tools/kept", stage.RESIDENT, 0o1755)
    try:
        first, second = (alice.call("/tools/kept", b"x").partition(b":")[0] for _ in range(2))
        assert first == second
        file.chmod(0o1700)
        assert stage.errno_of(alice, "/tools/kept") == EACCES
    finally:
        file.unlink()


def test_a_user_without_the_right_to_write_in_a_directory_can_not_announce_there(daemon: realm.Daemon) -> None:
    code = """
import asyncio, sys
from srpc_client import serve
try:
    asyncio.run(asyncio.wait_for(serve({"/calc/mine": lambda r: b""}, address=sys.argv[1]), 5))
except OSError as fault:
    print(fault.errno)
"""
    done = realm.run_as("bob", realm.python(code, f"unix:{daemon.local}"))
    assert done.stdout.split() == [str(EACCES).encode()], done


def test_a_pipe_that_may_be_called_but_not_read_can_not_be_served(daemon: realm.Daemon, tmp_path: Path) -> None:
    code = """
import asyncio, sys
from srpc_client import serve
try:
    asyncio.run(asyncio.wait_for(serve({"/calc/echo": lambda r: b"forged"}, address=sys.argv[1]), 5))
except OSError as fault:
    print(fault.errno)
"""
    done = realm.run_as("alice", realm.python(code, f"unix:{daemon.local}"))
    assert done.stdout.split() == [str(EACCES).encode()], done


def test_a_service_that_may_no_longer_read_its_endpoint_loses_its_callers_and_gets_them_back(
    alice: blocking.Connection, daemon: realm.Daemon
) -> None:
    """The endpoint is the administrator's; the service has its right by an entry in the access list."""
    pipe = stage.make_directory(daemon.tree / "lent") / "echo"
    svc, who = realm.account("svc").uid, realm.account("alice").uid
    os.mkfifo(pipe)
    pipe.chmod(0o600)
    for uid, permissions in ((svc, "rw"), (who, "w")):
        realm.grant(pipe, permissions, uid=uid)
    with stage.service(daemon, "/calc/slow", "/lent/echo"):
        assert stage.errno_of(alice, "/lent/echo") == 0
        realm.grant(pipe, "w", uid=svc)
        event = daemon.wait_event("announce", outcome="refused", endpoint="/lent/echo")
        assert (event["uid"], event["errno"]) == (svc, EACCES)
        assert stage.eventually(lambda: stage.errno_of(alice, "/lent/echo") == ENXIO)
        assert stage.eventually(lambda: stage.errno_of(alice, "/calc/slow", b"0") == 0)  # that it still may
        realm.grant(pipe, "r", uid=svc)
        assert stage.eventually(lambda: stage.errno_of(alice, "/lent/echo") == 0, 15)


def test_where_no_line_can_be_made_it_is_not_said_that_nobody_serves(
    daemon: realm.Daemon, alice: blocking.Connection
) -> None:
    """This path is too long for the first frame of a line, in which each of its letters takes six bytes."""
    names = ["ж" * 127] * 6
    above = daemon.tree
    for name in names:
        above = stage.make_directory(above / name, "svc")
    path = "/".join(["", *names, "echo"])
    with stage.service(daemon, path):
        assert alice.session.stat(path).live
        assert stage.errno_of(alice, path) == EAGAIN


def test_what_becomes_of_a_pipe_whose_service_has_ended_ends_nobodys_worker(
    alice: blocking.Connection, daemon: realm.Daemon
) -> None:
    """A line that its worker says is gone may still be open, but not to a service that has withdrawn."""
    pipe = stage.make_directory(daemon.tree / "past") / "echo"
    os.mkfifo(pipe)
    pipe.chmod(0o666)
    with stage.service(daemon, "/past/echo"):
        assert stage.errno_of(alice, "/past/echo") == 0
        before = [each.pid for each in stage.workers(daemon, "alice")]
    daemon.wait_event("withdraw", endpoint="/past/echo")
    pipe.chmod(0o600)
    assert stage.errno_of(alice, "/past/echo") == EACCES
    time.sleep(2.5)  # the monitor looks once a second, and probes then
    assert [each.pid for each in stage.workers(daemon, "alice")] == before
