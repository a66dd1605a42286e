"""POSIX ACLs (acl(5)) as setfacl(1) sets them, which a bare machine does not have."""

import errno
import os
import struct
from pathlib import Path

NAME = "system.posix_acl_access"
USER_OBJ, USER, GROUP_OBJ, GROUP, MASK, OTHER = 0x01, 0x02, 0x04, 0x08, 0x10, 0x20
NO_ID = 0xFFFFFFFF
BITS = {"r": 4, "w": 2, "x": 1, "-": 0}

Entries = dict[tuple[int, int], int]


def grant(path: Path, permissions: str, *, uid: int | None = None, gid: int | None = None) -> None:
    """Like `setfacl -m u:UID:PERMISSIONS` or `g:GID:…`. permissions: of "r", "w", "x"; "" grants nothing (and so denies)."""
    entries = _read(path)
    key = (USER, uid) if uid is not None else (GROUP, gid if gid is not None else NO_ID)
    entries[key] = sum({BITS[each] for each in permissions})
    mask = 0
    for (tag, _), bits in entries.items():
        mask |= bits if tag in (USER, GROUP, GROUP_OBJ) else 0
    entries[MASK, NO_ID] = mask
    packed = b"".join(struct.pack("<HHI", tag, bits, number) for (tag, number), bits in sorted(entries.items()))
    os.setxattr(path, NAME, struct.pack("<I", 2) + packed)


def strip(path: Path) -> None:
    """Like `setfacl -b`."""
    group = _read(path).get((GROUP_OBJ, NO_ID), 0)
    os.removexattr(path, NAME)
    os.chmod(path, path.stat().st_mode & 0o7707 | group << 3)


def _read(path: Path) -> Entries:
    try:
        data = os.getxattr(path, NAME)
    except OSError as fault:
        if fault.errno != errno.ENODATA:
            raise
        mode = path.stat().st_mode
        return {(USER_OBJ, NO_ID): mode >> 6 & 7, (GROUP_OBJ, NO_ID): mode >> 3 & 7, (OTHER, NO_ID): mode & 7}
    return {(tag, number): bits for tag, bits, number in struct.iter_unpack("<HHI", data[4:])}
