"""The realm itself: its accounts log in as they should, its users are who they are, and nothing of it is outside."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests import realm
from tests.realm import Place, processes

pytestmark = pytest.mark.needs_root

LOGIN = """
import json, pam
who = pam.pam()
accepted = who.authenticate(sys.argv[1], sys.argv[2], service=sys.argv[3])
print(json.dumps([accepted, who.code]))
"""

SUCCESS, AUTH_ERR, USER_UNKNOWN, NEW_AUTHTOK_REQD, ACCT_EXPIRED = 0, 7, 10, 12, 13

LOGINS = [
    ("alice", "", "srpcd", SUCCESS),
    ("bob", "", "srpcd", SUCCESS),
    ("carol", "", "srpcd", AUTH_ERR),
    ("dave", "", "srpcd", ACCT_EXPIRED),
    ("erin", "", "srpcd", SUCCESS),  # her shell is the daemon's business
    ("frank", "", "srpcd", NEW_AUTHTOK_REQD),
    ("svc", "", "srpcd", SUCCESS),
    ("svc2", "", "srpcd", SUCCESS),
    ("sysacct", "", "srpcd", SUCCESS),
    ("toor", "", "srpcd", SUCCESS),
    ("root", "", "srpcd", SUCCESS),
    ("nobody", "", "srpcd", SUCCESS),
    ("_srpcd", "", "srpcd", AUTH_ERR),
    ("alice", "wrong", "srpcd", AUTH_ERR),
    ("stranger", "wrong", "srpcd", USER_UNKNOWN),
    ("alice", "", "srpcd-common", SUCCESS),
    ("alice", "wrong", "srpcd-common", AUTH_ERR),
    ("bob", "anything", "srpcd-open", SUCCESS),
    ("dave", "anything", "srpcd-open", ACCT_EXPIRED),
    ("bob", "", "srpcd-closed", AUTH_ERR),
]


def test_each_account_logs_in_through_pam_as_it_should(private_realm: Place) -> None:
    # All at once: a refusal takes pam_unix two seconds.
    started = []
    for user, password, service, _ in LOGINS:
        command = realm.python(LOGIN, user, password or realm.password(user), service)
        started.append(realm.popen_as("root", command, stdout=subprocess.PIPE))
    found = []
    for process in started:
        stdout, _ = process.communicate(timeout=20)
        realm.finish(process)
        found.append(json.loads(stdout))
    assert found == [[code == SUCCESS, code] for *_, code in LOGINS]


def test_the_module_with_several_prompts_is_there(private_realm: Place) -> None:
    if not private_realm.module:
        pytest.skip("needs a C compiler: a PAM conversation of several prompts")
    assert "pam_twostep.so" in Path("/etc/pam.d/srpcd-2p").read_text()


@pytest.mark.parametrize("user", ["alice", "bob", "svc", "sysacct"])
def test_a_process_of_a_user_is_that_user_and_no_more(private_realm: Place, user: str) -> None:
    who = realm.account(user)
    facts = realm.run_as(user, ["/bin/cat", "/proc/self/status"], check=True).stdout.decode()
    status = {key: value.split() for key, _, value in (line.partition(":") for line in facts.splitlines())}
    assert status["Uid"] == [str(who.uid)] * 4
    assert status["Gid"] == [str(who.gid)] * 4
    assert sorted(map(int, status["Groups"])) == sorted([who.gid, *(realm.group(each) for each in who.groups)])
    for kind in ("CapInh", "CapPrm", "CapEff", "CapAmb"):
        assert int(status[kind][0], 16) == 0


def test_what_a_user_sees_of_the_code_is_the_copy(private_realm: Place) -> None:
    code = "import srpcd.ipc, OpenSSL, msgspec; print(srpcd.ipc.__file__, srpcd.ipc.__cached__)"
    place, compiled = realm.run_as("bob", realm.python(code), check=True).stdout.decode().split()
    assert place == str(private_realm.code / "srpcd/ipc.py")
    assert os.path.exists(compiled)


def test_groups_can_be_changed(private_realm: Place) -> None:
    before = realm.account("bob").groups
    try:
        realm.change("bob", groups=("calc",))
        assert b"(calc)" in realm.run_as("root", ["/usr/bin/id", "bob"], check=True).stdout
    finally:
        realm.change("bob", groups=before)
    assert b"(calc)" not in realm.run_as("root", ["/usr/bin/id", "bob"], check=True).stdout


def test_an_acl_grants_one_user_and_can_be_taken_away(open_directory: Path, private_realm: Place) -> None:
    file = open_directory / "file"
    file.write_text("text")
    file.chmod(0o640)
    realm.grant(file, "r", uid=realm.account("bob").uid)
    assert realm.run_as("bob", ["/bin/cat", str(file)]).stdout == b"text"
    assert realm.run_as("alice", ["/bin/cat", str(file)]).returncode
    realm.grant(file, "", uid=realm.account("bob").uid)
    assert realm.run_as("bob", ["/bin/cat", str(file)]).returncode
    realm.strip(file)
    assert file.stat().st_mode & 0o777 == 0o640
    assert os.listxattr(file) == []


def test_nothing_of_it_is_outside(private_realm: Place) -> None:
    outside = Path(f"/proc/{os.getppid()}")  # whoever started the tests is in the namespace that they came from
    assert os.readlink(outside / "ns/mnt") != os.readlink("/proc/self/ns/mnt")
    assert str(private_realm.root / "home") not in (outside / "root/etc/passwd").read_text()
    mounts = (outside / "mountinfo").read_text().splitlines()
    assert [line for line in mounts if line.split()[4] in ("/etc/passwd", "/etc/pam.d", str(private_realm.root))] == []


def test_a_command_that_takes_too_long_is_ended(private_realm: Place) -> None:
    with pytest.raises(AssertionError, match="took over"):
        realm.run_as("alice", ["/bin/sh", "-c", "sleep 60 & wait"], timeout=0.3)
    assert processes.until(lambda: not [each for each in realm.descendants(os.getpid()) if processes.alive(each)])
