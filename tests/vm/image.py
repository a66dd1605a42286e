"""The image: Debian 12 from its packages, test accounts, SELinux enforcing, labelled; the product is not in it.

It is built once: the cache goes by the hash of all that it is made from (this file, and the Python packages' names).
"""

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
CACHE = CHECKOUT / ".vm"

SUITE = "bookworm"
PACKAGES = (
    *("systemd", "systemd-sysv", "dbus", "udev", "linux-image-cloud-amd64", "cron", "openssh-server", "iproute2"),
    *("selinux-policy-default", "policycoreutils", "policycoreutils-python-utils", "semodule-utils", "auditd"),
    *(
        "python3",
        "libpam-modules",
        "libpam-runtime",
        "libseccomp2",
        "passwd",
        "openssl",
        "acl",
        "procps",
        "psmisc",
        "strace",
    ),
)
HOST_PACKAGES = ("mmdebstrap", "qemu-system-x86", "qemu-utils", "openssh-client", "e2fsprogs")

POLICY_MODULES = (
    *("apt", "auditadm", "base", "bind", "bootloader", "cgroup", "chronyd", "clamav", "clock", "cron", "dbadm", "dhcp"),
    *("dmidecode", "getty", "git", "guest", "hostname", "inetd", "ipsec", "iptables", "kdump", "kerberos", "ldap"),
    *("loadkeys", "logadm", "logrotate", "lpd", "lvm", "mandb", "mta", "netlabel", "netutils", "networkmanager", "nis"),
    *("nscd", "nslcd", "ntp", "numad", "nx", "policykit", "portmap", "ppp", "quota", "raid", "realmd", "remotelogin"),
    *("rlogin", "rpc", "rpcbind", "rssh", "rsync", "rtkit", "samba", "sasl", "screen", "secadm", "setrans", "seunshare"),
    *("shutdown", "ssh", "sssd", "staff", "su", "sudo", "tcpd", "tzdata", "unconfined", "unprivuser", "updfstab"),
    *("usernetctl", "uuidd", "xdg", "xserver"),
)
"""Of Debian's default policy: what has to do with something in the image, what others need, and what ours has optional rules
for. The other 250 are switched off (`semodule -d`): each time that a module is loaded the whole policy is built anew."""

SITE = "usr/local/lib/srpc-test"
"""In the image: pytest and what else the tests import that is not the product's, labelled as libraries are."""
LEFT_OUT = ("ruff", "mypy", "coverage")
"""Of the packages that pyproject.toml names: what is of no use inside."""

GROUPS = {"rpcusers": ("alice", "bob", "carol", "expired", "svc"), "rpcadmins": ("alice",)}
ACCOUNTS = {"alice": ("staff_u", "s0:c1"), "bob": ("user_u", "s0:c2"), "carol": None, "expired": None, "svc": None}
"""SELinux user and range by login; None: nothing is said, so `__default__` holds. Passwords: `password(name)`."""

MASKED = (
    *("apt-daily.timer", "apt-daily-upgrade.timer", "dpkg-db-backup.timer", "e2scrub_all.timer", "fstrim.timer"),
    *("logrotate.timer", "systemd-tmpfiles-clean.timer", "systemd-timesyncd.service", "getty@tty1.service"),
    *("serial-getty@ttyS0.service", "e2scrub_reap.service", "systemd-pstore.service", "ssh.socket"),
)
"""What would cost seconds, or do something in the middle of a test after the clock was set."""

FILES = {
    "etc/hostname": "srpc-test\n",
    "etc/hosts": "127.0.0.1 localhost srpc-test\n::1 localhost\n",
    "etc/systemd/network/vm.network": "[Match]\nName=e*\n[Network]\nAddress=10.0.2.15/24\nLinkLocalAddressing=no\nLLDP=no\n",
    "etc/ssh/sshd_config.d/vm.conf": "UseDNS no\nPermitRootLogin prohibit-password\nMaxSessions 100\nPrintMotd no\n",
    # The tests read the log as it is written, and it must not turn over under them.
    "etc/audit/auditd.conf": "log_file = /var/log/audit/audit.log\nlog_group = root\nlog_format = RAW\nflush = NONE\n"
    "max_log_file = 500\nmax_log_file_action = IGNORE\nspace_left = 75\nspace_left_action = SYSLOG\n"
    "admin_space_left = 50\nadmin_space_left_action = SUSPEND\ndisk_full_action = SUSPEND\ndisk_error_action = SUSPEND\n",
    "etc/systemd/journald.conf.d/vm.conf": "[Journal]\nStorage=persistent\nRateLimitBurst=0\n",
    # No manual pages, no documents: as small images have it. Those of the product stay, a test looks at them.
    "etc/dpkg/dpkg.cfg.d/vm": "force-unsafe-io\n",
}


class ImageFault(Exception):
    """The image can't be made here; the message says what to do."""


def password(name: str) -> str:
    """The password of an account, as the realm's have it."""
    return f"{name}'s own passphrase"


def run(command: Sequence[str | Path], *, root: Path | None = None, text: str = "") -> str:
    """Run a command, in the unpacked image where `root` is given; what it printed. Raises ImageFault."""
    command = [*(("chroot", root) if root else ()), *command]
    environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"}
    environment |= {name: value for name, value in os.environ.items() if name.endswith("_proxy") or name.startswith("PIP_")}
    done = subprocess.run(
        [*map(str, command)], input=text, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    if done.returncode:
        raise ImageFault(f"{' '.join(map(str, command))}: status {done.returncode}\n{done.stdout[-4000:]}")
    return done.stdout


@contextlib.contextmanager
def locked(what: str = "image") -> Iterator[None]:
    """One at a time: for what is made in the cache."""
    (CACHE / "locks").mkdir(parents=True, exist_ok=True)
    with open(CACHE / "locks" / what, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def build() -> Path:
    """The directory of the image (disk.img, vmlinuz, initrd, key), built where it is not there yet. Raises ImageFault."""
    requirements = python_packages()
    made_from = "\n".join([Path(__file__).read_text(encoding="utf-8"), *requirements])
    image = CACHE / "images" / _hash(made_from)
    if (image / "disk.img").exists():
        return image
    _check_host()
    base, site = _base(), _site(requirements)
    print("making the image", file=sys.stderr, flush=True)
    new = image.with_name("new")
    shutil.rmtree(image.parent, ignore_errors=True)  # older ones are of no use
    new.mkdir(parents=True)
    root = new / "root"
    root.mkdir(mode=0o755)
    run(["tar", "-xf", base, "-C", root])
    shutil.copytree(site, root / SITE)
    for name, text in FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    _accounts(root)
    _units(root)
    run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "vm", "-f", new / "key"])
    (root / "root/.ssh").mkdir(mode=0o700, exist_ok=True)
    shutil.copy(new / "key.pub", root / "root/.ssh/authorized_keys")
    for name in ("vmlinuz", "initrd.img"):
        shutil.copy(
            (root / name).resolve() if not (root / name).is_symlink() else root / os.readlink(root / name), new / name
        )
    _selinux(root)
    for path in ("usr/share/doc", "usr/share/locale"):
        shutil.rmtree(root / path, ignore_errors=True)
    with open(new / "disk.img", "wb") as disk:
        disk.truncate(4 << 30)
    run(["mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", "-E", "lazy_itable_init=1", "-d", root, new / "disk.img"])
    shutil.rmtree(root)
    return new.rename(image)


def python_packages() -> list[str]:
    """The requirements for tests that pyproject.toml names, without those that are of no use inside."""
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return sorted(each for each in project["optional-dependencies"]["test"] if not each.startswith(LEFT_OUT))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _check_host() -> None:
    if os.geteuid() != 0:
        raise ImageFault("the virtual machine's image is built as root: run this as root")
    missing = [each for each in ("mmdebstrap", "qemu-img", "ssh-keygen", "mke2fs") if not shutil.which(each)]
    if missing:
        raise ImageFault(f"{', '.join(missing)} missing: apt-get install {' '.join(HOST_PACKAGES)}")


def _base() -> Path:
    """Debian as a tar. Kept by the list of packages: it is what takes longest."""
    base = CACHE / "base" / f"{_hash(SUITE + ' '.join(PACKAGES))}.tar"
    if not base.exists():
        print("fetching Debian's packages", file=sys.stderr, flush=True)
        shutil.rmtree(base.parent, ignore_errors=True)
        base.parent.mkdir(parents=True)
        new = base.with_suffix(".new.tar")
        run(["mmdebstrap", "--quiet", "--variant=minbase", f"--include={','.join(PACKAGES)}", SUITE, new])
        new.rename(base)
    return base


def _site(requirements: list[str]) -> Path:
    """Python packages for the tests, as `pip install --target` lays them out. The interpreter is Debian's, as inside."""
    site = CACHE / "site" / _hash("\n".join(requirements))
    if not site.exists():
        print("fetching Python packages", file=sys.stderr, flush=True)
        shutil.rmtree(site.parent, ignore_errors=True)
        site.parent.mkdir(parents=True)
        new = site.with_suffix(".new")
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-cache-dir", "--disable-pip-version-check"]
        run([*pip, "--only-binary=:all:", "--target", new, *requirements])
        new.rename(site)
    return site


def _accounts(root: Path) -> None:
    for group in GROUPS:
        run(["groupadd", group], root=root)
    lines = []
    for name in ACCOUNTS:
        groups = ",".join(group for group, members in GROUPS.items() if name in members)
        run(["useradd", "-m", "-s", "/bin/bash", "-G", groups, name], root=root)
        lines.append(f"{name}:{password(name)}\n")
    # Few rounds: a login is computed by an emulated processor.
    run(["chpasswd", "-c", "SHA512", "-s", "1000"], root=root, text="".join(lines))
    run(["usermod", "-e", "2020-01-01", "expired"], root=root)


def _units(root: Path) -> None:
    run(["systemctl", "--quiet", "mask", *MASKED], root=root)
    run(["systemctl", "--quiet", "enable", "systemd-networkd.service", "auditd.service", "ssh.service"], root=root)
    run(["systemctl", "--quiet", "disable", "systemd-networkd-wait-online.service"], root=root)
    run(["systemctl", "--quiet", "set-default", "multi-user.target"], root=root)


def _selinux(root: Path) -> None:
    """Enforcing, the accounts' SELinux users and ranges, every file labelled. The last step: nothing is written after it."""
    config = root / "etc/selinux/config"
    text = config.read_text(encoding="utf-8").replace("SELINUX=permissive", "SELINUX=enforcing")
    if "SELINUX=enforcing" not in text.splitlines():
        raise ImageFault(f"no line to set in {config}:\n{text}")
    config.write_text(text, encoding="utf-8")
    run(["mount", "-t", "proc", "proc", root / "proc"])  # libselinux looks there for what the system can do
    try:
        others = set(os.listdir(root / "var/lib/selinux/default/active/modules/100")) - set(POLICY_MODULES)
        run(["semodule", "-n", "-s", "default", *(f"--disable={each}" for each in sorted(others))], root=root)
        # As Debian ships it, user_u has the range s0 alone.
        run(["semanage", "user", "-N", "-S", "default", "-m", "-r", "s0-s0:c0.c1023", "user_u"], root=root)
        for name, mapped in ACCOUNTS.items():
            if mapped:
                command = ["semanage", "login", "-N", "-S", "default", "-a", "-s", mapped[0], "-r", mapped[1], name]
                run(command, root=root)
        run(["setfiles", "-F", "/etc/selinux/default/contexts/files/file_contexts", "/"], root=root)
    finally:
        run(["umount", root / "proc"])
