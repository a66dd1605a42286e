"""The daemon's TLS key and certificate: made at first start, looked at closely at every later one.

The key is ECDSA P-256; the certificate is signed with it and says nothing that matters, because clients pin the key
(RFC 7469's form of a pin: the hash of the SubjectPublicKeyInfo). Administrators may put a pair of their own in its place.

The composition calls `ensure` in a child of its own: the root daemon never has OpenSSL in its memory.
"""

import base64
import contextlib
import datetime
import hashlib
import os
import stat
import tempfile
from collections.abc import Iterator

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

FILE_MAX = 1024 * 1024
"""Bytes that are read of a key or certificate file: a chain of certificates fits many times over."""

NOT_BEFORE = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)
"""A machine's first start is when its clock is likeliest to be wrong; whoever pins does not ask for dates."""

NOT_AFTER = datetime.datetime(9999, 12, 31, 23, 59, 59, tzinfo=datetime.UTC)
"""RFC 5280, 4.1.2.5: no well-defined date at which it expires."""

RSA_MIN = 2048
"""Bits: what security level 2 of OpenSSL, Debian's, takes."""

PrivateKey = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey
"""What TLS 1.3 servers sign with."""


class KeyFault(Exception):
    """Key or certificate can't be used; the message says which file, why, and what to do."""

    def __init__(self, file: str, reason: str, advice: str) -> None:
        super().__init__(f"{file}: {reason}; {advice}")
        self.file = file


def ensure(key_path: str, cert_path: str) -> None:
    """Make key and certificate where they are missing; check them where they are there.

    key_path, cert_path: absolute paths of the PEM files. The directories are made where they are missing, mode 0700.
    The key comes into being whole and before its certificate, so a crash in between leaves a key for which the next
    start makes a certificate: the pin does not change. Raises KeyFault.
    """
    for path in (key_path, cert_path):
        _ensure_directory(path)
    try:
        if not os.path.lexists(key_path):
            if os.path.lexists(cert_path):
                advice = "put the key back, or move the certificate away"
                raise KeyFault(key_path, f"there is no key for {cert_path}", advice)
            _publish(key_path, _key_pem(ec.generate_private_key(ec.SECP256R1())), 0o600)
        key = _read_key(key_path)
        if not os.path.lexists(cert_path):
            _publish(cert_path, _certificate_pem(key), 0o644)
    except OSError as fault:
        file = str(fault.filename or key_path)
        raise KeyFault(file, str(fault.strerror), "key and certificate can't be made there: see `[paths]`") from None
    if _spki(_read_certificate(cert_path).public_key()) != _spki(key.public_key()):
        raise KeyFault(cert_path, f"is not for the key in {key_path}", "put the pair back that belongs together")


def pin(cert_path: str) -> str:
    """`"sha256:"` and the base64 of the SHA-256 of the certificate's SubjectPublicKeyInfo (DER). Raises KeyFault."""
    digest = hashlib.sha256(_spki(_read_certificate(cert_path).public_key())).digest()
    return "sha256:" + base64.b64encode(digest).decode()


def _spki(key: PublicKeyTypes) -> bytes:
    return key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    plain = serialization.NoEncryption()
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)


def _certificate_pem(key: PrivateKey) -> bytes:
    host = os.uname().nodename[:64] or "localhost"  # 64: upper bound of a common name, RFC 5280 appendix A
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, host)])
    usage = x509.KeyUsage(True, False, False, False, False, False, False, False, False)  # to sign, nothing else
    builder = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), NOT_BEFORE, NOT_AFTER)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
    )
    with contextlib.suppress(ValueError):  # a host name that is none by RFC 5890
        builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(host)]), critical=False)
    digest = None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    return builder.sign(key, digest).public_bytes(serialization.Encoding.PEM)


def _ensure_directory(path: str) -> None:
    directory = os.path.dirname(path)
    try:
        os.makedirs(directory, 0o700, exist_ok=True)
        facts = os.stat(directory)
    except OSError as fault:
        raise KeyFault(directory, str(fault.strerror), "make it, or name another place in `[paths]`") from None
    # Whoever writes in the directory can put another key there, however well the file itself is kept.
    if facts.st_uid not in (0, os.geteuid()):
        raise KeyFault(directory, f"belongs to uid {facts.st_uid}", "it must be root's, or the daemon's own")
    if facts.st_mode & 0o022 and not facts.st_mode & stat.S_ISVTX:
        raise KeyFault(directory, "group or others may write there", f"chmod go-w {directory}")


def _publish(path: str, data: bytes, mode: int) -> None:
    """Put a new file at `path`: all of it, on the disk, or nothing. A file that is there already stays. Raises OSError."""
    directory = os.path.dirname(path)
    fd, temporary = tempfile.mkstemp(prefix=f".{os.path.basename(path)}.", dir=directory)  # O_EXCL, 0600
    try:
        with os.fdopen(fd, "wb") as file:
            os.fchmod(fd, mode)
            file.write(data)
            file.flush()
            os.fsync(fd)
        with contextlib.suppress(FileExistsError):  # another start was faster: its file is as good
            os.link(temporary, path)
    finally:
        os.unlink(temporary)
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _opened(path: str) -> Iterator[int]:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # O_NONBLOCK: not to wait at a pipe
    except OSError as fault:
        raise KeyFault(path, str(fault.strerror), "the daemon must be able to read it") from None
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise KeyFault(path, "is not a regular file", "name another one in `[paths]`")
        yield fd
    finally:
        os.close(fd)


def _read_key(path: str) -> PrivateKey:
    with _opened(path) as fd:
        # Asked of the descriptor, not of the path: it is this file that is then read.
        facts = os.fstat(fd)
        if facts.st_uid not in (0, os.geteuid()):
            raise KeyFault(path, f"belongs to uid {facts.st_uid}", f"chown it to root, or to uid {os.geteuid()}")
        if facts.st_mode & 0o077:
            raise KeyFault(path, f"mode {facts.st_mode & 0o7777:04o}: others may get at it", f"chmod 0600 {path}")
        data = os.read(fd, FILE_MAX)
    try:
        key = serialization.load_pem_private_key(data, None)
    except TypeError:
        raise KeyFault(path, "is encrypted", "a daemon has nobody to ask: store it unencrypted, mode 0600") from None
    except Exception:  # ValueError, UnsupportedAlgorithm, InternalError … whose texts may quote the file
        raise KeyFault(path, "holds no private key in PEM form", "move it away to have a new one made") from None
    if not isinstance(key, PrivateKey):
        raise KeyFault(path, "is of a kind that TLS 1.3 does not sign with", "use ECDSA, RSA or Ed25519")
    # Found here and not by OpenSSL in a gate, which could only die of it, again and again.
    if isinstance(key, rsa.RSAPrivateKey) and key.key_size < RSA_MIN:
        raise KeyFault(path, f"is an RSA key of {key.key_size} bits", f"make one of {RSA_MIN} at least, or use ECDSA")
    return key


def _read_certificate(path: str) -> x509.Certificate:
    with _opened(path) as fd:
        data = os.read(fd, FILE_MAX)
    try:
        return x509.load_pem_x509_certificates(data)[0]
    except ValueError:
        raise KeyFault(path, "holds no certificate in PEM form", "move it away to have a new one made") from None
