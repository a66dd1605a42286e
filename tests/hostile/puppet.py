"""Tests' side of hostile programs: a daemon with them, and connections that tell them what to do."""

import socket
import subprocess
from pathlib import Path
from typing import Any

from tests import realm
from tests.realm import processes

HERE = Path(__file__).parent
_RELAY = """
import socket, sys
sock = socket.socket(socket.AF_UNIX)
sock.connect(sys.argv[1])
for line in sys.stdin:
    sock.sendall(eval(line))
    answer = b""
    while not answer.endswith(b"\\0\\n"):
        data = sock.recv(65536)
        if not data:
            print("GONE", flush=True)
            sys.exit()
        answer += data
    print(repr(answer[:-2].decode()), flush=True)
"""


def hostile_daemon(*roles: str, config: dict[str, Any] | None = None) -> realm.Daemon:
    """A daemon, not yet started, with hostile programs as these roles ("gate", "worker")."""
    return realm.Daemon(config, programs={role: HERE / f"{role}.py" for role in roles})


class Puppet:
    """A connection to a hostile gate by the local socket, of a process that really is the user's."""

    def __init__(self, daemon: realm.Daemon, user: str) -> None:
        command = realm.python(_RELAY, str(daemon.local))
        self._process = realm.popen_as(user, command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def run(self, code: str) -> str:
        """What `result` is after the gate has run the code, as repr; "GONE" if the connection is over."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(repr(code.encode()).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return "GONE"
        line = self._process.stdout.readline().decode().strip()
        return line if line in ("GONE", "") else str(eval(line))

    def close(self) -> None:
        """Hang up."""
        processes.kill_group(self._process)
        processes.finish(self._process)
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()

    def __enter__(self) -> "Puppet":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def run_over_tcp(daemon: realm.Daemon, code: str) -> str:
    """The same by the network's gate, which is hostile and speaks no TLS."""
    with socket.create_connection(daemon.tcp, 10) as sock:
        sock.sendall(code.encode())
        answer = b""
        while not answer.endswith(b"\0\n"):
            data = sock.recv(65536)
            if not data:
                return "GONE"
            answer += data
    return answer[:-2].decode()
