#!/usr/bin/python3 -IS
"""A worker's program: `python3 -I -S <dir>/srpcd/worker/__main__.py <user name>` (the name is for `ps` alone).

It finds the socket to the monitor at descriptor 3 (`srpcd.ipc`).
"""

import gc
import sys

_MONITOR = 3
_BLOCK_KEPT = 2 * 1024 * 1024
"""Bytes of a block of memory that is not given back each time: the largest read, and more."""


def main() -> None:
    """Close off, learn who to be, prove it, say so, serve."""
    gc.disable()  # nothing of what is loaded now will ever be garbage
    sys.path.insert(0, __file__.rpartition("/srpcd/")[0])  # -I -S: nothing of the project is on it
    from srpcd import confine  # noqa: PLC0415

    traceable = confine.close_off()
    import _signal  # type: ignore[import-not-found]  # noqa: PLC0415  what `signal` wraps, at a cost
    import os  # noqa: PLC0415
    from _socket import socket  # noqa: PLC0415

    from srpcd import ipc, libc  # noqa: PLC0415
    from srpcd.worker.serve import Worker  # noqa: PLC0415

    gc.freeze()
    gc.enable()
    libc.keep_memory(_BLOCK_KEPT)
    os.set_inheritable(_MONITOR, False)  # not for programs
    sock = socket(fileno=_MONITOR)
    received = ipc.receive(sock)
    if received is None:
        os._exit(0)
    setup, _fds = received
    if not isinstance(setup, ipc.WorkerSetup):
        raise ipc.MessageError(f"{type(setup).__name__} in the place of WorkerSetup")
    confine.end_with(setup.monitor, _signal.SIGTERM)
    confine.prove(setup.uid, setup.gid, setup.groups, setup.context, setup.personal, traceable)
    worker = Worker(setup, sock)
    _signal.signal(_signal.SIGTERM, worker.terminated)
    worker.tell(ipc.Proved())
    worker.run()


if __name__ == "__main__":
    main()
