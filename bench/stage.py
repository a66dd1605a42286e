"""The stage: daemons, and the processes that serve and call, each as the user that it would be.

As root: throwaway users in a private mount namespace (`tests.realm`); services as `svc`, callers over TLS as `alice`.
As an ordinary user there is nobody whose password is known, so a personal daemon is called over its Unix socket, and
gRPC over one too, without TLS. `transport` says which of the two it was.
"""

import datetime
import ipaddress
import os
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any, Self, TypeVar

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from bench import compiled
from bench.plan import Contender
from bench.running import Program, python
from tests import realm

T = TypeVar("T")

HERE = Path(__file__).resolve().parent

CALLER, SERVICE = "alice", "svc"

LIMITS = {"connections": 8192, "connections_per_address": 8192, "strangers": 1024, "strangers_per_address": 1024}
"""What the bench asks of a daemon beyond the defaults: a thousand users here come from one address, not from a thousand."""

_people: set[str] = set()

RESIDENT = """#!{python} -I
import sys
sys.path[:0] = {path!r}
from srpc_client.stdio import serve_stdio

{define} echo(request):
    return request.payload

serve_stdio(echo)
"""


class Stage:
    """All that a measurement needs to be there. A context manager: whatever it started ends with it.

    private: root's realm with its users, where TLS is used; else personal mode and Unix sockets.
    """

    def __init__(self) -> None:
        place = realm.enter()
        self.private = place.private
        self.transport = "TLS" if self.private else "Unix socket"
        # The package where other users can read it: the checkout may lie in a closed directory.
        self._code = place.root / "bench"
        shutil.rmtree(self._code, ignore_errors=True)
        shutil.copytree(HERE, self._code / "bench", ignore=shutil.ignore_patterns("__pycache__"))
        self._key, self._certificate = _certificate()
        (self._code / "key.pem").write_text(self._key)
        (self._code / "certificate.pem").write_text(self._certificate)
        for parent, _directories, files in os.walk(self._code):
            Path(parent).chmod(0o755)
            for name in files:
                Path(parent, name).chmod(0o644)
        self.daemon = realm.Daemon({"log": {"level": "info"}, "limits": LIMITS})
        self._lasting = self._now = ExitStack()
        self._servers: dict[tuple[object, ...], tuple[Program | None, dict[str, Any]]] = {}
        self._callers: dict[Contender, Program] = {}
        self.versions: dict[str, str] = {}
        """Of peers that say theirs when they start."""

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.enter_context(self.daemon)
            self.directory(self.daemon, "bench")
            self._lasting = self._now = stack.pop_all()
        return self

    def __exit__(self, *how: Any) -> None:
        self._lasting.__exit__(*how)

    # --- callers and servers --------------------------------------------------------------------------------------

    def caller(self, contender: Contender) -> Program:
        """The contender's caller, connected and ready; it and its server are started where they do not run yet.

        Raises Missing, Broken.
        """
        if contender not in self._callers:
            with self._for_good():
                self._callers[contender] = self._call(contender)
        return self._callers[contender]

    def _call(self, contender: Contender) -> Program:
        setup = self.serving(contender)[1]
        if contender.local and "dial" in setup:
            setup = {**setup, "dial": {"address": f"unix:{self.daemon.local}"}}
        return self.program(*contender.caller, CALLER, setup)

    def server(self, contender: Contender) -> Program | None:
        """The process that answers the contender's calls; None where a worker starts it. Raises Missing, Broken."""
        return self.serving(contender)[0]

    def serving(self, contender: Contender) -> tuple[Program | None, dict[str, Any]]:
        """The process that answers (see `server`), and what its callers are told. Raises Missing, Broken."""
        key = (contender.server, contender.options)
        if key not in self._servers:
            with self._for_good():
                self._servers[key] = self._serve(contender)
        return self._servers[key]

    def _serve(self, contender: Contender) -> tuple[Program | None, dict[str, Any]]:
        """Start the contender's server. Returns it, and what its callers are told."""
        module, role = contender.server
        if not module:
            return None, {}
        if module == "program":
            path, file = self.installed(role)
            return None, {"path": path, "program": str(file), "dial": self.dial()}
        if module == "srpc_echo":
            options = dict(contender.options)
            server = self.service(self.daemon, role, options)
            return server, {"path": options["path"], "dial": self.dial()}
        setup: dict[str, Any] = {}
        if self.private and not contender.local:
            setup = {"key": self._key, "certificate": self._certificate}
        else:
            setup = {"local": f"unix:{realm.enter().temporary}/{module}-{role.replace(' ', '-')}"}
        server = self.program(module, role, SERVICE, setup)
        if "version" in server.ready:
            self.versions["gRPC C++"] = server.ready["version"]
        return server, {**setup, "address": server.ready["address"]}

    def parties(self, contender: Contender) -> dict[str, int]:
        """The processes that have a part in the contender's calls, by role. They must run. Raises Missing, Broken."""
        caller, server = self.caller(contender), self.server(contender)
        if contender.caller[0] == "srpc_echo":
            kind = "local" if contender.local or not self.private else "tls"
            uid = realm.account(CALLER).uid if self.private else os.getuid()
            worker = next(each for each in self.daemon.processes("worker") if each.uid == uid)
            service = server.pid if server else realm.descendants(worker.pid)[-1].pid
            gate = self.daemon.processes("gate", kind)[0]
            return {
                "caller": caller.pid,
                "gate": gate.pid,
                "worker": worker.pid,
                "service": service,
                "monitor": self.daemon.pid,
            }
        if server:
            return {"caller": caller.pid, "server": server.pid}
        hops = [each.pid for each in realm.descendants(caller.pid)]
        return {"caller": caller.pid, **dict(zip(("gate", "worker", "service"), hops, strict=False))}

    def service(self, daemon: realm.Daemon, role: str, options: dict[str, Any], mode: int = 0o620) -> Program:
        """A service of `bench.programs.srpc_echo` that has announced its paths. Raises Broken, DaemonFault.

        options: path, or paths; handler. mode: of the endpoints, which belong to the group calc.
        """
        paths = options.get("paths") or [options["path"]]
        group = realm.group("calc") if self.private else None
        before = len(daemon.events("announce", outcome="granted"))
        setup = {"handler": options["handler"], "paths": paths, "group": group, "mode": mode}
        server = self.program("srpc_echo", role, SERVICE, {**setup, "local": f"unix:{daemon.local}"})
        if role == "service":  # the blocking one says itself when all is announced
            daemon.wait_event("announce", 20, before + len(paths), outcome="granted")
        return server

    def program(self, module: str, role: str, user: str, setup: dict[str, Any]) -> Program:
        """Start a program of the bench, to be ended with the stage (or `meanwhile`). Raises Missing, Broken."""
        command = self._native(role, setup) if module == "native" else python(str(self._code), module, role)
        program = Program(f"{module} {role}", command, user if self.private else None, setup)
        return self._now.enter_context(program)

    def keep(self, context: AbstractContextManager[T]) -> T:
        """Enter a context that is left as programs are ended."""
        return self._now.enter_context(context)

    @contextmanager
    def meanwhile(self) -> Iterator[None]:
        """What is started meanwhile ends with it, but for contenders' callers and servers."""
        with ExitStack() as own, self._into(own):
            yield

    def _for_good(self) -> AbstractContextManager[None]:
        return self._into(self._lasting)

    @contextmanager
    def _into(self, stack: ExitStack) -> Iterator[None]:
        before, self._now = self._now, stack
        try:
            yield
        finally:
            self._now = before

    def _native(self, role: str, setup: dict[str, Any]) -> list[str]:
        name, _, part = role.partition(" ")
        binary = self._code / name
        if not binary.exists():
            shutil.copy(compiled.program(name), binary)
            binary.chmod(0o755)
        if not part:
            return [str(binary)]
        if "certificate" not in setup:
            return [str(binary), part, setup.get("address") or setup["local"]]
        certificate = str(self._code / "certificate.pem")
        if part == "server":
            return [str(binary), part, "127.0.0.1:0", str(self._code / "key.pem"), certificate]
        return [str(binary), part, setup["address"], certificate]

    # --- the tree -------------------------------------------------------------------------------------------------

    def dial(self, user: str = CALLER, daemon: realm.Daemon | None = None) -> dict[str, Any]:
        """Arguments of `dial` for this user."""
        daemon = daemon or self.daemon
        if not self.private:
            return {"address": f"unix:{daemon.local}"}
        return {"address": daemon.address, "pins": [daemon.pin], "user": user, "password": realm.password(user)}

    def directory(self, daemon: realm.Daemon, name: str, owner: str | None = SERVICE) -> Path:
        """A directory of the tree. owner: None: whoever runs this."""
        made = daemon.tree / name
        made.mkdir(exist_ok=True)
        made.chmod(0o755)
        if self.private and owner:
            os.chown(made, realm.account(owner).uid, realm.group("calc"))
        return made

    def installed(self, name: str) -> tuple[str, Path]:
        """A program endpoint: its path in the tree, and its file."""
        file = self.directory(self.daemon, "programs", None) / name
        if name == "cat":
            shutil.copy("/bin/cat", file)
            file.chmod(0o755)
        else:
            define = "async def" if name.endswith("asyncio") else "def"
            text = RESIDENT.format(python=realm.PYTHON, path=realm.enter().path, define=define)
            realm.install(file, text, 0o1755, uid=os.getuid(), gid=os.getgid())
        return f"/programs/{name}", file


def people(prefix: str, number: int) -> list[str]:
    """Names of so many users of the realm, who are made where they are not there yet."""
    names = [f"{prefix}{each:04d}" for each in range(number)]
    realm.add(realm.Account(name) for name in names if name not in _people)
    _people.update(names)
    return names


def _certificate() -> tuple[str, str]:
    """(key, certificate) in PEM for gRPC's servers, of the kind that srpcd makes for itself: ECDSA P-256."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "bench")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return private.decode(), certificate.public_bytes(Encoding.PEM).decode()
