"""The throwaway accounts, and the account files of the realm, which list them."""

import ctypes
import dataclasses
import grp
import pwd
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tests.realm import mounts

EXPIRED_DAY = 10_000
"""In days since 1970, as shadow(5) counts: the year 1997."""


@dataclasses.dataclass(frozen=True)
class Account:
    """One line of passwd(5) and shadow(5). uid: below 0: is chosen among the free ones. groups: besides its own."""

    name: str
    groups: tuple[str, ...] = ()
    shell: str = "/bin/sh"
    uid: int = -1
    system: bool = False
    locked: bool = False
    expired: bool = False
    stale: bool = False  # the password has to be changed at once
    own_group: bool = True

    @property
    def gid(self) -> int:
        """The primary group's number: the account's own group has its uid's."""
        return self.uid


PEOPLE = (
    Account("alice", ("calc", "staff2")),
    Account("bob"),
    Account("carol", locked=True),
    Account("dave", expired=True),
    Account("erin", shell="/usr/sbin/nologin"),
    Account("frank", stale=True),
    Account("svc", ("calc",)),
    Account("svc2"),
    Account("sysacct", uid=450, system=True),
    Account("_srpcd", shell="/usr/sbin/nologin", system=True, locked=True),
    Account("_srpcl", shell="/usr/sbin/nologin", system=True, locked=True),
    Account("toor", uid=0, own_group=False),
)
"""Their passwords are `password(name)`. Root and nobody have one of this kind too: a refusal is then about who they are."""

GROUPS = ("calc", "staff2")

_BEGIN = random.SystemRandom().random()

_accounts: dict[str, Account] = {}
_groups: dict[str, int] = {}
_originals: dict[str, list[str]] = {}
_hashes: dict[str, str] = {}
_homes: list[Path] = []


def password(name: str) -> str:
    """The password of an account."""
    return f"{name}'s own passphrase"


def account(name: str) -> Account:
    """An account of the realm, with its numbers."""
    return _accounts[name]


def group(name: str) -> int:
    """The gid of one of GROUPS."""
    return _groups[name]


def create(homes: Path) -> None:
    """Choose numbers for all accounts and write the account files. homes: the directory of the home directories."""
    for file in ("passwd", "shadow", "group", "shells"):
        _originals[file] = Path("/etc", file).read_text(encoding="utf-8").splitlines()
    for name in GROUPS:
        _groups[name] = next(_free(_taken(), system=False))
    _number(PEOPLE)
    for name in ("root", "nobody"):
        _hashes[name] = _hash(password(name))
    shells = _originals["shells"]
    mounts.replace(Path("/etc/shells"), "\n".join([*shells, "/bin/sh", "/bin/bash", ""]))
    _homes.append(homes)
    _write()


def change(name: str, **fields: Any) -> None:
    """Change an account, from now on and for all look-ups: `change("alice", groups=("staff2",), expired=True)`."""
    _accounts[name] = dataclasses.replace(_accounts[name], **fields)
    _write()


def add(people: Iterable[Account]) -> None:
    """Add accounts, from now on and for all look-ups. They get no home directory."""
    _number(people)
    _write()


def remove(name: str) -> Account:
    """Delete an account, from now on and for all look-ups. `add` with the returned record makes it again."""
    removed = _accounts.pop(name)
    _write()
    return removed


def share(name: str, other: Account) -> None:
    """Add an account behind the others, with the uid and primary group of another one."""
    _accounts[name] = dataclasses.replace(other, name=name, own_group=False)
    _hashes[name] = _hash(password(name))
    _write()


def add_group(name: str) -> None:
    """Add a group, as those of GROUPS."""
    _groups[name] = next(_free(_taken(), system=False))
    _write()


def remove_group(name: str) -> None:
    """Delete a group that `add_group` has made."""
    del _groups[name]
    _write()


def _number(people: Iterable[Account]) -> None:
    """Choose numbers and make password hashes."""
    taken = _taken()
    free, free_system = _free(taken, system=False), _free(taken, system=True)
    for person in people:
        uid = person.uid
        if uid < 0 or (uid in taken and uid != 0):
            uid = next(free_system if person.system else free)
        _accounts[person.name] = dataclasses.replace(person, uid=uid)
        _hashes[person.name] = _hash(password(person.name))


def _taken() -> set[int]:
    """Numbers that somebody has: outside, or in the realm."""
    outside = {entry.pw_uid for entry in pwd.getpwall()} | {entry.gr_gid for entry in grp.getgrall()}
    return outside | {each.uid for each in _accounts.values()} | set(_groups.values())


def _free(taken: set[int], *, system: bool) -> Iterator[int]:
    """Free numbers, from any on: what the kernel counts for a uid on the whole machine, two runs are not to share.

    Those are its processes (RLIMIT_NPROC), its inotify instances and the memory of its pipes, for example.
    """
    numbers = range(451, 999) if system else range(20_001, 60_000)
    begin = int(_BEGIN * len(numbers))
    return (number for number in (*numbers[begin:], *numbers[:begin]) if number not in taken)


def _write() -> None:
    """Write passwd, shadow and group anew."""
    own = set(_accounts)

    def kept(file: str, names: set[str]) -> list[str]:
        return [line for line in _originals[file] if line.split(":", 1)[0] not in names]

    passwd, shadow, group = kept("passwd", own), kept("shadow", own | {"root", "nobody"}), []
    for line in kept("group", own | set(_groups)):
        head, _, members = line.rpartition(":")
        group.append(f"{head}:{','.join(each for each in members.split(',') if each not in own)}")
    for name in ("root", "nobody"):
        shadow.append(f"{name}:{_hashes[name]}:19000:0:99999:7:::")
    for each in _accounts.values():
        passwd.append(f"{each.name}:x:{each.uid}:{each.gid}::{_homes[0]}/{each.name}:{each.shell}")
        hashed = ("!" if each.locked else "") + _hashes[each.name]
        expire = str(EXPIRED_DAY) if each.expired else ""
        shadow.append(f"{each.name}:{hashed}:{0 if each.stale else 19000}:0:99999:7::{expire}:")
        if each.own_group:
            group.append(f"{each.name}:x:{each.gid}:")
    for name, gid in _groups.items():
        members = ",".join(each.name for each in _accounts.values() if name in each.groups)
        group.append(f"{name}:x:{gid}:{members}")
    for file, lines in (("passwd", passwd), ("shadow", shadow), ("group", group)):
        mounts.replace(Path("/etc", file), "\n".join([*lines, ""]))


def _hash(text: str) -> str:
    """A hash that takes a millisecond to check; crypt(5)'s default is meant to take long."""
    crypt = ctypes.CDLL("libcrypt.so.1").crypt
    crypt.restype = ctypes.c_char_p
    hashed: bytes | None = crypt(text.encode(), b"$6$rounds=1000$throwaway")
    if not hashed or not hashed.startswith(b"$6$"):
        raise RuntimeError("libcrypt can't make a SHA-512 hash")
    return hashed.decode()
