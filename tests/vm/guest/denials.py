"""SELinux denials during the tests: each one that no test asked for is a failure, of the test that it came with.

A plugin (`pytest -p tests.vm.guest.denials`), for guest tests and for others that run inside. The first run reads the audit
log from its beginning, so what was denied before the first test (at the boot, at the installation) counts too. Denials for
which the policy has a dontaudit rule are not in the log, and are no matter here.
"""

import fnmatch
import re
import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import pytest

AUDIT_LOG = Path("/var/log/audit/audit.log")
POSITION = Path("/run/srpc-test-audit-position")
"""Up to where earlier runs have read it."""
AUDIT_USER, NLM_F_REQUEST, NETLINK_AUDIT = 1005, 1, 9
MARK_TIMEOUT = 20.0
"""Seconds for a record to come through kernel and auditd."""

KINDS = ("AVC", "USER_AVC", "SELINUX_ERR")

DEBIANS_OWN = {
    # At each boot, without any of ours.
    "systemd_tmpfiles_t etc_t:lnk_file relabelfrom",
    "systemd_tmpfiles_t user_home_dir_t:dir relabelfrom",
    # When root logs in, and another one has done so before.
    "sshd_t unconfined_t:key search",
    "udev_t sysctl_fs_t:dir search",
    "udev_t udev_t:process setrlimit",
}
"""What Debian 12's policy denies Debian 12."""


@dataclass(frozen=True)
class Denial:
    """A record of the log. source, target: contexts; they and the rest are empty in a SELINUX_ERR, which has `op`."""

    kind: str
    source: str
    target: str
    tclass: str
    permissions: tuple[str, ...]
    op: str
    record: str

    @property
    def rule(self) -> str:
        """As it would stand in a policy: "srpc_gate_t srpc_key_t:file open"; for a SELINUX_ERR "SELINUX_ERR op"."""
        if self.kind == "SELINUX_ERR":
            return f"SELINUX_ERR {self.op}"
        return f"{_type(self.source)} {_type(self.target)}:{self.tclass} {' '.join(self.permissions)}"


def parse(line: str) -> Denial | None:
    """The denial that a line of the audit log tells of; None where it tells of something else."""
    kind = line.partition(" ")[0].removeprefix("type=")
    found = re.search(r"avc: +denied +\{([^}]*)\}", line)
    if kind not in KINDS or (kind != "SELINUX_ERR" and not found):
        return None
    names = ("scontext", "tcontext", "tclass", "op")
    fields = {name: (re.search(rf"\b{name}=(\S+)", line) or ["", ""])[1] for name in names}
    permissions = tuple(found[1].split()) if found else ()
    return Denial(kind, fields["scontext"], fields["tcontext"], fields["tclass"], permissions, fields["op"], line.strip())


def _type(context: str) -> str:
    return context.split(":")[2] if context.count(":") >= 2 else context


class Log:
    """The audit log, read on from where the last reading ended. unexpected: what no test has asked for, or been told of."""

    def __init__(self) -> None:
        self._file = open(AUDIT_LOG, "rb")  # noqa: SIM115  as long as the tests run
        if POSITION.exists():
            self._file.seek(int(POSITION.read_text()))
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_AUDIT)
        self.unexpected: list[Denial] = []

    def read(self) -> list[Denial]:
        """The denials since the last call, all of them: a record that is written after them has been seen."""
        mark = f"srpc-test-{uuid4()}"
        text = mark.encode() + b"\0"
        self._socket.send(struct.pack("=IHHII", 16 + len(text), AUDIT_USER, NLM_F_REQUEST, 0, 0) + text)
        deadline = time.monotonic() + MARK_TIMEOUT
        lines, rest = [], b""
        while True:
            rest += self._file.readline()
            if not rest.endswith(b"\n"):
                if time.monotonic() > deadline:
                    raise RuntimeError(f"the audit log does not take records any more: {mark} has not come")
                time.sleep(0.005)
                continue
            lines.append(rest.decode(errors="replace"))
            rest = b""
            if mark in lines[-1]:
                found = (denial for line in lines if (denial := parse(line)))
                return [denial for denial in found if denial.rule not in DEBIANS_OWN]

    def close(self) -> None:
        """Read no more; another run goes on from here."""
        POSITION.write_text(str(self._file.tell()))
        self._file.close()
        self._socket.close()

    @contextmanager
    def expected(self, *rules: str) -> Iterator[list[Denial]]:
        """See the fixture `expected_denials`."""
        self.unexpected += self.read()
        found: list[Denial] = []
        try:
            yield found
        finally:
            missing = set(rules)
            for denial in self.read():
                fitting = {rule for rule in rules if fnmatch.fnmatchcase(denial.rule, rule)}
                (found if fitting else self.unexpected).append(denial)
                missing -= fitting
        if missing:
            pytest.fail(f"expected denials that did not come: {sorted(missing)}; there were {[each.rule for each in found]}")

    def look(self, when: str) -> None:
        """Fail the test where there was an unexpected denial."""
        self.unexpected += self.read()
        if self.unexpected:
            records = "\n".join(each.record for each in self.unexpected)
            self.unexpected = []
            pytest.fail(f"SELinux denied what no test expected, {when}:\n{records}", pytrace=False)


_log = pytest.StashKey[Log]()
_last = pytest.StashKey[list[Denial]]()


def pytest_configure(config: pytest.Config) -> None:
    """Open the log."""
    config.stash[_log] = Log()
    config.stash[_last] = []


def pytest_unconfigure(config: pytest.Config) -> None:
    """Close it."""
    config.stash[_log].close()


@pytest.fixture(autouse=True)
def no_denials(request: pytest.FixtureRequest) -> Iterator[None]:
    """No test makes a denial that it did not expect."""
    log = request.config.stash[_log]
    log.look("before the test, since the one before it")
    yield
    log.look("during the test")


Expected = Callable[..., AbstractContextManager[list[Denial]]]
"""What the fixture is."""


@pytest.fixture
def expected_denials(request: pytest.FixtureRequest) -> Expected:
    """`with expected_denials("srpc_gate_t srpc_key_t:file open", …) as found:` what is in the block has to be denied.

    Each pattern (fnmatch) is compared with `Denial.rule`, and has to fit at least one record; records that fit one are no
    failure. After the block they are in `found`.
    """
    return request.config.stash[_log].expected


def pytest_sessionfinish(session: pytest.Session) -> None:
    """What came after the last test fails the run."""
    log = session.config.stash[_log]
    session.config.stash[_last] = log.unexpected + log.read()
    if session.config.stash[_last] and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Show it."""
    if config.stash[_last]:
        terminalreporter.section("denials after the last test", red=True)
        for denial in config.stash[_last]:
            terminalreporter.line(denial.record)
