"""TLS as a client: 1.3 only, ALPN `srpc/1`, and a server that proves who it is *before* anything is sent to it.

Either by pins (its key is one of those given; names, dates and authorities do not matter then) or by a certificate
authority and its host name. There is no mode without either.
"""

import base64
import hashlib
import ipaddress
from collections.abc import Iterable
from errno import EPROTO
from typing import Literal, TypeAlias

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from OpenSSL import SSL

from srpc_client.errors import PinMismatch, SrpcError, UntrustedServer

ALPN = b"srpc/1"

Authority: TypeAlias = str | Literal[True]
"""Path of a PEM file with certificates of authorities, or True for those that the system trusts."""


def pin_of(certificate: x509.Certificate) -> str:
    """The pin of a certificate: `sha256:` and the base64 of the SHA-256 of its SubjectPublicKeyInfo (as in RFC 7469)."""
    key = certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return "sha256:" + base64.b64encode(hashlib.sha256(key).digest()).decode()


def checked_pins(pins: str | Iterable[str]) -> frozenset[str]:
    """Pins, one or several, as a set. Raises ValueError for one that is none: a typo must not look like an attack."""
    found = frozenset([pins] if isinstance(pins, str) else pins)
    for pin in found:
        try:
            kind, _, digest = pin.partition(":")
            valid = kind == "sha256" and len(base64.b64decode(digest, validate=True)) == 32
        except ValueError:
            valid = False
        if not valid:
            raise ValueError(f"{pin!r} is no pin: sha256: and 44 characters of base64 are, as `srpc pin` prints them")
    if not found:
        raise ValueError("no pin was given: an empty set would match no server")
    return found


class Handshake:
    """One TLS connection that is being made, over a connected non-blocking socket.

    pins: of which the server's key must be one. ca: else, the authority. host: the name that the certificate must have
    with `ca`; also sent as SNI.
    """

    def __init__(self, fd_owner: object, host: str, pins: frozenset[str] | None, ca: Authority | None) -> None:
        if (pins is None) == (ca is None):
            raise ValueError("give either pins= or ca=: a server that proves nothing is not talked to")
        self._host, self._pins = host, pins
        self.pin = ""
        """The pin of the key that the server showed."""
        context = SSL.Context(SSL.TLS_CLIENT_METHOD)
        context.set_min_proto_version(SSL.TLS1_3_VERSION)
        context.set_alpn_protos([ALPN])
        # No callback of ours in it: where SELinux or the service manager forbids memory that is written and then executed,
        # none can be made. With pins only the key itself counts, so that what the chain lacks (it is self-signed, it has
        # expired) is no reason, and a good chain no excuse: OpenSSL has nothing to say then, and `step` decides.
        context.set_verify(SSL.VERIFY_NONE if ca is None else SSL.VERIFY_PEER)
        if ca is True:
            context.set_default_verify_paths()
        elif ca is not None:
            try:
                context.load_verify_locations(ca)
            except SSL.Error:
                raise ValueError(f"{ca}: no certificates of authorities could be read from it") from None
        self.connection = SSL.Connection(context, fd_owner)  # type: ignore[arg-type]
        if not _is_address(host):
            self.connection.set_tlsext_host_name(host.encode("idna"))
        self.connection.set_connect_state()

    def step(self) -> Literal["done", "read", "write"]:
        """Go on as far as the socket allows. "read" or "write": what to wait for before the next step.

        Raises PinMismatch, UntrustedServer; SrpcError where the other end does not speak TLS 1.3 and `srpc/1`.
        """
        try:
            self.connection.do_handshake()
        except SSL.WantReadError:
            return "read"
        except SSL.WantWriteError:
            return "write"
        except SSL.Error as fault:
            raise self._failure(fault) from None
        # The handshake has proved that the server has this key. Nothing but our Finished has gone out.
        shown = self.connection.get_peer_certificate()
        if shown is None:
            raise UntrustedServer(message="the server showed no certificate")
        try:
            certificate = shown.to_cryptography()
            self.pin = pin_of(certificate)
            named = self._pins is not None or names_host(certificate, self._host)
        except Exception as fault:  # OpenSSL takes certificates that cryptography refuses, each with an error of its own
            raise UntrustedServer(message=f"the server's certificate can't be read: {fault}") from None
        if self._pins is not None and self.pin not in self._pins:
            raise self._mismatch()
        if not named:
            raise self._wrong_name()
        if self.connection.get_alpn_proto_negotiated() != ALPN:
            raise SrpcError(EPROTO, "the server does not speak srpc/1: is another service on this port?")
        return "done"

    def _mismatch(self) -> PinMismatch:
        return PinMismatch(
            message=f"the server's key is {self.pin}, which is not pinned: somebody may be in between, or the server"
            " has a new key; ask its administrator for the pin before you use it",
            found=self.pin,
        )

    def _wrong_name(self) -> UntrustedServer:
        message = (
            f"the server's certificate is not for {self._host!r}: pin its key, or call it by the name in the certificate"
        )
        return UntrustedServer(message=message)

    def _failure(self, fault: SSL.Error) -> SrpcError:
        reasons = [str(entry[-1]) for entry in fault.args[0]] if fault.args and isinstance(fault.args[0], list) else []
        if any("certificate verify failed" in reason for reason in reasons):
            if self._pins is not None:
                return self._mismatch()
            return UntrustedServer(
                message="no trusted authority vouches for the server's certificate: pin its key, or give the authority's"
                " certificate (ca=, or srpc --ca)"
            )
        if isinstance(fault, SSL.SysCallError):
            return SrpcError(EPROTO, "the server ended the connection during the TLS handshake: is it an sRPC server?")
        return SrpcError(EPROTO, f"no TLS 1.3 with srpc/1 at the other end: {', '.join(filter(None, reasons)) or fault}")


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return True


def names_host(certificate: x509.Certificate, host: str) -> bool:
    """Whether a certificate is for this host: by its subjectAltName only, `*` for a whole left-most label (RFC 9525)."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return False
    if _is_address(host):
        return ipaddress.ip_address(host.partition("%")[0]) in names.get_values_for_type(x509.IPAddress)
    wanted = host.encode("idna").decode().lower().rstrip(".")
    for name in names.get_values_for_type(x509.DNSName):
        pattern = name.lower().rstrip(".")
        if pattern == wanted:
            return True
        rest = wanted.partition(".")[2]
        if pattern.startswith("*.") and "." in rest and pattern[2:] == rest:
            return True
    return False
