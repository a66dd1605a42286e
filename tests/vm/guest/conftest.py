"""What several of these tests need: the policy modules of the tests, and shells as people get them by logging in."""

import contextlib
import pwd
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

POLICY = Path(__file__).resolve().parents[3] / "policy"

SELINUX = Path("/sys/fs/selinux")

Shell = Callable[[str, str], "subprocess.CompletedProcess[str]"]
"""`shell(user, command)`: what came of a command line in a shell of theirs."""


def run(*command: str) -> None:
    """As an administrator, who sits at a terminal: what changes the policy may not write into pipes and files of ours."""
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def allowed(source: str, target: str, kind: str, permission: str) -> bool:
    """Whether the policy that is loaded lets one context do this to another. kind: of object, as "file"."""
    number = (SELINUX / f"class/{kind}/index").read_text()
    bit = int((SELINUX / f"class/{kind}/perms/{permission}").read_text()) - 1
    with open(SELINUX / "access", "r+b", buffering=0) as file:  # selinuxfs: one write, one read
        file.write(f"{source} {target} {number}".encode())
        return bool(int(file.read(4096).split()[0], 16) >> bit & 1)


@pytest.fixture(scope="session")
def modules() -> None:
    """The modules of the example and of the tests are loaded: the machine is saved with them, since that takes a while."""
    wanted = ("payroll", "srpctest")
    loaded = subprocess.run(
        ["semodule", "-l"], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True
    ).stdout.split()
    if not {*wanted} <= {*loaded}:
        run("semodule", "-i", *(str(POLICY / f"{name}.pp") for name in wanted))


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    """Over sshd, which puts them into the domain of their role as any login does; for each user one connection."""
    directory = tmp_path_factory.mktemp("ssh")
    key = directory / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    options = [f"-o{each}" for each in ("StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "LogLevel=ERROR")]
    options += ["-oControlMaster=auto", f"-oControlPath={directory}/%r", "-oControlPersist=yes", "-oBatchMode=yes"]
    homes: dict[str, Path] = {}

    def login(user: str, command: str) -> "subprocess.CompletedProcess[str]":
        if user not in homes:
            entry = pwd.getpwnam(user)
            homes[user] = place = Path(entry.pw_dir, ".ssh")
            place.mkdir(mode=0o700, exist_ok=True)
            shutil.copy(key.with_suffix(".pub"), place / "authorized_keys")
            for path in (place, place / "authorized_keys"):
                shutil.chown(path, entry.pw_uid, entry.pw_gid)
            run("restorecon", "-RF", str(place))
        arguments = ["ssh", "-F", "none", "-i", str(key), *options, f"{user}@127.0.0.1", command]
        with open(
            directory / "err", "w+", encoding="utf-8"
        ) as errors:  # a file: the connection that stays would hold a pipe
            done = subprocess.run(arguments, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, text=True)
            errors.seek(0)
            done.stderr = errors.read()
        return done

    yield login
    for user, place in homes.items():
        with contextlib.suppress(OSError):
            subprocess.run(["ssh", "-F", "none", *options, "-O", "exit", f"{user}@127.0.0.1"], capture_output=True)
        shutil.rmtree(place)
