"""A gate, run as the program that it is, in a world that the test plays: monitor, workers, authentication children.

The monitor and the workers answer by themselves in a thread, as the path says (`Worker`); a test changes how by the
attributes of `World`, and looks at `World.said`, what the gate told the monitor.
"""

import datetime
import json
import os
import select
import selectors
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from srpcd import ipc
from tests.gate.client import PATIENCE, Client
from tests.gate.fake_worker import Worker

STRICT = """
import os, runpy, sys

here = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [here]
sys.path += sys.argv[2:]

import pyseccomp
from srpcd.gate import sandbox

inside = False
proofs = iter([0, *[sandbox.EACCES] * (sandbox._landlock_version() > 0), sandbox.EPERM])

def open_something():
    # The last of the proofs would be deadly.
    global inside
    found = next(proofs)
    inside = found == sandbox.EPERM
    return found

def look(event, arguments):
    # Says what it was that wanted something, before the kernel answers.
    if inside and event in ("import", "open"):
        os.write(2, f"{event} {arguments[:1]!r} in the sandbox\\n".encode())

sandbox._open_something = open_something
pyseccomp.ERRNO = lambda errno: pyseccomp.KILL_PROCESS
sandbox.DEADLY = ()  # everything is
sys.addaudithook(look)
runpy.run_path(here + "/srpcd/gate/__main__.py", run_name="__main__")
"""
"""The gate's program, in a sandbox that ends it where the real one only says no: what an honest gate does is all allowed."""

OLDER = """
import os, sys
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from srpcd import passing
passing.SO_PASSRIGHTS = 9999
"""
"""The same on a kernel that can't refuse descriptors."""

UID = 64111 if os.getuid() == 0 else os.getuid()
GID = 64112 if os.getuid() == 0 else os.getgid()
PACKAGES = ("OpenSSL", "cryptography", "msgspec", "cffi", "typing_extensions.py", "pyseccomp.py")


def copy_code() -> Path:
    """A copy of the code, with what it imports, that every user may read."""
    place = Path(tempfile.mkdtemp(prefix="srpc-gate-"))
    place.chmod(0o755)
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(Path(__file__).parents[2] / "srpcd", place / "srpcd", ignore=ignore)
    for base in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for name in (*PACKAGES, *(each.name for each in Path(base).glob("_cffi_backend*"))):
            source = Path(base) / name
            if source.is_dir():
                shutil.copytree(source, place / "site" / name, ignore=ignore, dirs_exist_ok=True)
            elif source.exists():
                (place / "site").mkdir(exist_ok=True)
                shutil.copy(source, place / "site" / name)
    (place / "strict.py").write_text(STRICT)
    (place / "older.py").write_text(OLDER + STRICT)
    subprocess.run([sys.executable, "-m", "compileall", "-q", place], check=True)
    subprocess.run(["chmod", "-R", "a+rX", place], check=True)
    return place


def why_not() -> str:
    """Why a gate can't be run here; empty if it can."""
    python = Path(os.path.realpath(sys.executable))
    closed = next((each for each in python.parents if not each.stat().st_mode & 1), None)
    if os.getuid() == 0 and closed:
        return f"the interpreter is in {closed}, which other users may not enter"
    return "" if shutil.which("setpriv") else "setpriv is not installed"


def certificate() -> tuple[bytes, bytes]:
    """(key, certificate), PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "srpcd")])
    start = datetime.datetime(2020, 1, 1)
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    builder = builder.serial_number(1).not_valid_before(start).not_valid_after(start + datetime.timedelta(36500))
    pem = builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    encoding, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    return key.private_bytes(encoding, form, serialization.NoEncryption()), pem


class World:
    """The monitor, and the gate in its care. uname decides the worker; passwords are the uname backwards."""

    def __init__(self, code: Path, kind: str, settings: dict[str, Any] | None = None, program: str = "strict.py") -> None:
        self.kind = kind
        self.said: list[ipc.Message] = []
        self.workers: dict[int, Worker] = {}
        self.hand_out_dead = 0
        self.on: dict[type[ipc.Message], Callable[[Any], None]] = {}
        self._afids: dict[tuple[int, int], str] = {}
        self._sessions: dict[int, int] = {}
        self._numbers: dict[str, int] = {}
        self._conn = 0
        self._children: dict[int, tuple[int, int, list[str]]] = {}
        self._selector = selectors.DefaultSelector()
        self._lock = threading.Condition()
        self._stop, self._stopper = os.pipe()
        self.clients: list[Client] = []
        self.monitor, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # A socket, as in the daemon: a gate may not write files (RLIMIT_FSIZE).
        errors, their_errors = socket.socketpair()
        self.stderr = open(errors.detach(), "rb")  # noqa: SIM115
        self.pid = self._exec(code / program, code / "site", theirs.fileno(), their_errors.fileno())
        theirs.close()
        their_errors.close()
        settings = {"paths": {"tree": "/the/tree"}, "limits": settings or {}}
        fds = []
        if kind == "tls":
            for content in certificate():
                read, write = os.pipe()
                os.write(write, content)
                os.close(write)
                fds.append(read)
        setup = ipc.GateSetup(UID, GID, (), "", os.getuid() != 0, os.getpid(), kind, json.dumps(settings).encode())
        if os.getuid() != 0:
            setup.groups = tuple(os.getgroups())
        self.tell(setup, fds)
        ipc.close_all(fds)
        self.listen()
        self._selector.register(self._stop, selectors.EVENT_READ, None)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _exec(self, program: Path, site: Path, sock: int, errors: int) -> int:
        gate = [os.path.realpath(sys.executable), "-I", "-S", str(program), self.kind, str(site)]
        drop = ["setpriv", "--no-new-privs"]
        if os.getuid() == 0:
            drop += [f"--reuid={UID}", f"--rgid={GID}", "--egid=65534", "--clear-groups"]
            drop += ["--bounding-set=-all", "--inh-caps=-all"]
        pid = os.fork()
        if pid:
            return pid
        try:
            os.setsid()
            os.chdir("/")
            high = [os.dup(fd) for fd in (sock, errors) for _ in range(10)]
            for fd, place in ((high[9], 3), (high[19], 2)):
                os.dup2(fd, place)
            os.closerange(4, 4096)
            os.execvpe(drop[0], drop + gate, {"PATH": os.environ["PATH"], "LANG": "C.UTF-8"})
        finally:
            os._exit(127)

    # --- the monitor's part --------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            for key, _ in self._selector.select():
                if key.data is None:
                    return
                try:
                    key.data()
                except OSError:
                    self.forget(key.fd)

    def forget(self, fd: int) -> None:
        try:
            self._selector.unregister(fd)
        except KeyError:
            pass

    def listen(self) -> None:
        """Read what the gate says (again)."""
        self._selector.register(self.monitor, selectors.EVENT_READ, self._readable)

    def tell(self, message: ipc.Message, fds: list[int] | tuple[int, ...] = ()) -> None:
        while True:
            try:
                ipc.send_descriptors(self.monitor, message, list(fds))
                return
            except BlockingIOError:  # the gate has not read for a moment
                select.select([], [self.monitor], [], PATIENCE)

    def _readable(self) -> None:
        message = ipc.read_packet(self.monitor.fileno())
        if message is None:
            self.forget(self.monitor.fileno())
            return
        with self._lock:
            self.said.append(message)
            self._lock.notify_all()
        handler = self.on.get(type(message)) or getattr(self, f"_{type(message).__name__.lower()}", None)
        try:
            if handler:
                handler(message)
        except BrokenPipeError:
            pass  # a child whose client is gone already

    def _authenticate(self, message: ipc.Authenticate) -> None:
        self._afids[message.conn, message.afid] = message.uname
        if message.mechanism == "peer":
            self.tell(ipc.Verdict(message.conn, message.afid, 0 if message.uname == "me" else 13, ""))
            return
        child, gate = (each.detach() for each in ipc.socket_pair(socket.SOCK_SEQPACKET))
        try:
            self.tell(ipc.Conversation(message.conn, message.afid), (gate,))
        except OSError:  # the test is over, and so is the gate
            os.close(child)
            return
        finally:
            os.close(gate)
        wanted = [message.uname[::-1]] + (["123456"] if message.uname.startswith("two") else [])
        self._children[child] = (message.conn, message.afid, wanted)
        ipc.write_packet(child, ipc.Prompts(("info", "secret"), ("hello", "Password:")))
        self._selector.register(child, selectors.EVENT_READ, lambda: self._answered(child))

    def _answered(self, child: int) -> None:
        conn, afid, wanted = self._children[child]
        message = ipc.read_packet(child)
        if isinstance(message, ipc.Answer) and message.answer.decode() == wanted[0] and wanted[1:]:
            wanted.pop(0)
            ipc.write_packet(child, ipc.Prompts(("text",), ("Code:",)))
            return
        if isinstance(message, ipc.Answer):
            good = message.answer.decode() == wanted[0]
            ipc.write_packet(child, ipc.Prompts(("info",), ("welcome" if good else "go away",)))
            self.tell(ipc.Verdict(conn, afid, 0 if good else 13, ""))
        self.forget(child)
        del self._children[child]
        os.close(child)

    def _attach(self, message: ipc.Attach) -> None:
        number = self._numbers.setdefault(message.uname, len(self._numbers) + 1)
        session = len(self._sessions) + 100
        self._sessions[session] = number
        self._give(message.conn, message.request, session)

    def _resume(self, message: ipc.Resume) -> None:
        self._give(message.conn, message.request, message.session)

    def _give(self, conn: int, request: int, session: int) -> None:
        number = self._sessions[session]
        if number in self.workers or self.hand_out_dead:
            self.hand_out_dead -= number not in self.workers
            self.tell(ipc.Attached(conn, request, session, number, number))
            return
        worker = self.workers[number] = Worker(self, number)
        try:
            self.tell(ipc.Attached(conn, request, session, number, number), (worker.gate_end,))
        finally:
            os.close(worker.gate_end)
        self._selector.register(worker.fd, selectors.EVENT_READ, worker.readable)

    def _announce(self, message: ipc.Announce) -> None:
        if message.path == "none":
            self.tell(ipc.Refused(message.conn, message.request, 2, ""))
        else:
            self.tell(ipc.Announced(message.conn, message.request, 55, "mind"))

    # --- what tests do -------------------------------------------------------------------------------------------------

    def heard(self, kind: type[ipc.Message], count: int = 1) -> list[Any]:
        """What the gate said of a kind, once it is at least so many."""
        with self._lock:
            found: list[Any] = []

            def enough() -> bool:
                found[:] = [each for each in self.said if type(each) is kind]
                return len(found) >= count

            assert self._lock.wait_for(enough, PATIENCE), f"{count} {kind.__name__}, but the gate said {self.said}"
            return found

    def until(self, condition: Callable[[], object]) -> None:
        """Wait until something is so."""
        end = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < end, "it did not happen"
            time.sleep(0.005)

    def conversing(self) -> int:
        """How many authentication children still have somebody to talk to."""
        return sum(child in self._selector.get_map() for child in list(self._children))

    def release(self, order: int = 1) -> None:
        """Answer the late calls; order -1: the last one first."""
        for worker in list(self.workers.values()):
            late, worker.late = worker.late[::order], []
            for tag, rest in late:
                worker.send(ipc.CALLED, tag, rest)

    def connect(self, **options: Any) -> "Client":
        """A client of the gate."""
        theirs, ours = socket.socketpair()
        for name, size in options.pop("buffers", {}).items():
            for sock in (theirs, ours):
                sock.setsockopt(socket.SOL_SOCKET, getattr(socket, name), size)
        self._conn += 1
        self.tell(ipc.Connection(self._conn, options.pop("peer", "127.0.0.1:9")), (theirs.fileno(),))
        theirs.close()
        client = Client(self.kind, ours, self._conn, **options)
        self.clients.append(client)
        return client

    def exit_code(self) -> int:
        """Wait for the gate's end."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.pid = 0
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.005)
        raise AssertionError("the gate does not end")

    def close(self) -> str:
        """End everything. Returns what the gate wrote to standard error."""
        for client in self.clients:
            client.sock.close()
        self.monitor.close()
        if self.pid:
            self.exit_code()
        os.close(self._stopper)
        self._thread.join()
        for worker in list(self.workers.values()):
            worker.close()
        ipc.close_all(self._children)
        os.close(self._stop)
        self._selector.close()
        text = self.stderr.read().decode()
        self.stderr.close()
        return text
