"""Which programs may be executed: a program runs as its *caller*, so whoever can put one into the tree, or change one,
could run code as everybody who calls it. Only root may be that (in personal mode: the user himself)."""

import os
from errno import EACCES

from srpcd.openat2 import open_beneath
from srpcd.wire.errors import RequestError
from srpcd.worker.resolve import Tree

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn


def _refuse(path: str, reason: str) -> "NoReturn":
    raise RequestError(EACCES, f"/{path}: {reason}; a program runs as its caller, so nobody else may be able to change it")


def _check(path: str, found: os.stat_result, owner: int) -> None:
    # With an ACL the group bits are its mask: so the mask is checked too, and with it every named user and group.
    if found.st_mode & 0o022:
        who = " and ".join(name for bit, name in ((0o020, "its group"), (0o002, "others")) if found.st_mode & bit)
        _refuse(path, f"writable for {who} (mode {found.st_mode & 0o7777:04o}): chmod go-w")
    if found.st_uid != owner:
        _refuse(path, f"belongs to uid {found.st_uid}, not to {'root' if owner == 0 else f'uid {owner}'}")


def open_trusted(tree: Tree, path: str, owner: int) -> "tuple[int, os.stat_result]":
    """Open a program (O_PATH), having checked it and every directory from the tree's root down to it.

    Each is opened in the one before, so what was checked is what the descriptor returned stands for.
    owner: uid that all must belong to.
    Raises OSError with what the kernel said; RequestError with which file or directory is to blame, and why.
    """
    elements = path.split("/")
    root = fd = tree.root()
    try:
        found = os.fstat(root)
        _check("", found, owner)
        for depth, name in enumerate(elements, 1):
            below = open_beneath(fd, name, os.O_PATH)
            if fd != root:
                os.close(fd)
            fd = below
            found = os.fstat(fd)
            if found.st_mode & 0o022 or found.st_uid != owner:
                _check("/".join(elements[:depth]), found, owner)
        if found.st_mode & 0o6000:
            _refuse(path, f"set-user-id or set-group-id (mode {found.st_mode & 0o7777:04o}): chmod ug-s")
    except (OSError, RequestError):
        if fd != root:
            os.close(fd)
        raise
    return fd, found
