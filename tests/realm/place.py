"""Where things are: entering the realm, and the directories in it."""

import atexit
import functools
import glob
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tests.realm import accounts, labels, mounts, namespaces

CHECKOUT = Path(__file__).resolve().parents[2]

PYTHON: str = getattr(sys, "_base_executable", sys.executable)
"""The interpreter below the virtual environment: other users can reach it, and it has no site-packages of ours."""

DEPENDENCIES = ("OpenSSL", "cryptography", "_cffi_backend", "msgspec", "pam", "pyseccomp", "six", "click", "rich")

PAM_SERVICES = {
    # Plain, so that a login does what is here and nothing else (common-auth may ask a directory service).
    "srpcd": "auth required pam_unix.so\naccount required pam_unix.so\n",
    "srpcd-common": "auth include common-auth\naccount include common-account\n",
    # A password, then the module's two steps.
    "srpcd-2p": "auth required pam_unix.so\nauth required {module}\naccount required pam_unix.so\n",
    # Nothing is asked, and everybody is let in (or nobody).
    "srpcd-open": "auth required pam_permit.so\naccount required pam_unix.so\n",
    "srpcd-closed": "auth required pam_deny.so\naccount required pam_unix.so\n",
}


@dataclass(frozen=True)
class Place:
    """The realm.

    private: a mount namespace with accounts of its own (else: an ordinary user's temporary directory).
    root: where everything lies. code: the directory that holds srpcd and srpc_client, for `sys.path`; sites: those of the
    packages that they need. temporary: for anybody's files. module: of the PAM service srpcd-2p, None where it can't be.
    """

    private: bool
    root: Path
    code: Path
    sites: tuple[Path, ...]
    temporary: Path
    module: Path | None

    @property
    def path(self) -> list[str]:
        """What a Python program with our code needs on `sys.path`."""
        return [str(self.code), *(str(site) for site in self.sites)]


def missing() -> str:
    """Why there can't be a private realm; empty where there can."""
    if os.geteuid() != 0:
        return "needs root: throwaway users in a private mount namespace"
    if enter().private:
        return ""
    return "needs root with CAP_SYS_ADMIN: throwaway users in a private mount namespace"


@functools.cache
def enter() -> Place:
    """Enter the realm (once; later calls return the same).

    As root, this process must have a single thread, and it is a descendant of the caller that this returns in (see
    `namespaces`).
    """
    private = os.geteuid() == 0 and _own_namespaces()
    mounts.adopt_orphans()
    if private:
        return _private(_mount_point())
    root = Path(tempfile.mkdtemp(prefix="srpc-realm-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    temporary = root / "tmp"
    temporary.mkdir()
    _use_for_temporary_files(temporary)
    return Place(False, root, CHECKOUT, _sites(), temporary, None)


def _own_namespaces() -> bool:
    """Whether there is now a mount namespace of our own at least."""
    if namespaces.enter():
        return True
    try:
        mounts.own_namespace()  # containers without privileges have this right, and may not mount a /proc
    except PermissionError:
        return False
    return True


def install(path: Path, text: str, mode: int, *, uid: int = 0, gid: int = 0) -> Path:
    """Write a program as install(1) would: whole, then at its place. uid, gid: the owner, as root only."""
    make_directories(path.parent)
    new = path.with_name(f".{path.name}.new")
    new.write_text(text, encoding="utf-8")
    if os.geteuid() == 0:
        os.chown(new, uid, gid)
    new.chmod(mode)  # after chown, which takes away set-id bits
    return new.rename(path)


def make_directories(path: Path, mode: int = 0o755) -> None:
    """The directory and those above it, with this mode whatever the umask, where they are missing."""
    if not path.is_dir():
        make_directories(path.parent, mode)
        path.mkdir()
        path.chmod(mode)


def _mount_point() -> Path:
    """A directory that every machine has and that hides nothing of ours when something is mounted on it."""
    needed = [CHECKOUT, Path(sys.prefix), Path(PYTHON), Path.cwd(), *_sites()]
    for name in ("/srv", "/mnt", "/media", "/opt"):
        candidate = Path(name)
        if candidate.is_dir() and not any(each.is_relative_to(candidate) for each in needed):
            return candidate
    raise RuntimeError("the checkout lies below /srv, /mnt, /media and /opt at once")


def _private(root: Path) -> Place:
    sites = _sites()
    mounts.tmpfs(root)
    labels.label(root, "var_t")
    for name, mode in (("etc", 0o755), ("home", 0o755), ("tmp", 0o1777), ("code", 0o755)):
        (root / name).mkdir()
        (root / name).chmod(mode)
        labels.label(root / name, labels.TESTS)
    nscd = Path("/run/nscd")  # a cache that knows the accounts of outside
    if nscd.is_dir():
        mounts.tmpfs(nscd)
    _hide_systemd(root / "systemd")
    # The loaded SELinux policy is the machine's, and so are the files that describe it.
    mounts.overlay(Path("/etc"), root / "etc", live=("selinux",))
    _name_localhost()
    accounts.create(root / "home")
    for person in accounts.PEOPLE:
        home = root / "home" / person.name
        home.mkdir(0o700)
        os.chown(home, accounts.account(person.name).uid, accounts.account(person.name).gid)
    module = compile_module(root / "pam_twostep.so")
    _pam_services(module)
    code = _installed() or _copied_code(root / "code")
    seen = []
    for number, site in enumerate(sites):
        # A bind mount: the packages can be reached though they lie in a directory that is closed for others.
        target = root / f"site{number}"
        target.mkdir()
        mounts.bind(site, target, readonly=True)
        seen.append(target)
    _use_for_temporary_files(root / "tmp")
    return Place(True, root, code, tuple(seen), root / "tmp", module)


def _hide_systemd(instead: Path) -> None:
    """Its part is played by tests, and a daemon that is told things looks whether it is there. Its log stays."""
    real = Path("/run/systemd")
    if real.is_dir():
        for directory in (instead, instead / "journal"):
            directory.mkdir()
            directory.chmod(0o755)
            labels.copy(real, directory)
        if (real / "journal").is_dir():
            mounts.bind(real / "journal", instead / "journal")
        mounts.bind(instead, real)


def _installed() -> Path | None:
    """The directory of the installed product's code, where it is not the checkout's: in the virtual machine."""
    spec = importlib.util.find_spec("srpcd")
    found = Path(spec.origin).parent.parent if spec and spec.origin else CHECKOUT
    return None if found == CHECKOUT else found


def _copied_code(code: Path) -> Path:
    """The checkout's code where other users can read it."""
    for package in ("srpcd", "srpc_client"):
        shutil.copytree(CHECKOUT / package, code / package, ignore=shutil.ignore_patterns("__pycache__"))
    if (CHECKOUT / "docs/examples").is_dir():
        shutil.copytree(CHECKOUT / "docs/examples", code / "examples")
    _open_up(code)
    subprocess.run([PYTHON, "-I", "-m", "compileall", "-q", str(code / "srpcd"), str(code / "srpc_client")], check=True)
    return code


def _sites() -> tuple[Path, ...]:
    """The directories that hold the packages we depend on."""
    found = []
    for name in DEPENDENCIES:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            raise RuntimeError(f"the package {name} is not installed: run `make` once, or pip install -e '.[test]'")
        origin = Path(spec.origin)
        site = origin.parent.parent if spec.submodule_search_locations else origin.parent
        if site not in found:
            found.append(site)
    return tuple(found)


def _open_up(directory: Path) -> None:
    """a+rX: the checkout may have come with a umask of 077."""
    for parent, directories, files in os.walk(directory):
        for name in [*directories, *files]:
            path = Path(parent, name)
            mode = path.stat().st_mode
            path.chmod(0o755 if path.is_dir() or mode & 0o100 else 0o644)


def compile_module(module: Path) -> Path | None:
    """A PAM module of the source here that has its name; None where there is no compiler."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    libpam = next(iter(glob.glob("/lib/*/libpam.so.0") + glob.glob("/lib*/libpam.so.0")), None)
    if not compiler or not libpam:
        return None
    source = Path(__file__).with_name(f"{module.stem}.c")
    command = [compiler, "-shared", "-fPIC", "-nostdlib", "-Wall", "-Wextra", "-Wno-builtin-declaration-mismatch"]
    subprocess.run([*command, "-o", str(module), str(source), libpam], check=True)
    module.chmod(0o644)
    labels.label(module, "lib_t")
    return module


def _name_localhost() -> None:
    """Let the name localhost be known where /etc/hosts is missing or has no such line."""
    hosts = Path("/etc/hosts")
    known = hosts.read_text(encoding="utf-8") if hosts.exists() else ""
    if "localhost" not in known.split():
        hosts.unlink(missing_ok=True)  # it may be a link to a file outside
        hosts.write_text(f"127.0.0.1 localhost\n::1 localhost\n{known}", encoding="utf-8")
        hosts.chmod(0o644)


def _pam_services(module: Path | None) -> None:
    directory = Path("/etc/pam.d")
    for name, text in PAM_SERVICES.items():
        if module or "{module}" not in text:
            (directory / name).write_text(text.format(module=module))
            (directory / name).chmod(0o644)


def _use_for_temporary_files(directory: Path) -> None:
    """For this process and its children: pytest keeps its last three runs where temporary files go."""
    os.environ["TMPDIR"] = tempfile.tempdir = str(directory)
