"""A daemon that is none: it speaks the protocol from a thread per connection, over a real Unix socket or real TLS.

It keeps fids and afids as the real one does, calls functions for endpoints, and can be told to misbehave.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import pwd
import socket
import threading
import time
from collections.abc import Callable, Iterator
from errno import EACCES, EBADF, ECANCELED, EEXIST, EKEYEXPIRED, ENOENT, EOPNOTSUPP, ESTALE
from pathlib import Path
from typing import Any, TypeAlias

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from OpenSSL import SSL

from srpcd.wire import frames, messages
from srpcd.wire.errors import WireError
from srpcd.wire.messages import Prompt

Endpoint: TypeAlias = Callable[[bytes, bytes], "bytes | tuple[bytes, bytes] | None"]
"""(payload, metadata) to the reply; None is never answered, until it is flushed. WireError is answered as an error."""


def certificate(host: str = "localhost", issuer: Any = None) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, host)])
    now = datetime.datetime.now(datetime.UTC)
    signer, issuer_name = (key, name) if issuer is None else (issuer[1], issuer[0].subject)
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(issuer_name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(host)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
    )
    return builder.sign(signer, hashes.SHA256()), key


class Peer:
    """One connection, as the fake daemon sees it."""

    def __init__(self, daemon: FakeDaemon, connected: socket.socket) -> None:
        self.daemon = daemon
        self.socket = connected
        if connected.family != socket.AF_UNIX:
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.stream: Any = connected
        self.fids: dict[int, str] = {}
        self.qids: dict[int, str] = {}
        self.users: dict[int, str] = {}
        self.afids: dict[int, list[Any]] = {}  # afid: [uname, prompts still to be answered or None, answers]
        self.pending: dict[int, int] = {}
        self.listens: dict[int, int] = {}
        self.expired: set[int] = set()
        self.lock = threading.Lock()

    def send(self, kind: int, seq: int, body: bytes | messages.Message = b"") -> None:
        self.raw(frames.frame(kind, seq, body if isinstance(body, bytes) else messages.encode(body)))

    def raw(self, data: bytes) -> None:
        with self.lock:
            self.stream.sendall(data)

    def fail(self, seq: int, errno: int, message: str = "") -> bool:
        self.raw(messages.error_frame(seq, errno, message))
        return True

    def run(self) -> None:
        reader = frames.FrameReader(frames.REQUESTS)
        try:
            if self.daemon.context is not None:
                self.stream = self.daemon.wrap(self.socket, self.daemon.context)
            while data := self.stream.recv(65536):
                self.daemon.bytes_received += len(data)
                for kind, seq, body in reader.feed(data):
                    self.daemon.received.append((kind, seq, body))
                    try:
                        self.serve(kind, seq, body)
                    except WireError as fault:
                        self.fail(seq, fault.errno, fault.message)
        except (OSError, SSL.Error, ValueError):  # ValueError: hung up before it began
            pass
        finally:
            self.socket.close()

    def hang_up(self) -> None:
        """Only shut down: its own thread closes, so that the descriptor's number can't be another's meanwhile."""
        try:
            self.socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass

    def serve(self, kind: int, seq: int, body: bytes) -> None:
        override = self.daemon.on.get(kind)
        if override is not None and override(self, seq, body):
            return
        if kind == frames.CALL:
            fid, rest = messages.split_call(body)
            self.call(seq, fid, *messages.split_call_reply(rest))
        elif kind == frames.FLUSH:
            (victim,) = frames.SEQ.unpack(body)
            if self.pending.pop(victim, None) is not None:
                self.fail(victim, ECANCELED)
            self.send(frames.FLUSH_REPLY, seq)
        elif kind == frames.PING:
            self.send(frames.PING_REPLY, seq, messages.PingReply(self.daemon.tree))
        else:
            message = messages.decode(messages.REQUEST_TYPES[kind], body)
            getattr(self, frames.NAMES[kind])(seq, message)

    def auth(self, seq: int, m: messages.Auth) -> None:
        if m.afid in self.afids or m.afid in self.fids:
            raise WireError(EEXIST)
        if m.mechanism == "peer":
            if m.uname not in self.daemon.local_users:
                raise WireError(EACCES)
            self.afids[m.afid] = [m.uname, None, []]
            self.send(frames.AUTH_REPLY, seq, messages.AuthReply())
        else:
            self.afids[m.afid] = [m.uname, list(self.daemon.conversation), []]
            self.send(frames.AUTH_REPLY, seq, messages.AuthReply(self.daemon.conversation[0]))

    def append(self, seq: int, m: messages.Append) -> None:
        if m.fid not in self.afids:
            self.daemon.calls.append((self.fids[m.fid], m.data.encode(), b""))
            reply = self.daemon.endpoints[self.fids[m.fid]](m.data.encode(), b"")
            assert isinstance(reply, bytes)
            self.send(frames.APPEND_REPLY, seq, messages.AppendReply(reply.decode()))
            return
        uname, steps, answers = self.afids[m.fid]
        answers.append(m.data)
        wanted = sum(p.style in ("secret", "text") for step in self.daemon.conversation for p in step)
        done = sum(p.style in ("secret", "text") for p in steps[0])
        asked = sum(
            p.style in ("secret", "text")
            for step in self.daemon.conversation[: len(self.daemon.conversation) - len(steps)]
            for p in step
        )
        if len(answers) == wanted:
            good = self.daemon.accounts.get(uname) == answers
            if good:
                self.afids[m.fid][1] = None
            self.send(frames.APPEND_REPLY, seq, messages.AppendReply("1" if good else "0", self.daemon.last_words or None))
        elif len(answers) == asked + done:
            steps.pop(0)
            self.send(frames.APPEND_REPLY, seq, messages.AppendReply("", steps[0]))
        else:
            self.send(frames.APPEND_REPLY, seq, messages.AppendReply("", []))

    def attach(self, seq: int, m: messages.Attach) -> None:
        if m.afid not in self.afids or self.afids[m.afid][1] is not None or self.afids[m.afid][0] != m.uname:
            raise WireError(EACCES)
        self.users[m.fid] = m.uname
        self.place(seq, frames.ATTACH_REPLY, m.fid, m.aname.strip("/"))

    def walk(self, seq: int, m: messages.Walk) -> None:
        self.check(m.fid)
        self.users[m.newfid] = self.users[m.fid]
        self.place(
            seq, frames.WALK_REPLY, m.newfid, "/".join(messages.split_path(self.fids[m.fid]) + messages.split_path(m.path))
        )

    def check(self, fid: int) -> None:
        if fid in self.expired:
            raise WireError(EKEYEXPIRED)
        if fid not in self.fids:
            raise WireError(EBADF)

    def place(self, seq: int, kind: int, fid: int, path: str) -> None:
        if fid in self.fids:
            raise WireError(EEXIST)
        qid = self.daemon.qid(path)
        self.fids[fid], self.qids[fid] = path, qid
        self.send(kind, seq, messages.Qid(qid, path not in self.daemon.endpoints))

    def call(self, seq: int, fid: int, payload: bytes, metadata: bytes) -> None:
        self.check(fid)
        path = self.fids[fid]
        if self.daemon.qid(path) != self.qids[fid]:
            raise WireError(ESTALE)
        self.daemon.calls.append((path, payload, metadata))
        reply = self.daemon.endpoints[path](payload, metadata)
        if reply is None:
            self.pending[seq] = fid
        else:
            payload, metadata = (reply, b"") if isinstance(reply, bytes) else reply
            self.send(frames.CALL_REPLY, seq, messages.call_reply_body(payload, metadata))

    def stat(self, seq: int, m: messages.Stat) -> None:
        self.check(m.fid)
        path = self.fids[m.fid]
        is_dir = path not in self.daemon.endpoints
        prefix = f"{path}/" if path else ""
        names = sorted({e.removeprefix(prefix).partition("/")[0] for e in self.daemon.endpoints if e.startswith(prefix)})
        page = [name for name in names if name > m.after][: min(m.limit, self.daemon.page)] if is_dir else []
        reply = messages.StatReply(
            qid=self.qids[m.fid],
            name=path.rpartition("/")[2],
            is_dir=is_dir,
            children=None if path in self.daemon.unreadable else page,
            more=bool(page) and page[-1] != names[-1],
            mode=0o755 if is_dir else 0o620,
            uid=0,
            gid=0,
            user="root",
            group="calc",
            context=None,
            mtime=1_700_000_000_000_000_000,
            kind="directory" if is_dir else "service",
            live=True,
        )
        self.send(frames.STAT_REPLY, seq, reply)

    def clunk(self, seq: int, m: messages.Clunk) -> None:
        if m.fid in self.listens:
            self.fail(self.listens.pop(m.fid), ECANCELED)
        elif self.fids.pop(m.fid, None) is None and self.afids.pop(m.fid, None) is None:
            raise WireError(EBADF)
        self.send(frames.CLUNK_REPLY, seq, messages.Empty())

    def announce(self, seq: int, m: messages.Announce) -> None:
        if self.daemon.context is not None:
            raise WireError(EOPNOTSUPP)
        self.daemon.announced.append(m.path)
        self.fids[m.fid] = m.path
        self.send(frames.ANNOUNCE_REPLY, seq, messages.AnnounceReply(self.daemon.warning))

    def listen(self, seq: int, m: messages.Listen) -> None:
        self.listens[m.fid] = seq
        self.daemon.listening.set()


def server_stream(connected: socket.socket, context: SSL.Context) -> Any:
    """TLS as OpenSSL makes it."""
    tls = SSL.Connection(context, connected)
    tls.set_accept_state()
    tls.do_handshake()
    return tls


class FakeDaemon:
    """endpoints: path to function. received: all frames. calls: (path, payload, metadata) of those that were delivered."""

    def __init__(self, address: str, listener: socket.socket, context: SSL.Context | None, pin: str) -> None:
        self.address = address
        self.pin = pin
        self.context = context
        self.wrap: Callable[[socket.socket, SSL.Context], Any] = server_stream
        self.listener = listener
        self.endpoints: dict[str, Endpoint] = {
            "echo": lambda payload, metadata: (payload, metadata),
            "calc/add": lambda payload, _: str(sum(map(int, payload.split()))).encode(),
            "calc/never": lambda *_: None,
        }
        self.every_qid = ""  # of every path, whether there is something or not
        self.generation: dict[str, int] = {}  # of a path; another one is another file
        self.accounts = {"alice": ["secret"], "bob": ["hunter2"]}
        self.local_users = {"alice", pwd.getpwuid(os.geteuid()).pw_name}
        self.conversation = [[Prompt("secret", "Password: ")]]
        self.last_words: list[Prompt] = []
        self.unreadable: set[str] = set()
        self.page = 2
        self.tree: str | None = None
        self.warning: str | None = None
        self.on: dict[int, Callable[[Peer, int, bytes], object]] = {}
        self.received: list[tuple[int, int, bytes]] = []
        self.calls: list[tuple[str, bytes, bytes]] = []
        self.announced: list[str] = []
        self.listening = threading.Event()
        self.bytes_received = 0
        self.peers: list[Peer] = []
        self._threads: list[threading.Thread] = []
        self.start()

    def start(self) -> None:
        accepting = threading.Thread(target=self._accept, args=(self.listener,), daemon=True)
        accepting.start()
        self._threads.append(accepting)

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                connected, _ = listener.accept()
            except OSError:
                return
            peer = Peer(self, connected)
            self.peers.append(peer)
            thread = threading.Thread(target=peer.run, daemon=True)
            thread.start()
            self._threads.append(thread)

    def qid(self, path: str) -> str:
        if self.every_qid:
            return self.every_qid
        known = path == "" or any(e == path or e.startswith(f"{path}/") for e in self.endpoints)
        if not known:
            raise WireError(ENOENT)
        return f"1:{sum(path.encode()) + 1000 * self.generation.get(path, 0)}"

    def kinds(self) -> list[str]:
        return [frames.NAMES[kind] for kind, _seq, _body in list(self.received)]

    def count(self, name: str) -> int:
        return self.kinds().count(name)

    def wait_for(self, condition: Callable[[], object], seconds: float = 5) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"did not happen; received: {self.kinds()}"
            time.sleep(0.005)

    def drop_connections(self) -> None:
        for peer in self.peers:
            peer.hang_up()
        self.peers.clear()

    def tell_line(self, number: int) -> None:
        for peer in self.peers:
            for seq in peer.listens.values():
                peer.send(frames.LISTEN_REPLY, seq, messages.ListenReply(number))

    def stop(self) -> None:
        try:
            self.listener.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        self.listener.close()
        self.drop_connections()
        for thread in self._threads:
            thread.join(5)


@pytest.fixture
def local(tmp_path: Path) -> Iterator[FakeDaemon]:
    """A daemon on a Unix socket."""
    path = tmp_path / "srpc.sock"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    daemon = FakeDaemon(f"unix:{path}", listener, None, "")
    yield daemon
    daemon.stop()


def tls_context(pair: tuple[x509.Certificate, ec.EllipticCurvePrivateKey], alpn: bytes = b"srpc/1") -> SSL.Context:
    context = SSL.Context(SSL.TLS_SERVER_METHOD)
    context.use_certificate(pair[0])
    context.use_privatekey(pair[1])
    context.set_alpn_select_callback(lambda _connection, offered: alpn if alpn in offered else SSL.NO_OVERLAPPING_PROTOCOLS)
    return context


MakeRemote: TypeAlias = Callable[..., FakeDaemon]


@pytest.fixture
def make_remote() -> Iterator[MakeRemote]:
    """Makes daemons that speak TLS."""
    made: list[FakeDaemon] = []

    def make(pair: Any = None, alpn: bytes = b"srpc/1", listener: socket.socket | None = None) -> FakeDaemon:
        from srpc_client import pin_of  # noqa: PLC0415

        pair = pair or certificate()
        listener = listener or socket.create_server(("127.0.0.1", 0))
        daemon = FakeDaemon(f"localhost:{listener.getsockname()[1]}", listener, tls_context(pair, alpn), pin_of(pair[0]))
        made.append(daemon)
        return daemon

    yield make
    for daemon in made:
        daemon.stop()


@pytest.fixture
def remote(make_remote: MakeRemote) -> FakeDaemon:
    """A daemon that speaks TLS with a self-signed certificate."""
    return make_remote()


@pytest.fixture
def make_certificate() -> Callable[..., tuple[x509.Certificate, ec.EllipticCurvePrivateKey]]:
    """Makes certificates: for a host, and signed by an issuer."""
    return certificate


class FakeLine:
    """A line as the monitor makes it, and the worker's end of it. What is written before the service comes, waits for it."""

    def __init__(self, runtime: Path, number: int, caller: messages.Caller | None) -> None:
        self.number = number
        self.path = runtime / "lines" / str(os.geteuid()) / str(number)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self.path))
        self._listener.listen(0)
        self._lock = threading.Lock()
        self._waiting = b"" if caller is None else frames.frame(frames.CALLER, 0, messages.encode(caller))
        self.socket: socket.socket | None = None
        self.reader = frames.FrameReader(frames.LINE_REPLIES)
        self.answers: dict[int, tuple[int, bytes]] = {}
        self._thread = threading.Thread(target=self._accept)
        self._thread.start()

    def _accept(self) -> None:
        try:
            connected, _address = self._listener.accept()
        except OSError:  # hung up
            return
        with self._lock:
            connected.sendall(self._waiting)
            self.socket = connected

    def write(self, data: bytes) -> None:
        with self._lock:
            if self.socket is None:
                self._waiting += data
                return
        self.socket.sendall(data)

    def call(self, seq: int, payload: bytes, metadata: bytes = b"") -> None:
        self.write(frames.frame(frames.CALL, seq, messages.call_body(0, payload, metadata)))

    def flush(self, seq: int) -> None:
        self.write(frames.frame(frames.FLUSH, 0, frames.SEQ.pack(seq)))

    def read(self) -> bool:
        """Read what there is. Returns whether the service still has its end."""
        if self.socket is None:
            return True
        try:
            data = self.socket.recv(65536, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return True
        except ConnectionResetError:  # it has not read all
            return False
        for kind, seq, body in self.reader.feed(data):
            assert seq not in self.answers, "answered twice"
            self.answers[seq] = kind, body
        return bool(data)

    def answer(self, seq: int) -> tuple[int, bytes]:
        deadline = time.monotonic() + 5
        while seq not in self.answers:
            self.read()
            assert time.monotonic() < deadline, "no answer"
            time.sleep(0.002)
        return self.answers[seq]

    def reply(self, seq: int) -> bytes:
        kind, body = self.answer(seq)
        assert kind == frames.CALL_REPLY, body
        return messages.split_call_reply(body)[0]

    def error(self, seq: int) -> messages.Error:
        kind, body = self.answer(seq)
        assert kind == frames.ERROR
        return messages.decode(messages.Error, body)

    def hang_up(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()
        if self.socket is not None:
            self.socket.close()


MakeLine: TypeAlias = Callable[..., FakeLine]

ALICE = messages.Caller(1001, 1001, [1001, 2000], "alice", None, "/calc/add")


@pytest.fixture
def make_line(tmp_path: Path) -> Iterator[MakeLine]:
    """Makes lines beside the local daemon's socket."""
    made: list[FakeLine] = []

    def make(number: int = 1, caller: messages.Caller | None = ALICE) -> FakeLine:
        line = FakeLine(tmp_path, number, caller)
        made.append(line)
        return line

    yield make
    for line in made:
        line.hang_up()


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A tree with one directory in it."""
    root = tmp_path / "tree"
    (root / "calc").mkdir(parents=True)
    return root
