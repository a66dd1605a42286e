"""Personal mode: started by a user who is not root, the daemon serves that user alone."""

from collections.abc import Callable

import pytest

from tests import realm

MakeDaemon = Callable[..., realm.Daemon]

CALL = """
from srpc_client import SrpcError, blocking
try:
    with blocking.dial(sys.argv[1], user=sys.argv[2] or None) as connection:
        print(connection.session.user, connection.call("/tools/shout", b"word").decode(), end="")
except (SrpcError, OSError) as fault:
    print(getattr(fault, "code", fault), end="")
"""


def said(user: str | None, daemon: realm.Daemon, name: str = "") -> str:
    return realm.run_as(user, realm.python(CALL, f"unix:{daemon.local}", name), check=True).stdout.decode()


def programs(daemon: realm.Daemon, uid: int) -> None:
    realm.install(daemon.tree / "tools/shout", "#!/bin/sh\ntr a-z A-Z\n", 0o755, uid=uid)


@pytest.mark.needs_root
def test_a_users_daemon_serves_him_and_nobody_else(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon(user="alice")
    uid = realm.account("alice").uid
    realm.run_as("alice", ["/bin/mkdir", "-m", "0755", str(daemon.tree / "tools")], check=True)
    programs(daemon, uid)
    assert said("alice", daemon) == "alice WORD"
    assert said("alice", daemon, "bob") == "EACCES"
    assert "WORD" not in said("bob", daemon)
    assert {process.uid for process in daemon.processes()} == {uid}


@pytest.mark.needs_ordinary_user
def test_whoever_runs_the_tests_is_served_by_his_own_daemon(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon()
    programs(daemon, -1)
    assert said(None, daemon).endswith(" WORD")
