"""The example of docs/selinux.md: its own commands, as an administrator types them, and then what it promises.

carol is nobody's confined user until the document's commands map her group; alice and bob are mapped by name.
"""

import re
import shutil
from collections.abc import Iterator
from errno import EACCES
from pathlib import Path

import pytest

from srpc_client import blocking
from srpc_client.errors import CallError
from tests.vm.guest.conftest import POLICY, Shell, allowed, run
from tests.vm.guest.denials import Expected
from tests.vm.guest.test_contexts import SEUSERS, TREE, context_of, dial, errno_of, label_of, worker

pytestmark = pytest.mark.usefixtures("modules", "payroll")

DOCUMENT = POLICY.parent / "docs/selinux.md"
SALARIES, PROGRAM = Path("/var/lib/payroll/salaries.csv"), TREE / "payroll/salary"
WANTED = {"alice": b"4200\n", "bob": b"3900\n", "carol": b"5100\n"}
SHELLS = {
    "alice": "staff_u:staff_r:staff_t:s0:c1",
    "bob": "user_u:user_r:user_t:s0:c2",
    "carol": "staff_u:staff_r:staff_t:s0",
}
PROGRAMS = "staff_u:staff_r:payroll_t:s0"


def commands(heading: str) -> str:
    """The commands of the document under a step of the example."""
    _before, found, text = DOCUMENT.read_text(encoding="utf-8").partition(f"**{heading}")
    assert found, heading
    block = re.search(r"```\n(.*?)```", text, re.DOTALL)
    assert block
    return block[1]


def administer(text: str) -> None:
    """Type them, in the directory of the example; but for those that build the whole policy anew, for minutes here."""
    quick = [line for line in text.splitlines() if not line.startswith(("semanage", "semodule"))]
    run("bash", "-ec", "\n".join([f"cd {POLICY}/examples/payroll", *quick]))


@pytest.fixture(scope="module")
def payroll(modules: None) -> Iterator[None]:
    """The example is set up. (Its module is loaded already, with that of the tests.)"""
    before = SEUSERS.read_text(encoding="utf-8")
    assert "semanage login -a -s staff_u -r s0 %payroll" in commands("1. Who.").splitlines()
    assert commands("2. The policy.") == "semodule -i payroll.pp\n"
    administer(commands("1. Who."))
    with SEUSERS.open("a", encoding="utf-8") as file:
        file.write("%payroll:staff_u:s0\n")  # what that semanage writes
    for user in ("alice", "bob"):
        run("usermod", "-a", "-G", "payroll", user)
    administer(commands("3. The files."))
    run("systemctl", "restart", "srpcd")  # nobody has a worker of before
    yield
    administer(commands("5. Away with it:"))
    with SEUSERS.open("r+", encoding="utf-8") as file:  # in its place, with its label
        file.truncate()
        file.write(before)


@pytest.fixture(scope="module")
def others(payroll: None) -> Iterator[None]:
    """Another endpoint, whose handler does what it is told: it prints a file, or starts a program, as its caller."""
    directory = TREE / "other"
    directory.mkdir(mode=0o755)
    program = directory / "handler"
    program.write_text("#!/bin/sh\nread what whom\ncase $what in\n  read) exec cat $whom ;;\n  run) exec $whom ;;\nesac\n")
    program.chmod(0o755)
    yield
    shutil.rmtree(directory)


def refusal(connection: blocking.Connection, what: str, whom: Path) -> str:
    """What the other handler says when it tries."""
    with pytest.raises(CallError) as refused:
        connection.call("/other/handler", f"{what} {whom}\n".encode(), timeout=60)
    return str(refused.value)


def test_each_caller_is_told_what_he_earns_in_the_programs_own_domain() -> None:
    with dial("alice") as alice, dial("carol") as carol:
        assert alice.call("/payroll/salary", b"", timeout=60) == WANTED["alice"]
        assert carol.call("/payroll/salary", b"", timeout=60) == WANTED["carol"]
        assert context_of(worker("carol")) == "staff_u:staff_r:srpc_staff_worker_t:s0"
        assert ":payroll_exec_t:" in (carol.stat("/payroll/salary", timeout=60).context or "")


@pytest.mark.parametrize("user", SHELLS)
def test_file_permissions_let_his_shell_read_the_file_and_it_can_not(user: str, shell: Shell) -> None:
    assert shell(user, "id -Z").stdout.strip() == SHELLS[user]
    assert "payroll" in shell(user, "id -nG").stdout.split()
    assert (SALARIES.stat().st_mode & 0o777, SALARIES.group()) == (0o640, "payroll")
    # No record: Debian's policy does not let users into /var/lib either, and says nothing about it.
    assert "Permission denied" in shell(user, f"cat {SALARIES}").stderr
    assert "Permission denied" in shell(user, f"python3 -I {PROGRAM}").stderr  # the same program, in the shell's domain
    for kind, permission in (("dir", "search"), ("file", "open"), ("file", "read")):
        assert not allowed(SHELLS[user], label_of(SALARIES), kind, permission)
        assert allowed(PROGRAMS, label_of(SALARIES), kind, permission)


def test_his_shell_gets_the_answer_by_calling(shell: Shell) -> None:
    assert shell("carol", "srpc call /payroll/salary").stdout.encode() == WANTED["carol"]


def test_a_handler_of_another_endpoint_that_runs_as_the_same_user_can_not_read_it(
    others: None, expected_denials: Expected
) -> None:
    with dial("carol") as carol:
        carol.call("/other/handler", b"read /etc/passwd\n", timeout=60)
        with expected_denials("srpc_program_t var_lib_t:dir search") as found:
            assert "Permission denied" in refusal(carol, "read", SALARIES)
        for kind, permission in (("dir", "search"), ("file", "open"), ("file", "read")):
            assert not allowed(found[0].source, label_of(SALARIES), kind, permission)
        with expected_denials("srpc_program_t payroll_exec_t:file *"):
            refusal(carol, "run", PROGRAM)


def test_a_boolean_says_whether_the_other_role_may_call(expected_denials: Expected) -> None:
    with dial("bob") as bob:
        with expected_denials("srpc_user_worker_t payroll_exec_t:file execute"):
            assert errno_of(bob, "/payroll/salary") == EACCES
        run("setsebool", "payroll_call_user", "on")
        try:
            assert bob.call("/payroll/salary", b"", timeout=60) == WANTED["bob"]
        finally:
            run("setsebool", "payroll_call_user", "off")


def test_who_is_not_in_the_group_is_refused_by_file_permissions() -> None:
    run("gpasswd", "-d", "alice", "payroll")
    try:
        with dial("alice") as alice:
            assert errno_of(alice, "/payroll/salary") == EACCES
    finally:
        run("usermod", "-a", "-G", "payroll", "alice")
