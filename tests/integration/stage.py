"""What integration tests play on: a daemon with a service and programs, and clients of it as users of the realm."""

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from srpc_client import blocking
from tests import realm
from tests.realm import processes

WAIT_SECONDS = 60.0
"""For what is expected to happen at once: this is no bound for its speed, but ends a test that would wait for ever."""

ECHO_SERVICE = """
import asyncio, sys
from srpc_client import serve

def echo(request):
    caller = request.caller
    return f"{caller.user}:{caller.uid}:{caller.gid}:".encode() + request.payload

async def slow(request):
    await asyncio.sleep(float(request.payload or b"0"))
    return b"slept"

asyncio.run(serve({path: {"echo": echo, "slow": slow}[path.rpartition("/")[2]] for path in sys.argv[3:]},
                  address=sys.argv[1], group=sys.argv[2] or None))
"""

RESIDENT = """#!/usr/bin/python3 -I
import struct, sys, os
H = struct.Struct("!iQQ")
stdin, stdout = sys.stdin.buffer, sys.stdout.buffer
while head := stdin.read(20):
    kind, seq, length = H.unpack(head)
    body = stdin.read(length)
    if kind == 13:
        payload = body[12 + struct.unpack("!I", body[8:12])[0]:]
        if payload == b"die":
            os._exit(3)
        answer = str(os.getpid()).encode() + b":" + payload
        stdout.write(H.pack(14, seq, 4 + len(answer)) + bytes(4) + answer)
        stdout.flush()
"""


def make_directory(path: Path, owner: str = "root", group: str = "root", mode: int = 0o755) -> Path:
    """A directory in the tree, with its mode whatever the umask."""
    path.mkdir(exist_ok=True)
    os.chown(path, _uid(owner), _gid(group))
    path.chmod(mode)
    return path


def _uid(name: str) -> int:
    return 0 if name == "root" else realm.account(name).uid


def _gid(name: str) -> int:
    return 0 if name == "root" else realm.group(name)


def program(path: Path, text: str, mode: int = 0o755, group: str = "root") -> Path:
    """A program endpoint."""
    return realm.install(path, text, mode, gid=_gid(group))


@contextlib.contextmanager
def service(
    daemon: realm.Daemon, *paths: str, user: str = "svc", group: str = "calc", code: str = ECHO_SERVICE
) -> Iterator[subprocess.Popen[bytes]]:
    """A service process that announces `paths` (the last element says what it does: echo or slow) until the end.

    code: another program, given the same arguments: the address, the group, the paths.
    """
    address = f"unix:{daemon.local}"
    before = len(daemon.events("announce", outcome="granted"))
    process = realm.popen_as(user, realm.python(code, address, group, *paths))
    try:
        daemon.wait_event("announce", 10, before + len(paths), outcome="granted")
        yield process
    finally:
        process.kill()
        processes.finish(process)


def dial(daemon: realm.Daemon, user: str, **options: object) -> blocking.Connection:
    """A connection over TLS, logged in."""
    secret = realm.password(user)
    return blocking.dial(daemon.address, pins=daemon.pin, user=user, password=secret, **options)  # type: ignore[arg-type]


def errno_of(connection: blocking.Connection, path: str, payload: bytes = b"x") -> int:
    """0, or the errno with which a call fails."""
    try:
        connection.call(path, payload)
    except OSError as fault:
        return fault.errno or -1
    return 0


def workers(daemon: realm.Daemon, user: str) -> list[processes.Process]:
    """The workers of a user."""
    return daemon.processes("worker", user)


def sleepers(seconds: int) -> list[processes.Process]:
    """The processes `sleep SECONDS` of this run: orphans are ours too (see `adopt_orphans`)."""
    found = [each for each in processes.descendants(os.getpid()) if each.command[1:2] == (str(seconds),)]
    return [each for each in found if "sleep" in each.command[0] and processes.alive(each)]


def eventually(what: object, seconds: float = WAIT_SECONDS) -> bool:
    """Whether a condition (a function without arguments) comes true in time."""
    end = time.monotonic() + seconds * realm.PACE
    while not what():  # type: ignore[operator]
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True
