"""Let the kernel say whether a user may open an endpoint: a child that becomes the user and tries.

That is tried in the daemon's own SELinux domain, so where SELinux is on the child also asks the policy about the user's:
whether it may search each of the directories, and open the endpoint.

The child is a fork without an exec, so that it stays undumpable; it runs only what stands here. It answers with an errno
and, where that is 0, with `O_PATH` descriptors of the directories from the tree's root down and of the endpoint itself:
they pin the inodes, and the monitor watches their attributes. That is the one place where the monitor takes descriptors
in, and they come from its own code. (An `O_PATH` descriptor reads as access mode 0, so it proves nothing by itself.)
"""

import os
import socket
import stat
from errno import EACCES, EAGAIN, EIO, ENAMETOOLONG, ENOENT, ENXIO, ESTALE, ETIMEDOUT
from typing import NamedTuple

from srpcd import ipc, selinux
from srpcd.monitor.forked import ask
from srpcd.monitor.launch import Drop
from srpcd.openat2 import O_PATH, open_beneath
from srpcd.wire.limits import DEPTH_MAX

SECONDS = 1.0
"""How long a probe may take. The tree is one file system (RESOLVE_NO_XDEV), so nothing in it should block at all."""


class Proof(NamedTuple):
    """What a probe found. errno: 0 permitted. chain: O_PATH descriptors, tree root first, endpoint last.

    reason: what the log should say of a refusal that the kernel writes no record of, else empty.
    """

    errno: int
    chain: list[int]
    reason: str = ""


async def probe(drop: Drop, tree: str, path: str, access: int, inode: tuple[int, int] | None, context: str) -> Proof:
    """May this identity open the named pipe at `path` with `access` (os.O_RDONLY to serve, os.O_WRONLY to call)?

    inode: (device, inode) that it must be, else ESTALE; None for any. context: of whoever wants to; empty: SELinux has no
    say. errno EAGAIN: it could not be tried.
    """
    try:
        data, chain = await ask(lambda end: _answer(end, tree, path, access, inode, context), drop, SECONDS)
    except TimeoutError:
        return Proof(ETIMEDOUT, [])
    except OSError:
        return Proof(EAGAIN, [])
    errno = int.from_bytes(data[:4], "big") if data else EIO  # it died, by its user's hand perhaps
    if errno or len(chain) != path.count("/") + 2:
        ipc.close_all(chain)
        return Proof(errno or EAGAIN, [], data[4:].decode(errors="replace"))
    return Proof(0, chain)


def _answer(end: socket.socket, tree: str, path: str, access: int, inode: tuple[int, int] | None, context: str) -> None:
    chain: list[int] = []
    reason = ""
    try:
        errno = _try(chain, tree, path, access, inode)
        if context and not errno:
            errno, reason = _ask_policy(chain, access, context)
    except OSError as fault:
        errno = fault.errno or ENOENT
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, b"".join(fd.to_bytes(4, "little") for fd in chain))]
    end.sendmsg([errno.to_bytes(4, "big"), reason.encode()], [] if errno else ancillary)


def _try(chain: list[int], tree: str, path: str, access: int, inode: tuple[int, int] | None) -> int:
    if path.count("/") >= DEPTH_MAX:
        return ENAMETOOLONG
    chain.append(os.open(tree, O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
    for element in path.split("/"):  # from each descriptor to the next: what is returned is the way that was gone
        chain.append(open_beneath(chain[-1], element, O_PATH))
    found = os.fstat(chain[-1])
    if not stat.S_ISFIFO(found.st_mode):
        return ENOENT
    if inode is not None and inode != (found.st_dev, found.st_ino):
        return ESTALE
    try:  # by /proc, so it is the inode looked at above and no other
        os.close(os.open(f"/proc/self/fd/{chain[-1]}", access | os.O_NONBLOCK | os.O_CLOEXEC))
    except OSError as fault:
        if fault.errno != ENXIO:  # ENXIO comes after the permission check: allowed, and nobody reads
            raise
    return 0


def _ask_policy(chain: list[int], access: int, context: str) -> tuple[int, str]:
    """0, or EACCES and why; EAGAIN while the policy changes."""
    wanted = "write" if access == os.O_WRONLY else "read"
    questions = [(fd, "dir", ("search",)) for fd in chain[:-1]] + [(chain[-1], "fifo_file", ("open", wanted))]
    try:
        for fd, kind, permissions in questions:
            label = selinux.label(fd)
            if not selinux.permits(context, label, kind, *permissions):
                return EACCES, f"SELinux: {context} has no {{ {' '.join(permissions)} }} on {label} ({kind})"
    except (OSError, ValueError, LookupError) as fault:
        if isinstance(fault, BlockingIOError):
            return EAGAIN, ""
        return EACCES, f"SELinux: the policy can't be asked: {fault}"
    return 0, ""
