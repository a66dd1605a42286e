"""What workers answer, translated for the session. A worker may be its user's by now: nothing in here is believed."""

from srpcd import ipc
from srpcd.gate.routes import LinkBroken
from srpcd.session.effects import Forward
from srpcd.session.session import Session
from srpcd.wire.frames import APPEND, ATTACH, CALL, STAT, WALK
from srpcd.wire.messages import Kind, StatReply

CALLS = (CALL, APPEND)
WALKS = (WALK, ATTACH)

OPERATIONS = {ATTACH: "walk", WALK: "walk", STAT: "stat", APPEND: "call", CALL: "call"}
"""What the monitor logs, by type of request."""

KINDS: dict[int, Kind] = {
    ipc.DIRECTORY: "directory",
    ipc.SERVICE: "service",
    ipc.PROGRAM: "program",
    ipc.RESIDENT: "resident",
}


def give(session: Session, forward: Forward, kind: int, body: bytes) -> int:
    """Give a session the answer to `forward`.

    Returns the errno if the kernel refused it, else 0. Raises LinkBroken for what no worker says.
    """
    if kind == ipc.WORKER_ERROR and len(body) >= ipc.ERROR_HEAD.size:
        errno, origin = ipc.ERROR_HEAD.unpack_from(body)
        rest = body[ipc.ERROR_HEAD.size :]
        if origin == ipc.ORIGIN_KERNEL:
            session.failed(forward, errno, rest.decode("utf-8", "replace"))
            return int(errno)
        if origin == ipc.ORIGIN_HANDLER and forward.kind in CALLS:
            session.handler_failed(forward, rest)
            return 0
    elif kind == ipc.WALKED and forward.kind in WALKS and len(body) == ipc.WALKED_BODY.size:
        dev, ino, found = ipc.WALKED_BODY.unpack(body)
        session.walked(forward, dev, ino, found == ipc.DIRECTORY)
        return 0
    elif kind == ipc.STATTED and forward.kind == STAT:
        session.stated(forward, _stat(forward, body))
        return 0
    raise LinkBroken


def _stat(forward: Forward, body: bytes) -> StatReply:
    try:
        stat = ipc.Message.unpack(body)
    except ipc.MessageError:
        raise LinkBroken from None
    if not isinstance(stat, ipc.Stat) or stat.kind not in KINDS or len(stat.children) > forward.limit:
        raise LinkBroken
    return StatReply(
        qid=f"{stat.dev}:{stat.ino}",
        name=forward.place.path.rpartition(b"/")[2].decode() or "/",
        is_dir=stat.kind == ipc.DIRECTORY,
        children=list(stat.children) if stat.readable else None,
        more=stat.more,
        mode=stat.mode,
        uid=stat.uid,
        gid=stat.gid,
        user=stat.user,
        group=stat.group,
        context=stat.context or None,
        mtime=stat.mtime,
        kind=KINDS[stat.kind],
        live=stat.live,
    )
