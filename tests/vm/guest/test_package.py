"""The Debian package's life in a system that has never seen it: installed, used as the documents say, upgraded, purged.

The tests are in the order of that life, and each needs those before it. They run in a machine of their own.
"""

import hashlib
import json
import os
import pty
import re
import socket
import stat
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.vm.guest.denials import Expected

CHECKOUT = Path(__file__).resolve().parents[3]
CONFIGURATION = Path("/etc/srpc/srpcd.toml")
SOCKET = "/run/srpc/srpc.sock"

START = 180.0
"""Seconds for the service to be up, emulated."""

ELSEWHERE = (
    "/dev",
    "/home",
    "/proc",
    "/root",
    "/run",
    "/sys",
    "/tmp",
    "/usr/local",
    "/var/cache",
    "/var/lib/apt",
    "/var/log",
)
"""Directories of others: what is there changes by itself, or is these tests' own."""
OTHERS = (
    *("/etc/passwd-", "/etc/group-", "/etc/shadow-", "/etc/gshadow-", "/etc/subuid-", "/etc/subgid-", "/etc/.pwd.lock"),
    *(
        "/var/lib/dpkg/status-old",
        "/var/lib/dpkg/available-old",
        "/var/lib/dpkg/diversions-old",
        "/var/lib/systemd/random-seed",
    ),
    "/var/lib/selinux/default/active/modules/400",  # of the whole store: its contents are compared as a list of modules
)

CALLER = """
import json, select, sys
from srpc_client import blocking
from srpc_client.errors import SrpcError, Unreachable

done, refused, ended = 0, [], []
print("begun", flush=True)
while not select.select([sys.stdin], [], [], 0.3)[0]:
    try:
        with blocking.dial(timeout=60) as connection:
            assert connection.call("/tools/words", b"one two", timeout=60) == b"2\\n"
        done += 1
    except Unreachable as fault:
        refused.append(str(fault))
    except SrpcError as fault:
        ended.append(f"{type(fault).__name__} {fault.code}")
print(json.dumps([done, refused, ended]))
"""


def run(*command: str | Path) -> str:
    """What a command prints, on a terminal of its own, as an administrator's: domains of others may write there."""
    leader, follower = pty.openpty()
    printed = bytearray()

    def listen() -> None:
        try:
            while data := os.read(leader, 65536):
                printed.extend(data)
        except OSError:  # EIO: nobody has the other end any more
            pass

    listener = threading.Thread(target=listen)
    listener.start()
    try:
        environment = {
            "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
            "LC_ALL": "C.UTF-8",
            "TERM": "dumb",
            "DEBIAN_FRONTEND": "noninteractive",
        }
        status = subprocess.run(
            command, stdin=follower, stdout=follower, stderr=follower, env=environment, check=False
        ).returncode
    finally:
        os.close(follower)
        listener.join()
        os.close(leader)
    text = printed.decode(errors="replace").replace("\r\n", "\n")
    assert status == 0, f"{command}: status {status}\n{text}"
    return text


def quiet(*command: str) -> str:
    """What a command prints on standard output; its status is no matter."""
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=False).stdout


@pytest.fixture(scope="module")
def package() -> Path:
    """The package to install."""
    (found,) = (CHECKOUT / "dist").glob("srpc_*.deb")
    return found


class System:
    """What a system consists of: files with their kinds, modes and owners, those below /etc with their contents; units,
    SELinux modules and booleans, and what listens."""

    def __init__(self) -> None:
        self.files = dict(self._files())
        self.units = quiet("systemctl", "list-unit-files", "--no-legend")
        self.policy = quiet("semodule", "--list=full") + quiet("getsebool", "-a")
        self.contexts = quiet("matchpathcon", "/etc/srpc", "/srv/rpc", "/usr/sbin/srpcd", "/usr/lib/srpc/bin/srpcd")
        self.listening = "7443" in quiet("ss", "-Hltn"), SOCKET in quiet("ss", "-Hlxn")

    @staticmethod
    def _files() -> Iterator[tuple[str, tuple[object, ...]]]:
        for top, directories, names in os.walk("/"):
            directories[:] = [each for each in directories if os.path.join(top, each) not in ELSEWHERE]
            for path in (os.path.join(top, each) for each in (*directories, *names)):
                if path.startswith(OTHERS):
                    continue
                found = os.lstat(path)
                content = ""
                if (
                    path.startswith("/etc/")
                    and stat.S_ISREG(found.st_mode)
                    and not path.startswith("/etc/selinux/default/policy/")
                ):
                    content = hashlib.sha256(Path(path).read_bytes()).hexdigest()
                yield path, (stat.filemode(found.st_mode), found.st_uid, found.st_gid, content)


@pytest.fixture(scope="module")
def before() -> System:
    """The system as it was before anything."""
    assert "srpc" not in quiet("dpkg-query", "--show"), "the package is installed already"
    return System()


def state(unit: str) -> tuple[str, str]:
    """Whether a unit runs, and whether it will after a boot."""
    return quiet("systemctl", "is-active", unit).strip(), quiet("systemctl", "is-enabled", unit).strip()


def ready() -> tuple[str, str]:
    """The state of the service, once it does not change any more: a slow machine may need more than one start."""
    deadline = time.monotonic() + START
    while (found := state("srpcd.service"))[0] in ("activating", "failed") and time.monotonic() < deadline:
        time.sleep(0.5)
    return found


def steps(document: str) -> list[tuple[str, str, str]]:
    """What a document says about the first call: (prompt, command, what is printed); nothing where it says nothing."""
    text = (CHECKOUT / document).read_text(encoding="utf-8")
    found: list[tuple[str, str, str]] = []
    for block in re.findall(r"^```\n(# install -d .*?)^```$", text, re.MULTILINE | re.DOTALL):
        for line in filter(None, block.splitlines()):
            if line[:2] in ("# ", "$ "):
                found.append((line[0], line[2:], ""))
            else:
                found[-1] = (*found[-1][:2], f"{found[-1][2]}{line}\n")
    return found


def test_it_is_installed_without_network_and_the_service_runs(before: System, package: Path) -> None:
    run("apt-get", "install", "--yes", package)
    assert state("srpcd.socket") == ("active", "enabled")
    assert ready() == ("active", "enabled")
    assert not before.listening[0]
    assert System().listening == (True, True)
    assert quiet("dpkg", "--verify", "srpc") == ""


def test_selinux_has_the_module_and_the_files_have_their_labels() -> None:
    assert "srpc" in quiet("semodule", "-l").split()
    places = ("/etc/srpc", "/run/srpc", "/srv/rpc", "/usr/lib/srpc", "/usr/sbin/srpcd", "/var/lib/srpc")
    assert quiet("restorecon", "-R", "-n", "-v", *places) == ""
    pid = quiet("systemctl", "show", "--value", "--property=MainPID", "srpcd").strip()
    assert Path(f"/proc/{pid}/attr/current").read_text().split(":")[2] == "srpcd_t"


@pytest.mark.parametrize("document", ["docs/install.md", *(["README.md"] if steps("README.md") else [])])
def test_the_first_call_in_a_fresh_shell_is_as_the_document_says(document: str) -> None:
    told = steps(document)
    assert {"#", "$"} == {prompt for prompt, _, _ in told}
    for prompt, command, printed in told:
        if prompt == "#":
            run("/bin/sh", "-c", command)
        else:
            assert run("/usr/sbin/runuser", "--login", "alice", "--command", command) == printed, command


def test_the_shell_completes_the_command() -> None:
    words = 'COMP_WORDS=(srpc wh) COMP_CWORD=1; _srpc_completion srpc; echo "${COMPREPLY[@]}"'
    script = f"source /usr/share/bash-completion/completions/srpc; {words}"
    assert quiet("bash", "--norc", "--noprofile", "-c", script) == "whoami\n"


def test_the_tree_can_be_drawn_with_what_is_in_the_package() -> None:
    drawn = run("/usr/sbin/runuser", "--login", "alice", "--command", "srpc tree")
    assert re.search(r"└── words .* program", drawn)


def test_the_service_says_its_pin_to_the_administrator_and_to_clients() -> None:
    (pin,) = re.findall(
        r"\bpin (sha256:[^\s\"]+)", quiet("systemctl", "status", "--no-pager", "--full", "--lines=0", "srpcd")
    )
    assert run("/usr/bin/srpc", "-a", "127.0.0.1", "pin") == f"{pin}\n"


def test_nothing_is_written_below_the_installation(package: Path) -> None:
    """With all that ran until here."""
    listed = quiet("dpkg-query", "--listfiles", "srpc").split()
    there = [os.path.join(top, each) for top, inner, names in os.walk("/usr/lib/srpc") for each in (*inner, *names)]
    assert set(there) <= set(listed)
    assert quiet("dpkg", "--verify", "srpc") == ""


def test_an_upgrade_refuses_nobody_and_keeps_what_the_administrator_said(package: Path) -> None:
    """To the same version: dpkg does the same, and so do the scripts."""
    with open(CONFIGURATION, "a", encoding="utf-8") as file:
        file.write("# the administrator's own\n")
    key = Path("/var/lib/srpc/key.pem").read_bytes()
    pid = quiet("systemctl", "show", "--value", "--property=MainPID", "srpcd")
    interpreter = ("/usr/sbin/runuser", "-u", "alice", "--", "/usr/lib/srpc/bin/python3", "-I", "-c", CALLER)
    with subprocess.Popen(interpreter, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as caller:
        assert caller.stdout
        assert caller.stdout.readline() == "begun\n"
        run("dpkg", "--install", package)
        assert ready() == ("active", "enabled")
        time.sleep(1)
        done, refused, ended = json.loads(caller.communicate("", timeout=120)[0])
    assert quiet("systemctl", "show", "--value", "--property=MainPID", "srpcd") != pid
    assert refused == []
    # At most the call that was on its way when the daemon was told to end: its one error.
    assert len(ended) <= 1, ended
    assert done > 1
    assert CONFIGURATION.read_text(encoding="utf-8").endswith("# the administrator's own\n")
    assert Path("/var/lib/srpc/key.pem").read_bytes() == key


def test_a_purge_leaves_nothing(before: System, expected_denials: Expected) -> None:
    subprocess.run(["rm", "-r", "/srv/rpc/tools"], check=True)  # what an administrator puts there is the administrator's
    # userdel looks at the roots of all processes, which Debian's policy does not let it do.
    with expected_denials("useradd_t useradd_t:capability sys_ptrace"):
        run("apt-get", "purge", "--yes", "srpc")
    after = System()
    assert {path for path in after.files if path not in before.files} == set()
    assert {path for path in before.files if path not in after.files} == set()
    assert {path for path, facts in before.files.items() if after.files[path] != facts} == set()
    assert after.units == before.units
    assert after.policy == before.policy
    assert after.contexts == before.contexts
    assert after.listening == before.listening
    assert not os.path.lexists("/run/srpc")
    assert not Path("/sys/fs/cgroup/system.slice/srpcd.service").exists()
    assert "srpc" not in quiet("systemctl", "list-units", "--all", "--plain", "--no-legend")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", 7443), 5)
