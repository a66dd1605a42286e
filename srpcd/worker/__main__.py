#!/usr/bin/python3 -IS
"""A worker's program: `python3 -I -S <dir>/srpcd/worker/__main__.py <user name>` (the name is for `ps` alone).

It finds a socket from the monitor at descriptor 3, its end of the packet pipe to the monitor at 4 (`srpcd.ipc`).
"""

import gc
import sys

_SOCKET, _PIPE = 3, 4
_BLOCK_KEPT = 2 * 1024 * 1024
"""Bytes of a block of memory that is not given back each time: the largest read, and more."""


def main() -> None:
    """Close off, learn who to be, prove it, say so, serve."""
    gc.disable()  # nothing of what is loaded now will ever be garbage
    sys.path.insert(0, __file__.rpartition("/srpcd/")[0])  # -I -S: nothing of the project is on it
    from srpcd import confine  # noqa: PLC0415

    confine.make_undumpable()  # first: until then other processes of this user could trace it
    import _signal  # type: ignore[import-not-found]  # noqa: PLC0415  what `signal` wraps, at a cost
    import os  # noqa: PLC0415
    from _socket import socket  # noqa: PLC0415

    from srpcd import ipc, libc  # noqa: PLC0415
    from srpcd.worker.serve import Worker  # noqa: PLC0415

    gc.freeze()
    gc.enable()
    libc.keep_memory(_BLOCK_KEPT)
    for fd in (_SOCKET, _PIPE):
        os.set_inheritable(fd, False)  # not for programs
    sock = socket(fileno=_SOCKET)
    received = ipc.receive(sock)
    if received is None:
        os._exit(0)
    setup, _fds = received
    if not isinstance(setup, ipc.WorkerSetup):
        raise ipc.MessageError(f"{type(setup).__name__} in the place of WorkerSetup")
    confine.end_with(setup.monitor, _signal.SIGTERM)
    confine.prove(setup.uid, setup.gid, setup.groups, setup.context, setup.personal)
    worker = Worker(setup, sock, _PIPE)
    _signal.signal(_signal.SIGTERM, worker.terminated)
    worker.tell(ipc.Proved())
    worker.run()


if __name__ == "__main__":
    main()
