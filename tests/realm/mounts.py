"""Mounts in a namespace of this process's own (mount_namespaces(7)), through ctypes."""

import ctypes
import os
import tempfile
from pathlib import Path

from tests.realm import labels

CLONE_NEWNS = 0x00020000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
PR_SET_CHILD_SUBREAPER = 36

_libc = ctypes.CDLL(None, use_errno=True)


def _call(name: str, *arguments: object) -> None:
    if getattr(_libc, name)(*arguments):
        errno = ctypes.get_errno()
        raise OSError(errno, f"{name}: {os.strerror(errno)}")


def mount(source: str, target: Path, kind: str = "", flags: int = 0, options: str = "") -> None:
    """mount(2). Raises OSError."""
    _call("mount", source.encode(), os.fsencode(target), kind.encode() or None, ctypes.c_ulong(flags), options.encode())


def own_namespace() -> None:
    """Leave the machine's mounts alone from here on. Raises OSError; RuntimeError where there are several threads."""
    if len(os.listdir("/proc/self/task")) != 1:
        raise RuntimeError("only the calling thread would enter the namespace: enter it before there are others")
    _call("unshare", CLONE_NEWNS)
    mount("none", Path("/"), flags=MS_REC | MS_PRIVATE)


def tmpfs(target: Path, mode: int = 0o755) -> None:
    """An empty tmpfs on `target`."""
    mount("tmpfs", target, "tmpfs", MS_NOSUID | MS_NODEV, f"mode={mode:o}")


def bind(source: Path, target: Path, readonly: bool = False) -> None:
    """`source` (file or directory) also at `target`, with what is mounted below it."""
    mount(str(source), target, flags=MS_BIND | MS_REC)
    if readonly:
        mount("none", target, flags=MS_BIND | MS_REMOUNT | MS_RDONLY)


def replace(target: Path, text: str, store: Path) -> None:
    """Let the file `target` be another one with `text`, and the same owner, mode and label. Readers see one or the other."""
    facts = target.stat()
    fd, name = tempfile.mkstemp(prefix=f"{target.name}.", dir=store)
    with os.fdopen(fd, "w", encoding="utf-8") as file:
        file.write(text)
        os.fchown(fd, facts.st_uid, facts.st_gid)
        os.fchmod(fd, facts.st_mode & 0o7777)
    labels.copy(target, Path(name))
    bind(Path(name), target)


def adopt_orphans() -> None:
    """Become the parent of descendants whose own parent ends, so that what a daemon leaves behind is seen."""
    _call("prctl", ctypes.c_int(PR_SET_CHILD_SUBREAPER), *(ctypes.c_ulong(each) for each in (1, 0, 0, 0)))
