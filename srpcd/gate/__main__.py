#!/usr/bin/python3 -IS
"""Start of a gate: `<this file> <tls|local> <directory for sys.path>...`, by `python3 -I -S`, with descriptor 3.

The monitor has dropped all privileges before the exec. Nothing is read from a client before that is proved.
"""

import os
import resource
import signal
import sys

MONITOR = 3
"""The socket to the monitor."""


def main() -> None:
    """Be a gate."""
    sys.dont_write_bytecode = True
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:0] = [os.path.dirname(os.path.dirname(here))]
    sys.path += sys.argv[2:]
    from srpcd import confine  # noqa: PLC0415  sys.path had to be made first

    traceable = confine.close_off()
    # Whoever stops the daemon by a signal to its whole group means the monitor, which lets the gates finish.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    import socket  # noqa: PLC0415

    from srpcd import ipc  # noqa: PLC0415

    sock = socket.socket(fileno=MONITOR)
    sock.setblocking(True)
    received = ipc.receive(sock)
    if received is None:
        return
    setup, fds = received
    if not isinstance(setup, ipc.GateSetup) or setup.kind != sys.argv[1] or len(fds) != (2 if setup.kind == "tls" else 0):
        raise SystemExit("a gate was told something else than who it is")
    confine.end_with(setup.monitor, signal.SIGKILL)
    confine.prove(setup.uid, setup.gid, setup.groups, setup.context, setup.personal, traceable)
    # Not before the exec, as the other limits: execve itself fails where a uid has more processes than this.
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))

    from srpcd import config  # noqa: PLC0415
    from srpcd.gate import gate, tls  # noqa: PLC0415

    context = tls.inherited_context(fds) if fds else None
    # Nor before this: libffi puts a callback of ctypes into a file in memory.
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    gate.serve(config.decode(setup.config), context, sock)


if __name__ == "__main__":
    main()
    sys.stderr.flush()
    os._exit(0)
