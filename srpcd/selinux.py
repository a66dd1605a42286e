"""SELinux, asked and told through the kernel's own files: /proc/thread-self/attr, selinuxfs, and the labels of inodes.

No library is needed for that, and nothing here blocks. Which context a user has is another matter, that of
`srpcd.monitor.contexts`. A context is `user:role:type` with `:level` behind it where the policy knows levels; the type of
a process is its domain. The daemon's empty context means that SELinux is off, and then nothing here is called.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from errno import EAGAIN
from struct import Struct

from srpcd import confine

DAEMON, GATE, AUTHENTICATION = "srpcd_t", "srpc_gate_t", "srpc_auth_t"
"""Domains of the policy module: of the monitor and its forks, of both gates, of the PAM child."""

SELINUXFS = "/sys/fs/selinux"
ATTRIBUTES = "/proc/thread-self/attr"
"""Of the thread: those of another one, even of the same process, can't be written."""

_CREATING = ("fscreate", "sockcreate")

_STATUS = Struct("=5I")  # version, sequence, enforcing, policyload, deny_unknown (selinux_kernel_status)
_PERMISSIVE = 1  # flag of an answer: this domain alone is in permissive mode
_TRIES = 3
_LONGEST = 4096


class Misplaced(Exception):
    """SELinux is on, and the daemon does not run where it has to; the message says what to do."""


def own_context() -> str:
    """The daemon's own context; empty where SELinux is off: there is no selinuxfs, or no policy in it.

    Raises Misplaced where SELinux is on and this is not the daemon's domain: in an unconfined one, say, the policy would
    decide nothing. Raises OSError where it can't be found out whether SELinux is on, which is no reason to go on without.
    """
    try:
        os.stat(f"{SELINUXFS}/enforce")
    except FileNotFoundError:
        with suppress(OSError):  # no security module that has contexts
            if domain(confine.context()) == DAEMON:
                raise Misplaced(f"this process runs in the domain {DAEMON}, but {SELINUXFS} is hidden from it") from None
        return ""
    context = confine.context()
    if context == "kernel":  # as all are called until a policy is loaded
        return ""
    if domain(context) != DAEMON:
        raise Misplaced(
            f"SELinux is on, and this process runs as {context}, not in the domain {DAEMON}: start it through systemd "
            f"('systemctl start srpcd'). If it was started so, the program has lost its label ('restorecon -RFv "
            f"/usr/lib/srpc /usr/sbin/srpcd' restores it), or the policy module srpc is not loaded ('semodule -l')"
        )
    status()  # what can't be asked later is to be known now
    return context


def domain(context: str) -> str:
    """The type of a context; empty where it is none."""
    parts = context.split(":", 3)
    return parts[2] if len(parts) > 2 else ""


def with_domain(context: str, name: str) -> str:
    """`context` with another type; empty for the empty one."""
    user, _, rest = context.partition(":")
    role, _, rest = rest.partition(":")
    _type, colon, level = rest.partition(":")
    return f"{user}:{role}:{name}{colon}{level}" if context else ""


def set_exec(context: str) -> None:
    """Let the next execve of this thread run the program in `context`, or fail. Raises OSError."""
    _set("exec", context)


@contextmanager
def creating(label: str) -> Iterator[None]:
    """Files and sockets that this thread makes meanwhile carry `label` from the first moment; empty: nothing special.

    Raises OSError, also where the label can't be taken back: what was made must then not be used.
    """
    if not label:
        yield
        return
    reserve = os.open("/dev/null", os.O_PATH | os.O_CLOEXEC)
    try:
        for attribute in _CREATING:
            _set(attribute, label)
        yield
    finally:
        os.close(reserve)  # so that there is a descriptor with which to take it back
        try:
            _set(_CREATING[0], "\n")  # as the kernel would have it: none
        finally:
            _set(_CREATING[1], "\n")


def label(fd: int) -> str:
    """The label of the file that a descriptor, O_PATH too, stands for. Raises OSError."""
    return os.getxattr(f"/proc/self/fd/{fd}", "security.selinux").rstrip(b"\0").decode(errors="replace")


def status() -> bytes:
    """What differs after the policy was loaded anew, a boolean changed, or enforcing mode. Raises OSError."""
    data = _read("status")
    if len(data) < _STATUS.size:
        raise OSError(f"{SELINUXFS}/status is too short")
    return data


def permits(source: str, target: str, kind: str, *permissions: str) -> bool:
    """Whether the policy in the kernel, its constraints too, lets processes of context `source` do all of that now.

    target: label of the object. kind: its class, as "fifo_file". permissions: of that class. What the kernel would let pass
    because it is in permissive mode, or the domain is, is permitted. Raises OSError: it can't be asked.
    """
    if any(each.split() != [each] for each in (source, target)):  # a space would end it early for the kernel
        return False
    for _ in range(_TRIES):
        before = status()
        number = int(_read(f"class/{kind}/index"))
        wanted = sum(1 << int(_read(f"class/{kind}/perms/{each}")) - 1 for each in permissions)
        answer = _ask("access", f"{source} {target} {number} {wanted:x}").split()
        if status() == before:
            break
    else:  # another policy may have other numbers
        raise BlockingIOError(EAGAIN, "the policy is being changed")
    allowed, flags = int(answer[0], 16), int(answer[5], 16)
    return allowed & wanted == wanted or bool(flags & _PERMISSIVE) or not _STATUS.unpack_from(before)[2]


def canonical(context: str) -> str:
    """A context as the kernel itself would write it. Raises OSError (EINVAL) for one that the policy does not know."""
    return _ask("context", context)


def _set(attribute: str, value: str) -> None:
    fd = os.open(f"{ATTRIBUTES}/{attribute}", os.O_RDWR | os.O_CLOEXEC)
    try:
        os.write(fd, value.encode())
    finally:
        os.close(fd)


def _read(name: str) -> bytes:
    fd = os.open(f"{SELINUXFS}/{name}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(fd, _LONGEST)
    finally:
        os.close(fd)


def _ask(name: str, request: str) -> str:
    """One transaction: what is read is the answer to what was written."""
    fd = os.open(f"{SELINUXFS}/{name}", os.O_RDWR | os.O_CLOEXEC)
    try:
        os.write(fd, request.encode())
        return os.read(fd, _LONGEST).rstrip(b"\0").decode(errors="replace")
    finally:
        os.close(fd)
