"""What can be said of SELinux where there is none: contexts as text, the kernel's protocol, and that whatever fails refuses.

What the policy decides is tested where there is one, in `tests/vm/guest`.
"""

import asyncio
import contextlib
import os
import resource
import signal
import socket
import struct
from collections.abc import Callable
from errno import EACCES, EINVAL, ENOMEM, EPERM
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from srpc_client import level
from srpcd import confine, selinux
from srpcd.config import Authentication
from srpcd.monitor import accounts, authentication, connections, contexts, launch
from srpcd.monitor.endpoints import Endpoints
from srpcd.monitor.lines import Announcement, Endpoint, Register
from srpcd.monitor.monitor import Monitor
from srpcd.monitor.probe import probe
from tests.realm import finish, processes, python, until

DAEMON = "system_u:system_r:srpcd_t:s0"
STAFF = "staff_u:staff_r:srpc_staff_worker_t:s0:c1,c5.c9"
PIPE = "system_u:object_r:srpc_endpoint_t:s0"

needs_no_selinux = pytest.mark.skipif(Path("/sys/fs/selinux/enforce").exists(), reason="is about a kernel without SELinux")


# --- contexts as text -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("context", "domain"),
    [(DAEMON, "srpcd_t"), (STAFF, "srpc_staff_worker_t"), ("u:r:t", "t"), ("kernel", ""), ("", ""), ("unconfined", "")],
)
def test_the_domain_is_the_third_word(context: str, domain: str) -> None:
    assert selinux.domain(context) == domain


@pytest.mark.parametrize(
    ("context", "changed"),
    [
        (DAEMON, "system_u:system_r:srpc_gate_t:s0"),
        (STAFF, "staff_u:staff_r:srpc_gate_t:s0:c1,c5.c9"),
        ("u:r:t", "u:r:srpc_gate_t"),  # a policy without levels
        ("", ""),
    ],
)
def test_another_domain_leaves_user_role_and_level_alone(context: str, changed: str) -> None:
    assert selinux.with_domain(context, selinux.GATE) == changed


# --- where the daemon runs --------------------------------------------------------------------------------------------


@pytest.fixture
def selinuxfs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that looks like the kernel's, with the classes that matter and an enforcing policy."""
    for kind, number, permissions in (("dir", 7, {"search": 23}), ("fifo_file", 13, {"read": 2, "write": 3, "open": 18})):
        (tmp_path / "class" / kind / "perms").mkdir(parents=True)
        (tmp_path / "class" / kind / "index").write_text(str(number))
        for name, bit in permissions.items():
            (tmp_path / "class" / kind / "perms" / name).write_text(str(bit))
    (tmp_path / "enforce").write_text("1")
    (tmp_path / "status").write_bytes(status())
    monkeypatch.setattr(selinux, "SELINUXFS", str(tmp_path))
    return tmp_path


def status(enforcing: int = 1, policyload: int = 1) -> bytes:
    """The kernel's status page: version, sequence, enforcing, policyload, deny_unknown."""
    return struct.pack("=5I", 1, 2 * policyload, enforcing, policyload, 0)


def run_in(monkeypatch: pytest.MonkeyPatch, context: str) -> None:
    """Let this process seem to run in a context."""
    monkeypatch.setattr(confine, "context", lambda: context)


@needs_no_selinux
def test_without_selinux_there_is_no_context() -> None:
    assert selinux.own_context() == ""


@pytest.mark.usefixtures("selinuxfs")
def test_a_daemon_in_its_own_domain_knows_its_context(monkeypatch: pytest.MonkeyPatch) -> None:
    run_in(monkeypatch, DAEMON)
    assert selinux.own_context() == DAEMON


@pytest.mark.usefixtures("selinuxfs")
@pytest.mark.parametrize(
    "context",
    [
        "unconfined_u:unconfined_r:unconfined_t:s0-s0:c0.c1023",  # from a shell
        "system_u:system_r:initrc_t:s0",  # ExecStart=/usr/bin/python3 ..., or no label on the program
        "system_u:system_r:unconfined_service_t:s0",
        "system_u:srpcd_t:other_t:s0",
        "srpcd_t",
        "",
    ],
)
def test_a_daemon_in_another_domain_does_not_start(monkeypatch: pytest.MonkeyPatch, context: str) -> None:
    run_in(monkeypatch, context)
    with pytest.raises(selinux.Misplaced, match=r"start it through systemd.*restorecon.*semodule"):
        selinux.own_context()


@pytest.mark.usefixtures("selinuxfs")
def test_before_a_policy_is_loaded_selinux_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    run_in(monkeypatch, "kernel")
    assert selinux.own_context() == ""


def test_a_daemon_from_which_selinux_is_hidden_does_not_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(selinux, "SELINUXFS", str(tmp_path / "none"))
    run_in(monkeypatch, DAEMON)
    with pytest.raises(selinux.Misplaced, match="hidden"):
        selinux.own_context()


def test_not_to_know_whether_selinux_is_on_is_no_reason_to_go_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(selinux, "SELINUXFS", str(tmp_path / "file"))  # ENOTDIR, in the place of EACCES
    run_in(monkeypatch, DAEMON)
    with pytest.raises(NotADirectoryError):
        selinux.own_context()


def test_a_daemon_that_can_not_ask_the_policy_does_not_start(monkeypatch: pytest.MonkeyPatch, selinuxfs: Path) -> None:
    run_in(monkeypatch, DAEMON)
    (selinuxfs / "status").unlink()
    with pytest.raises(FileNotFoundError):
        selinux.own_context()


# --- questions to the policy ------------------------------------------------------------------------------------------


class Kernel:
    """Answers as the kernel does (security/selinux/selinuxfs.c: sel_write_access). allowed: (class, permissions)."""

    def __init__(self, allowed: int, flags: int = 0) -> None:
        self.allowed = allowed
        self.flags = flags
        self.asked: list[tuple[str, str, int]] = []
        self.then: Callable[[], object] = lambda: None

    def __call__(self, name: str, request: str) -> str:
        assert name == "access"
        source, target, number, _wanted = request.split(" ")  # "%s %s %hu", and what more there is
        self.asked.append((source, target, int(number)))
        self.then()
        return f"{self.allowed:x} ffffffff 0 fffffffb 42 {self.flags:x}"


SEARCH, READ, WRITE, OPEN = 1 << 22, 1 << 1, 1 << 2, 1 << 17


@pytest.fixture
def kernel(selinuxfs: Path, monkeypatch: pytest.MonkeyPatch) -> Kernel:
    """One whose policy lets read and open."""
    made = Kernel(READ | OPEN)
    monkeypatch.setattr(selinux, "_ask", made)
    return made


def test_the_policy_is_asked_about_all_permissions_of_a_class(kernel: Kernel) -> None:
    assert selinux.permits(STAFF, PIPE, "fifo_file", "open", "read")
    assert not selinux.permits(STAFF, PIPE, "fifo_file", "open", "write")
    assert not selinux.permits(STAFF, PIPE, "fifo_file", "write")
    assert not selinux.permits(STAFF, PIPE, "dir", "search")
    assert kernel.asked == [(STAFF, PIPE, 13)] * 3 + [(STAFF, PIPE, 7)]


def test_what_the_kernel_would_let_pass_is_permitted(kernel: Kernel, selinuxfs: Path) -> None:
    kernel.flags = 1  # this domain alone is permissive
    assert selinux.permits(STAFF, PIPE, "fifo_file", "write")
    kernel.flags = 0
    (selinuxfs / "status").write_bytes(status(enforcing=0))
    assert selinux.permits(STAFF, PIPE, "fifo_file", "write")


@pytest.mark.parametrize("context", ["", "a b", f"{STAFF} {PIPE}", f"{STAFF}\n", f"{STAFF}\t13"])
def test_a_context_that_is_not_one_word_is_never_asked_about(kernel: Kernel, context: str) -> None:
    assert not selinux.permits(context, PIPE, "fifo_file", "open")
    assert not selinux.permits(STAFF, context, "fifo_file", "open")
    assert kernel.asked == []


def test_an_answer_from_between_two_policies_does_not_count(kernel: Kernel, selinuxfs: Path) -> None:
    loads = iter(range(2, 100))
    kernel.then = lambda: (selinuxfs / "status").write_bytes(status(policyload=next(loads)))
    with pytest.raises(BlockingIOError):
        selinux.permits(STAFF, PIPE, "fifo_file", "open")
    kernel.then = lambda: None
    assert selinux.permits(STAFF, PIPE, "fifo_file", "open")


@pytest.mark.parametrize(("kind", "permission"), [("nonesuch", "open"), ("fifo_file", "nonesuch")])
@pytest.mark.usefixtures("kernel")
def test_a_class_or_permission_that_there_is_none_of_is_not_permitted(kind: str, permission: str) -> None:
    with pytest.raises(FileNotFoundError):
        selinux.permits(STAFF, PIPE, kind, permission)


def test_a_policy_load_a_boolean_and_a_change_of_mode_all_change_the_status(selinuxfs: Path) -> None:
    before = selinux.status()
    for changed in (status(policyload=2), status(enforcing=0)):
        (selinuxfs / "status").write_bytes(changed)
        assert selinux.status() != before
    (selinuxfs / "status").write_bytes(b"")
    with pytest.raises(OSError, match="too short"):
        selinux.status()


@pytest.fixture
def attributes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What is written to /proc/thread-self/attr."""
    written: list[tuple[str, str]] = []
    monkeypatch.setattr(selinux, "_set", lambda *pair: written.append(pair))
    return written


def test_a_label_for_new_files_is_taken_back_whatever_happens(attributes: list[tuple[str, str]]) -> None:
    made, undone = [("fscreate", PIPE), ("sockcreate", PIPE)], [("fscreate", "\n"), ("sockcreate", "\n")]
    with selinux.creating(PIPE):
        assert attributes == made
    with pytest.raises(ZeroDivisionError), selinux.creating(PIPE):
        raise ZeroDivisionError
    assert attributes == [*made, *undone] * 2
    with selinux.creating(""):
        pass
    assert len(attributes) == 8


def test_a_label_for_new_files_can_be_taken_back_when_no_descriptor_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else all that is made from then on would carry it: whoever has the monitor run out of them would end all service."""
    monkeypatch.setattr(selinux, "ATTRIBUTES", str(tmp_path))
    files = [tmp_path / "fscreate", tmp_path / "sockcreate"]
    for file in files:
        file.touch()
    held: list[int] = []
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        with selinux.creating(PIPE):
            assert [file.read_text() for file in files] == [PIPE, PIPE]
            resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20, limits[1]))
            with contextlib.suppress(OSError):  # EMFILE, soon
                while len(held) < 100:
                    held.append(os.open("/dev/null", os.O_RDONLY))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for fd in held:
            os.close(fd)
    assert len(held) < 100
    assert [file.read_text() for file in files] == ["\n" + PIPE[1:]] * 2  # files; the kernel's know no rest


@needs_no_selinux
def test_what_can_not_be_told_to_the_kernel_is_an_error() -> None:
    with pytest.raises(OSError), selinux.creating(PIPE):  # noqa: PT011
        pytest.fail("went on without a label")
    with pytest.raises(OSError):  # noqa: PT011
        selinux.set_exec(STAFF)


# --- whose context ----------------------------------------------------------------------------------------------------


class Policy:
    """A policy as the kernel and libselinux tell it: which contexts are valid, who is which SELinux user.

    then: done after each question to the kernel.
    """

    def __init__(self, *valid: str) -> None:
        self.valid = set(valid)
        self.mapping = ("staff_u", "s0:c1")
        self.then: Callable[[], object] = lambda: None

    def canonical(self, context: str) -> str:
        """What /sys/fs/selinux/context answers."""
        found = context if context in self.valid else ""
        self.then()
        if not found:
            raise OSError(EINVAL, os.strerror(EINVAL))
        return found.replace("s0-s0", "s0")


@pytest.fixture
def policy(monkeypatch: pytest.MonkeyPatch, selinuxfs: Path) -> Policy:
    """One in which staff_u has the roles staff_r and sysadm_r, as Debian's."""
    roles = ("staff_r:staff_t", "staff_r:srpc_staff_worker_t", "sysadm_r:sysadm_t", "sysadm_r:srpc_sysadm_worker_t")
    made = Policy(*(f"staff_u:{each}:s0:c1" for each in roles))
    (selinuxfs / "users").mkdir()
    monkeypatch.setattr(selinux, "canonical", made.canonical)
    monkeypatch.setattr(contexts, "_mapping", lambda _user: (*made.mapping, str(selinuxfs / "users")))
    return made


ALICE, ADMIN = "staff_u:staff_r:srpc_staff_worker_t:s0:c1", "staff_u:sysadm_r:srpc_sysadm_worker_t:s0:c1"


def test_a_worker_has_the_role_with_the_least_privilege_that_its_user_has(policy: Policy) -> None:
    assert contexts.worker_context("alice", DAEMON) == ALICE
    policy.valid |= {"staff_u:user_r:user_t:s0:c1", "staff_u:user_r:srpc_user_worker_t:s0:c1"}
    assert contexts.worker_context("alice", DAEMON) == "staff_u:user_r:srpc_user_worker_t:s0:c1"
    policy.valid = {"staff_u:sysadm_r:sysadm_t:s0:c1", ADMIN}
    assert contexts.worker_context("alice", DAEMON) == ADMIN


def test_a_role_whose_worker_there_is_none_of_is_no_reason_to_take_the_next(policy: Policy) -> None:
    """As libselinux would: an ordinary administrator would call with all the rights of his second role."""
    policy.valid.remove(ALICE)
    with pytest.raises(contexts.Unmapped, match="staff_u:staff_r:srpc_staff_worker_t:s0:c1 is not valid"):
        contexts.worker_context("alice", DAEMON)


def test_a_worker_runs_as_the_kernel_writes_it(policy: Policy) -> None:
    policy.mapping = ("staff_u", "s0-s0:c1")
    policy.valid = {each.replace("s0:c1", "s0-s0:c1") for each in policy.valid}
    assert contexts.worker_context("alice", DAEMON) == ALICE


def test_a_policy_without_levels_has_contexts_without_them(policy: Policy) -> None:
    policy.mapping = ("staff_u", "")
    policy.valid = {"staff_u:staff_r:staff_t", "staff_u:staff_r:srpc_staff_worker_t"}
    assert contexts.worker_context("alice", DAEMON) == "staff_u:staff_r:srpc_staff_worker_t"


@pytest.mark.parametrize("mapping", [("nonesuch_u", "s0:c1"), ("staff_u", "s0:c99"), ("staff_u", ""), ("guest_u", "s0")])
def test_whoever_has_no_role_with_a_worker_has_no_context(policy: Policy, mapping: tuple[str, str]) -> None:
    policy.valid.add("guest_u:guest_r:guest_t:s0")
    policy.mapping = mapping
    with pytest.raises(contexts.Unmapped, match=f"no SELinux context: .*{mapping[0]} has, at level .*, none of the roles"):
        contexts.worker_context("alice", DAEMON)


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("system_r:srpcd_t:s0\tsysadm_r:srpc_sysadm_worker_t:s0", ADMIN),  # the level is the login's
        ("system_r:srpcd_t  sysadm_r:srpc_sysadm_worker_t staff_r:srpc_staff_worker_t", ADMIN),
        ("system_r:srpcd_t:s0\tsysadm_r:sysadm_t:s0", "or no worker's"),
        ("system_r:srpcd_t:s0\tstaff_r:srpc_nonesuch_worker_t:s0 sysadm_r:srpc_sysadm_worker_t:s0", "is not valid"),
        ("system_r:srpcd_t:s0\tjunk", "is not valid"),
        ("system_r:srpcd_t:s0", ALICE),  # names nothing
        ("system_r:sshd_t:s0\tsysadm_r:srpc_sysadm_worker_t:s0", ALICE),
        ("#system_r:srpcd_t:s0\tsysadm_r:srpc_sysadm_worker_t:s0", ALICE),
    ],
)
def test_the_first_context_of_the_line_for_the_daemon_counts_and_no_other(
    policy: Policy, selinuxfs: Path, line: str, found: str
) -> None:
    (selinuxfs / "users/staff_u").write_text(f"system_r:crond_t:s0\tsysadm_r:srpc_sysadm_worker_t:s0\n\n{line}\n")
    policy.valid.add("staff_u:sysadm_r:other_t:s0:c1")
    if found.startswith("staff_u"):
        assert contexts.worker_context("alice", DAEMON) == found
    else:
        with pytest.raises(contexts.Unmapped, match=found):
            contexts.worker_context("alice", DAEMON)


@pytest.mark.usefixtures("policy")
def test_a_file_of_the_users_that_can_not_be_read_is_not_passed_over(selinuxfs: Path) -> None:
    (selinuxfs / "users/staff_u").mkdir()
    with pytest.raises(contexts.Unmapped, match="directory"):
        contexts.worker_context("alice", DAEMON)


@pytest.mark.parametrize("errno", [EACCES, EPERM, ENOMEM])
def test_a_kernel_that_does_not_answer_has_not_said_no(policy: Policy, monkeypatch: pytest.MonkeyPatch, errno: int) -> None:
    """Else the role above the user's own one would be taken."""

    def canonical(context: str) -> str:
        if ":staff_r:" in context:
            raise OSError(errno, os.strerror(errno))
        return policy.canonical(context)

    monkeypatch.setattr(selinux, "canonical", canonical)
    with pytest.raises(contexts.Unmapped, match=os.strerror(errno)):
        contexts.worker_context("alice", DAEMON)


def test_of_two_policies_none_gives_what_both_would_not(policy: Policy, selinuxfs: Path) -> None:
    """The old one has staff_r and sysadm_r for her, the new one user_r and sysadm_r: between them only sysadm_r is left."""
    after = {"staff_u:user_r:user_t:s0:c1", "staff_u:user_r:srpc_user_worker_t:s0:c1", ADMIN}
    after.add("staff_u:sysadm_r:sysadm_t:s0:c1")

    def load() -> None:
        policy.valid = after
        (selinuxfs / "status").write_bytes(status(policyload=2))

    policy.then = load
    assert contexts.worker_context("alice", DAEMON) == "staff_u:user_r:srpc_user_worker_t:s0:c1"
    loads = iter(range(3, 100))
    policy.then = lambda: (selinuxfs / "status").write_bytes(status(policyload=next(loads)))
    with pytest.raises(contexts.Unmapped, match="being changed"):
        contexts.worker_context("alice", DAEMON)


@needs_no_selinux
async def test_a_user_without_a_context_is_refused_before_anything_else_counts() -> None:
    """By the real libselinux, which finds no policy here, in the child that looks users up."""
    account = await accounts.look_up("nobody", DAEMON)
    assert account is not None
    assert account.identity.context == ""
    assert "no SELinux context" in account.unmapped
    allowed = account._replace(identity=account.identity._replace(uid=20_000), login=True)
    for network in (True, False):
        refusal = authentication.policy(allowed, Authentication(allow=["nobody"]), frozenset(), network)
        assert refusal == account.unmapped
    assert authentication.policy(allowed._replace(unmapped=""), Authentication(), frozenset(), True) == ""


async def test_where_selinux_is_off_libselinux_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contexts, "worker_context", lambda *_: os._exit(1))  # in the child, a copy of this process
    account = await accounts.look_up("nobody", "")
    assert account is not None
    assert (account.identity.context, account.unmapped) == ("", "")


# --- what is started --------------------------------------------------------------------------------------------------


def test_nothing_is_started_without_a_context_of_its_own() -> None:
    monitor: Any = SimpleNamespace(own=launch.Identity(0, 0, (), DAEMON), table={"worker": launch.Program(("/bin/true",))})
    kind: Any = SimpleNamespace(role="worker")
    with pytest.raises(PermissionError) as refused:
        Monitor.start(monitor, kind, "alice", launch.Drop(launch.Identity(20_000, 20_000, ()), {}))
    assert refused.value.errno == EPERM


async def test_nothing_is_probed_for_somebody_of_unknown_context() -> None:
    endpoints: Any = SimpleNamespace(_monitor=SimpleNamespace(own=launch.Identity(0, 0, (), DAEMON)))
    identity = launch.Identity(20_000, 20_000, ())
    assert (await Endpoints._probe(endpoints, identity, "user:echo", "echo", os.O_RDONLY)).errno == EACCES


def test_an_executable_program_is_executed_itself(tmp_path: Path) -> None:
    for place in ("gate/__main__.py", "worker/__main__.py", "monitor/pamchild.py"):
        file = tmp_path / "srpcd" / place
        file.parent.mkdir(parents=True)
        file.touch(0o755 if "worker" in place else 0o644)
    table = launch.launch_table(str(tmp_path), ["/libraries"])
    assert table["worker"].command == (f"{tmp_path}/srpcd/worker/__main__.py",)
    assert table["gate"].command[1:] == ("-I", "-S", f"{tmp_path}/srpcd/gate/__main__.py")
    assert table["authenticate"].command[1:] == ("-I", "-S", f"{tmp_path}/srpcd/monitor/pamchild.py")


@pytest.mark.parametrize("place", ["gate/__main__.py", "worker/__main__.py", "monitor/pamchild.py"])
def test_the_programs_name_an_interpreter_that_loads_nothing_of_anybodys(place: str) -> None:
    source = Path(confine.__file__).parent / place
    assert source.read_bytes().startswith(b"#!/usr/bin/python3 -IS\n")


@needs_no_selinux
def test_a_context_that_is_not_the_told_one_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    confine.prove_context("")
    with pytest.raises((confine.NotConfined, OSError)):
        confine.prove_context(STAFF)
    for found in ("", DAEMON, STAFF + ",c10", STAFF[:-1], "unconfined"):
        run_in(monkeypatch, found)
        with pytest.raises(confine.NotConfined, match="SELinux context"):
            confine.prove_context(STAFF)
    run_in(monkeypatch, STAFF)
    confine.prove_context(STAFF)


def test_a_program_ends_with_the_monitor_though_the_exec_has_cleared_the_signal() -> None:
    """As after an exec into another domain: nothing is set; then the program sets it again, and its parent dies."""
    read, write = os.pipe()
    parent = os.fork()
    if parent == 0:
        child = os.fork()
        if child == 0:
            confine.end_with(os.getppid(), signal.SIGKILL)
            os.write(write, b"%d" % os.getpid())
            signal.pause()
        signal.pause()
    os.close(write)
    child = int(os.read(read, 20))
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    assert os.read(read, 1) == b""  # nobody has the other end any more
    os.close(read)
    process = processes.look(child)
    assert process is None or until(lambda: not processes.alive(process))


def test_a_program_whose_monitor_is_gone_already_does_not_go_on() -> None:
    code = "from srpcd import confine\nconfine.end_with(1 << 22, 9)\nprint('went on')"
    process = processes.popen_as(None, python(code), stdout=-1, stderr=-1)
    out, error = process.communicate()
    finish(process)
    assert out == b""
    assert b"NotConfined: the monitor's process id" in error


# --- endpoints and lines ----------------------------------------------------------------------------------------------


@needs_no_selinux
async def test_a_policy_that_can_not_be_asked_permits_nothing(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "echo")
    nobody = launch.Drop(None, {})
    proof = await probe(nobody, str(tmp_path), "echo", os.O_WRONLY, None, "")
    assert proof.errno == 0
    for fd in proof.chain:
        os.close(fd)
    proof = await probe(nobody, str(tmp_path), "echo", os.O_WRONLY, None, STAFF)
    assert (proof.errno, proof.chain) == (EACCES, [])
    assert "the policy can't be asked" in proof.reason


@pytest.mark.parametrize(
    ("access", "denied", "errno"),
    [
        (os.O_WRONLY, "", 0),
        (os.O_RDONLY, "", 0),
        (os.O_WRONLY, "fifo_file write", EACCES),
        (os.O_RDONLY, "fifo_file write", 0),
        (os.O_RDONLY, "fifo_file read", EACCES),
        (os.O_WRONLY, "fifo_file read", 0),
        (os.O_RDONLY, "fifo_file open", EACCES),
        (os.O_WRONLY, "closed search", EACCES),  # one directory of the way, and not the last
    ],
)
async def test_a_probe_asks_about_the_pipe_and_each_directory_of_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, access: int, denied: str, errno: int
) -> None:
    (tmp_path / "closed/inner").mkdir(parents=True)
    os.mkfifo(tmp_path / "closed/inner/echo")

    def label(fd: int) -> str:
        return os.readlink(f"/proc/self/fd/{fd}").rpartition("/")[2]

    def permits(source: str, target: str, kind: str, *permissions: str) -> bool:
        assert source == STAFF
        assert kind == ("fifo_file" if target == "echo" else "dir")
        return not any(denied in (f"{kind} {each}", f"{target} {each}") for each in permissions)

    monkeypatch.setattr(selinux, "label", label)
    monkeypatch.setattr(selinux, "permits", permits)
    proof = await probe(launch.Drop(None, {}), str(tmp_path), "closed/inner/echo", access, None, STAFF)
    for fd in proof.chain:
        os.close(fd)
    assert proof.errno == errno
    assert len(proof.chain) == (0 if errno else 4)
    assert bool(errno) == (STAFF in proof.reason)


class Served:
    """A register with an endpoint, a server and a caller. connected: what came of lines: descriptors, or -1."""

    def __init__(self, directory: Path, uid: int) -> None:
        os.mkfifo(directory / "echo")
        self.directory = directory / "lines"
        self.connected: list[int] = []
        self.register: Register[str] = Register(
            str(self.directory), os.getuid(), True, lambda _number, _line, fd: self.connected.append(fd)
        )
        chain = [os.open(directory / name, os.O_PATH) for name in (".", "echo")]
        endpoint = self.register.endpoint("echo", chain, os.getuid())
        assert endpoint is not None
        self.endpoint: Endpoint[str] = endpoint
        self.server = Announcement(1, uid, lambda _line: None, lambda: None)

    def make(self) -> int:
        """A line."""
        caller = (20_000, 20_000, (), STAFF, "alice")
        return self.register.make_line(self.endpoint, self.server, "worker", caller)

    async def connect(self, number: int) -> socket.socket:
        """Connect it, as its service would, and wait until the register has noticed."""
        before, sock = len(self.connected), socket.socket(socket.AF_UNIX)
        sock.connect(str(self.directory / str(self.server.uid) / str(number)))
        async with asyncio.timeout(5):
            while len(self.connected) == before:
                await asyncio.sleep(0.001)
        return sock

    def names(self) -> list[str]:
        """What is left of lines in the file system."""
        return [path.name for path in self.directory.rglob("*") if path.name != str(self.server.uid)]


@pytest.fixture
async def served(tmp_path: Path) -> Any:
    """The same, cleared away."""
    made = Served(tmp_path, os.getuid())
    yield made
    for fd in [*made.endpoint.chain, *(fd for fd in made.connected if fd >= 0)]:
        os.close(fd)
    made.register.close()


async def test_the_socket_of_a_line_is_made_under_the_endpoints_label_and_its_directory_is_not(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[str, str]] = []
    before: list[list[str]] = []

    def record(attribute: str, value: str) -> None:
        told.append((attribute, value))
        before.append(sorted(served.names()))

    monkeypatch.setattr(selinux, "label", lambda fd: PIPE if fd == served.endpoint.chain[-1] else "another")
    monkeypatch.setattr(selinux, "_set", record)
    number = served.make()
    assert told == [("fscreate", PIPE), ("sockcreate", PIPE), ("fscreate", "\n"), ("sockcreate", "\n")]
    assert before == [[], [], [str(number)], [str(number)]]
    assert served.register.lines[number].label == PIPE
    with await served.connect(number) as sock:
        assert f'"context":"{STAFF}"'.encode() in sock.recv(4096)
    assert served.names() == []


@pytest.mark.parametrize("what", ["label", "fscreate", "sockcreate", "clear", "bind"])
async def test_there_is_no_line_where_its_label_fails(
    served: Served, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, what: str
) -> None:
    told: list[str] = []
    before = set(os.listdir("/proc/self/fd"))

    def fail(*_: object) -> Any:
        raise PermissionError(EACCES, what)

    def tell(attribute: str, value: str) -> None:
        told.append(value)
        if (what, value) in ((attribute, PIPE), ("clear", "\n")):
            fail()
        if (what, value) == ("bind", PIPE):
            (served.directory / str(os.getuid()) / "1").mkdir(exist_ok=True)

    monkeypatch.setattr(selinux, "label", fail if what == "label" else lambda _fd: PIPE)
    monkeypatch.setattr(selinux, "_set", tell)
    with pytest.raises(OSError):  # noqa: PT011
        served.make()
    if what == "bind":
        (served.directory / str(os.getuid()) / "1").rmdir()
    assert served.names() == []
    assert served.register.lines == {}
    assert set(os.listdir("/proc/self/fd")) == before
    both = [PIPE, PIPE, "\n", "\n"]
    assert told == {"label": [], "fscreate": [PIPE, "\n", "\n"]}.get(what, both)


def test_a_changed_label_is_a_change_though_no_time_stamp_tells_it(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    labels = dict.fromkeys(served.endpoint.chain, PIPE)
    monkeypatch.setattr(selinux, "label", labels.__getitem__)
    before = served.endpoint.attributes()
    assert served.endpoint.attributes() == before
    for fd in served.endpoint.chain:
        labels[fd] = "system_u:object_r:other_t:s0"
        assert served.endpoint.attributes() != before
        labels[fd] = PIPE


def test_an_endpoint_that_selinux_hides_from_the_daemon_is_a_change_and_no_fault(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever may relabel his pipe could else end the daemon with it."""
    monkeypatch.setattr(selinux, "label", lambda _fd: PIPE)
    before = served.endpoint.attributes()

    def hidden(_fd: int) -> Any:
        raise PermissionError(EACCES, "hidden")

    monkeypatch.setattr(os, "fstat", hidden)
    found = (served.endpoint.attributes(), served.endpoint.mode)
    endpoint = served.register.endpoint("other", [os.open("/dev/null", os.O_PATH)], 0)
    monkeypatch.undo()
    assert found[0] != before
    assert found[1] == 0
    assert endpoint is None


@needs_no_selinux
async def test_a_local_peer_whose_context_the_kernel_does_not_tell_is_not_let_in(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as client:
        listener.bind(str(tmp_path / "sock"))
        listener.listen()
        listener.setblocking(False)
        client.connect(str(tmp_path / "sock"))
        assert connections.accept(listener, 10, True) == []
        assert await asyncio.to_thread(client.recv, 1) == b""
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as client:
        listener.bind(str(tmp_path / "other"))
        listener.listen()
        client.connect(str(tmp_path / "other"))
        listener.setblocking(False)
        ((sock, peer),) = connections.accept(listener, 10, False)
        sock.close()
        assert peer.identity is not None
        assert (peer.identity.uid, peer.identity.context) == (os.getuid(), "")


# --- services ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("context", "wanted"),
    [
        ("unconfined_u:unconfined_r:unconfined_t:s0-s0:c0.c1023", "unconfined_u:unconfined_r:unconfined_t:s0"),
        ("u:r:t:s0:c1-s0:c1.c3", "u:r:t:s0:c1"),
        ("system_u:system_r:ledger_t:s0", ""),
        ("u:r:t", ""),
        ("/usr/bin/man-filter (enforce)", ""),  # of AppArmor
        ("unconfined", ""),
        ("", ""),
    ],
)
def test_a_service_connects_with_the_low_end_of_its_range(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, context: str, wanted: str
) -> None:
    monkeypatch.setattr(level, "ATTRIBUTES", str(tmp_path))
    (tmp_path / "current").write_text(context + "\0")
    (tmp_path / "sockcreate").touch()
    with level.low_level():
        assert (tmp_path / "sockcreate").read_text() == wanted
    assert (tmp_path / "sockcreate").read_text() == ("\n" + wanted[1:] if wanted else "")


def test_a_service_without_selinux_or_whose_policy_forbids_it_connects_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(level, "ATTRIBUTES", str(tmp_path))
    with level.low_level():
        pass
    (tmp_path / "current").write_text("u:r:t:s0-s0:c1\0")
    with level.low_level():
        pass
