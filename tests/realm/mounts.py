"""Mounts in a namespace of this process's own (mount_namespaces(7)), through ctypes."""

import ctypes
import os
import shutil
import stat
import tempfile
from collections.abc import Collection
from pathlib import Path

from tests.realm import labels

CLONE_NEWNS = 0x00020000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 8, 32, 4096, 16384, 1 << 18
PR_SET_CHILD_SUBREAPER = 36

_KEPT_ATTRIBUTES = {"security.capability", "system.posix_acl_access", "system.posix_acl_default"}

_libc = ctypes.CDLL(None, use_errno=True)


def call(name: str, *arguments: object) -> None:
    """A function of libc that returns 0 for success. Raises OSError."""
    if getattr(_libc, name)(*arguments):
        errno = ctypes.get_errno()
        raise OSError(errno, f"{name}: {os.strerror(errno)}")


def mount(source: str, target: Path, kind: str = "", flags: int = 0, options: str = "") -> None:
    """mount(2). Raises OSError."""
    call("mount", source.encode(), os.fsencode(target), kind.encode() or None, ctypes.c_ulong(flags), options.encode())


def check_single_thread() -> None:
    """Raise RuntimeError where this process has several threads."""
    if len(os.listdir("/proc/self/task")) != 1:
        raise RuntimeError("only the calling thread would enter the namespace: enter it before there are others")


def own_namespace(others: int = 0) -> None:
    """Leave the machine's mounts alone from here on. Raises OSError; RuntimeError where there are several threads.

    others: flags of unshare(2) for further namespaces.
    """
    check_single_thread()
    call("unshare", CLONE_NEWNS | others)
    mount("none", Path("/"), flags=MS_REC | MS_PRIVATE)


def tmpfs(target: Path, mode: int = 0o755) -> None:
    """An empty tmpfs on `target`."""
    mount("tmpfs", target, "tmpfs", MS_NOSUID | MS_NODEV, f"mode={mode:o}")


def bind(source: Path, target: Path, readonly: bool = False) -> None:
    """`source` (file or directory) also at `target`, with what is mounted below it."""
    mount(str(source), target, flags=MS_BIND | MS_REC)
    if readonly:
        mount("none", target, flags=MS_BIND | MS_REMOUNT | MS_RDONLY)


def unmount(target: Path) -> None:
    """umount(2). Raises OSError."""
    call("umount", os.fsencode(target))


def overlay(directory: Path, copy: Path, live: Collection[str] = ()) -> None:
    """Copy all of `directory` to `copy`, an empty directory, and bind that over `directory`.

    live: names of directories in it that are not copied: the copy has the real ones, by a bind mount.

    A bind mount over a single file would not last: the kernel detaches it from all namespaces when another file is renamed
    over the one below it, which is how useradd(8) and most editors write. A directory such as /etc is never replaced.

    The copy does not follow later changes of `directory`. Modes, owners, ACLs, capabilities, labels and symbolic links are
    kept; hard links become files of their own; sockets, pipes and devices are left out. Another filesystem that is mounted
    below `directory` is mounted below the copy too. The history that etckeeper(8) keeps in /etc may be larger than memory,
    and is left out.
    """
    device = directory.stat().st_dev
    for source in directory.iterdir():
        if source.name in live and source.is_dir() and not source.is_symlink():
            (copy / source.name).mkdir()
            bind(source, copy / source.name)
        elif source.name not in (".git", ".hg", ".bzr", "_darcs"):
            _copy(source, copy / source.name, device)
    _copy_attributes(directory, copy)
    bind(copy, directory)


def _copy(source: Path, target: Path, device: int) -> None:
    """Copy a file of any kind, a directory with all below it; bind what is not on this device."""
    try:
        facts = source.lstat()
        if stat.S_ISLNK(facts.st_mode):
            target.symlink_to(source.readlink())
        elif stat.S_ISREG(facts.st_mode):
            target.touch(0o600)
            shutil.copyfile(source, target, follow_symlinks=False)
        elif stat.S_ISDIR(facts.st_mode):
            target.mkdir(0o700)
            if facts.st_dev != device:
                bind(source, target)
                return
            for each in source.iterdir():
                _copy(each, target / each.name, device)
        else:
            return
        _copy_attributes(source, target)
    except FileNotFoundError:  # a process outside has removed it meanwhile
        return


def _copy_attributes(source: Path, target: Path) -> None:
    """Copy owner, mode, times and those extended attributes that a tmpfs of every kernel can hold."""
    facts = source.lstat()
    os.chown(target, facts.st_uid, facts.st_gid, follow_symlinks=False)
    if not stat.S_ISLNK(facts.st_mode):
        target.chmod(stat.S_IMODE(facts.st_mode))  # after chown, which takes away set-id bits
    for name in set(os.listxattr(source, follow_symlinks=False)) & _KEPT_ATTRIBUTES:  # after chown, for capabilities
        value = os.getxattr(source, name, follow_symlinks=False)
        os.setxattr(target, name, value, follow_symlinks=False)
    labels.copy(source, target)
    os.utime(target, ns=(facts.st_atime_ns, facts.st_mtime_ns), follow_symlinks=False)


def replace(target: Path, text: str) -> None:
    """Rename a new file with `text` over `target`, with its owner, mode and label. Readers see one file or the other."""
    facts = target.stat()
    fd, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    with os.fdopen(fd, "w", encoding="utf-8") as file:
        file.write(text)
        os.fchown(fd, facts.st_uid, facts.st_gid)
        os.fchmod(fd, facts.st_mode & 0o7777)
    labels.copy(target, Path(name))
    Path(name).rename(target)


def adopt_orphans() -> None:
    """Become the parent of descendants whose own parent ends, so that what a daemon leaves behind is seen."""
    call("prctl", ctypes.c_int(PR_SET_CHILD_SUBREAPER), *(ctypes.c_ulong(each) for each in (1, 0, 0, 0)))
