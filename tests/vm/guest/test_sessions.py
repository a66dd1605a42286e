"""PAM sessions in the installed service: the lines that its PAM file has as remarks work as they are."""

import pwd
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.vm.guest.test_contexts import DAEMON, context_of, dial, running, until, worker

PAM, LIMITS = Path("/etc/pam.d/srpcd"), Path("/etc/security/limits.d/srpc-test.conf")


@pytest.fixture(scope="module", autouse=True)
def sessions() -> Iterator[None]:
    """They are asked for, and alice has limits."""
    before = PAM.read_text()
    asked = before.replace("#session required", "session required")
    assert asked.count("\nsession required") == 2
    PAM.write_text(asked + "session required pam_unix.so\n")  # which writes both ends into the journal
    LIMITS.write_text("alice soft nofile 100\nalice hard nofile 200\n")
    subprocess.run(["systemctl", "restart", "srpcd"], check=True)
    yield
    PAM.write_text(before)
    LIMITS.unlink()
    subprocess.run(["systemctl", "restart", "srpcd"], check=True)


def keepers() -> list[int]:
    """Forks of the monitor that have stayed: they are of the daemon's domain, and have its command line."""
    shown = subprocess.run(["systemctl", "show", "-P", "MainPID", "srpcd"], capture_output=True, text=True, check=True)
    return [pid for pid in running("/usr/sbin/srpcd") if pid != int(shown.stdout) and context_of(pid) == DAEMON]


def test_limits_and_login_uid_are_the_callers_and_the_keeper_stays_outside_of_his_control_group() -> None:
    with dial("alice"):
        pid = worker("alice")
        limits = next(
            line for line in Path(f"/proc/{pid}/limits").read_text().splitlines() if line.startswith("Max open files")
        )
        assert limits.split()[3:5] == ["100", "200"]
        assert Path(f"/proc/{pid}/loginuid").read_text() == str(pwd.getpwnam("alice").pw_uid)
        (keeper,) = keepers()
        assert Path(f"/proc/{pid}/cgroup").read_text().count("/users/") == 1
        assert "/users/" not in Path(f"/proc/{keeper}/cgroup").read_text()


def test_the_session_is_closed_after_the_worker_and_when_the_service_ends() -> None:
    with dial("alice"):
        (keeper,) = keepers()
        subprocess.run(["systemctl", "stop", "srpcd"], check=True)
    assert until(lambda: not context_of(keeper))
    written = subprocess.run(
        ["journalctl", "-q", "-o", "cat", "--grep", r"pam_unix\(srpcd:session\)"], capture_output=True, text=True
    )
    assert "session opened for user alice" in written.stdout
    assert "session closed for user alice" in written.stdout
