"""The stage: a daemon, and the processes that serve and call, each as the user that it would be.

As root: throwaway users in a private mount namespace (`tests.realm`); services as `svc`, callers over TLS as `alice`.
As an ordinary user there is nobody whose password is known, so a personal daemon is called over its Unix socket, and
gRPC over one too, without TLS. `transport` says which of the two it was.
"""

import datetime
import ipaddress
import os
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from bench.plan import Contender
from bench.running import Broken, Program
from tests import realm

HERE = Path(__file__).resolve().parent

CALLER, SERVICE = "alice", "svc"


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
        shutil.copytree(HERE, self._code / "bench", ignore=shutil.ignore_patterns("__pycache__"))
        for parent, _directories, files in os.walk(self._code):
            Path(parent).chmod(0o755)
            for name in files:
                Path(parent, name).chmod(0o644)
        self.daemon = realm.Daemon({"log": {"level": "info"}})
        self._everything = ExitStack()
        self._servers: dict[tuple[tuple[str, str], tuple[tuple[str, str], ...]], dict[str, Any]] = {}
        self._key, self._certificate = _certificate()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.enter_context(self.daemon)
            directory = self.daemon.tree / "bench"
            directory.mkdir()
            directory.chmod(0o755)
            if self.private:
                os.chown(directory, realm.account(SERVICE).uid, realm.group("calc"))
            self._everything = stack.pop_all()
        return self

    def __exit__(self, *how: Any) -> None:
        self._everything.__exit__(*how)

    def caller(self, contender: Contender) -> Program:
        """The contender's caller, connected and ready; its server is started where it does not run yet.

        Raises Missing, Broken.
        """
        key = (contender.server, contender.options)
        if key not in self._servers:
            self._servers[key] = self._serve(contender)
        module, role = contender.caller
        return self._program(module, role, CALLER, self._servers[key])

    def dial(self, user: str = CALLER) -> dict[str, Any]:
        """Arguments of `dial` for this user."""
        if not self.private:
            return {"address": f"unix:{self.daemon.local}"}
        password = realm.password(user)
        return {"address": self.daemon.address, "pins": [self.daemon.pin], "user": user, "password": password}

    def _serve(self, contender: Contender) -> dict[str, Any]:
        """Start the contender's server. Returns what its callers are told."""
        module, role = contender.server
        options = dict(contender.options)
        if module == "srpc_echo":
            self._program(module, role, SERVICE, {**options, "local": f"unix:{self.daemon.local}"})
            pipe = self.daemon.tree / options["path"].strip("/")
            if not realm.until(pipe.is_fifo, 20):
                raise Broken(
                    f"{options['path']} has not been announced; the daemon's log:\n{self.daemon.log_text()[-2000:]}"
                )
            if self.private:
                os.chown(pipe, realm.account(SERVICE).uid, realm.group("calc"))  # alice may call by her group
            return {"path": options["path"], "dial": self.dial()}
        if self.private:
            pair = {"key": self._key, "certificate": self._certificate}
            served = self._program(module, role, SERVICE, pair)
            return {"address": served.ready["address"], "certificate": self._certificate}
        served = self._program(module, role, SERVICE, {"local": f"unix:{self.daemon.directory}/{module}-{role}"})
        return {"address": served.ready["address"]}

    def _program(self, module: str, role: str, user: str, setup: dict[str, Any]) -> Program:
        program = Program(str(self._code), module, role, user if self.private else None, setup)
        return self._everything.enter_context(program)


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
