"""The TLS key and certificate: made once, whole, for nobody else's eyes; and refused with words that help."""

import base64
import hashlib
import os
import stat
import subprocess
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa, x25519

from srpcd import keys
from tests import realm

Pair = tuple[Path, Path]


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    """Paths in a directory that does not exist yet."""
    return tmp_path / "keys/key.pem", tmp_path / "keys/cert.pem"


def ensure(pair: Pair) -> None:
    keys.ensure(str(pair[0]), str(pair[1]))


def fault(pair: Pair) -> str:
    with pytest.raises(keys.KeyFault) as caught:
        ensure(pair)
    return str(caught.value)


def pem(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey | x25519.X25519PrivateKey) -> bytes:
    encryption = serialization.NoEncryption()
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_the_first_start_makes_a_pair_that_only_the_daemon_can_read(pair: Pair, umask: int) -> None:
    before = os.umask(umask)
    try:
        ensure(pair)
    finally:
        os.umask(before)
    assert (mode(pair[0]), mode(pair[0].parent) & 0o077) == (0o600, 0)
    certificate = x509.load_pem_x509_certificate(pair[1].read_bytes())
    key = certificate.public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    assert key.curve.name == "secp256r1"
    certificate.verify_directly_issued_by(certificate)
    assert sorted(os.listdir(pair[0].parent)) == ["cert.pem", "key.pem"], "nothing else is left there"


def test_a_later_start_changes_nothing(pair: Pair) -> None:
    ensure(pair)
    before = [(path.read_bytes(), path.stat().st_mtime_ns, path.stat().st_ino) for path in pair]
    ensure(pair)
    assert [(path.read_bytes(), path.stat().st_mtime_ns, path.stat().st_ino) for path in pair] == before


def test_the_pin_is_that_of_openssl(pair: Pair) -> None:
    ensure(pair)
    der = subprocess.run(
        ["/bin/sh", "-c", f"openssl x509 -in {pair[1]} -noout -pubkey | openssl pkey -pubin -outform DER"],
        capture_output=True,
        check=False,
    ).stdout
    if not der:
        pytest.skip("needs the openssl command")
    assert keys.pin(str(pair[1])) == "sha256:" + base64.b64encode(hashlib.sha256(der).digest()).decode()


def test_a_crash_between_key_and_certificate_keeps_the_pin(pair: Pair) -> None:
    ensure(pair)
    pin = keys.pin(str(pair[1]))
    pair[1].unlink()
    ensure(pair)
    assert keys.pin(str(pair[1])) == pin


def test_a_write_that_fails_leaves_neither_file(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert "No space left on device" in fault(pair)
    assert os.listdir(pair[0].parent) == []
    monkeypatch.undo()
    ensure(pair)


def test_two_first_starts_at_once_agree(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    link = os.link

    def late(source: str, target: str) -> None:
        monkeypatch.setattr(os, "link", link)
        ensure(pair)  # the other start, just before ours
        link(source, target)

    monkeypatch.setattr(os, "link", late)
    ensure(pair)
    assert sorted(os.listdir(pair[0].parent)) == ["cert.pem", "key.pem"]


@pytest.mark.parametrize("bits", [0o640, 0o604, 0o660, 0o610])
def test_a_key_that_others_may_get_at_is_refused(pair: Pair, bits: int) -> None:
    ensure(pair)
    pair[0].chmod(bits)
    assert fault(pair) == f"{pair[0]}: mode {bits:04o}: others may get at it; chmod 0600 {pair[0]}"


@pytest.mark.parametrize("bits", [0o770, 0o707, 0o777])
def test_a_directory_that_others_may_write_is_refused(pair: Pair, bits: int) -> None:
    ensure(pair)
    pair[0].parent.chmod(bits)
    assert "group or others may write there; chmod go-w" in fault(pair)


@pytest.mark.needs_root
def test_a_key_or_directory_of_somebody_else_is_refused(pair: Pair) -> None:
    ensure(pair)
    uid = realm.account("alice").uid
    os.chown(pair[0], uid, -1)
    assert f"{pair[0]}: belongs to uid {uid}; chown it to root" in fault(pair)
    os.chown(pair[0], 0, -1)
    os.chown(pair[0].parent, uid, -1)
    assert f"{pair[0].parent}: belongs to uid {uid}" in fault(pair)


def test_key_and_certificate_have_to_belong_together(pair: Pair) -> None:
    ensure(pair)
    pair[0].write_bytes(pem(ec.generate_private_key(ec.SECP256R1())))
    assert f"{pair[1]}: is not for the key in {pair[0]}" in fault(pair)


def test_a_certificate_without_its_key_is_refused_and_not_replaced(pair: Pair) -> None:
    ensure(pair)
    certificate = pair[1].read_bytes()
    pair[0].unlink()
    assert f"{pair[0]}: there is no key for {pair[1]}" in fault(pair)
    assert (pair[0].exists(), pair[1].read_bytes()) == (False, certificate)


@pytest.mark.parametrize("content", [b"", b"\0\xff", b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"])
def test_a_file_without_a_key_or_certificate_is_refused(pair: Pair, content: bytes) -> None:
    ensure(pair)
    good = pair[0].read_bytes()
    pair[0].write_bytes(content)
    assert f"{pair[0]}: holds no private key in PEM form" in fault(pair)
    pair[0].write_bytes(good)
    pair[1].write_bytes(content)
    assert f"{pair[1]}: holds no certificate in PEM form" in fault(pair)
    with pytest.raises(keys.KeyFault, match="holds no certificate"):
        keys.pin(str(pair[1]))


def test_an_encrypted_key_is_refused(pair: Pair) -> None:
    ensure(pair)
    key = ec.generate_private_key(ec.SECP256R1())
    encryption = serialization.BestAvailableEncryption(b"x")
    pair[0].write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption))
    assert f"{pair[0]}: is encrypted" in fault(pair)


def test_a_key_that_can_not_sign_is_refused(pair: Pair) -> None:
    ensure(pair)
    pair[0].write_bytes(pem(x25519.X25519PrivateKey.generate()))
    assert f"{pair[0]}: is of a kind that TLS 1.3 does not sign with" in fault(pair)


def test_an_rsa_key_that_openssl_would_not_take_is_refused(pair: Pair) -> None:
    ensure(pair)
    pair[0].write_bytes(pem(rsa.generate_private_key(65537, 1024)))
    assert f"{pair[0]}: is an RSA key of 1024 bits; make one of 2048 at least" in fault(pair)


@pytest.mark.parametrize("kind", ["rsa", "ed25519"])
def test_an_administrators_own_key_gets_a_certificate(pair: Pair, kind: str) -> None:
    pair[0].parent.mkdir(mode=0o700)
    key = rsa.generate_private_key(65537, 2048) if kind == "rsa" else ed25519.Ed25519PrivateKey.generate()
    pair[0].write_bytes(pem(key))
    pair[0].chmod(0o600)
    ensure(pair)
    assert keys.pin(str(pair[1])).startswith("sha256:")


def test_a_chain_is_pinned_by_its_first_certificate(pair: Pair, tmp_path: Path) -> None:
    ensure(pair)
    other = tmp_path / "other/key.pem", tmp_path / "other/cert.pem"
    ensure(other)
    pin = keys.pin(str(pair[1]))
    pair[1].write_bytes(pair[1].read_bytes() + other[1].read_bytes())
    ensure(pair)
    assert keys.pin(str(pair[1])) == pin


@pytest.mark.parametrize("which", [0, 1])
def test_what_is_no_file_is_refused_without_waiting(pair: Pair, which: int) -> None:
    ensure(pair)
    pair[which].unlink()
    os.mkfifo(pair[which], 0o600)
    assert f"{pair[which]}: is not a regular file" in fault(pair)
    pair[which].unlink()
    pair[which].symlink_to("nowhere")
    assert f"{pair[which]}: No such file or directory" in fault(pair)


def test_a_place_where_nothing_can_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert f"{tmp_path / 'file'}: " in fault((tmp_path / "file/key.pem", tmp_path / "file/cert.pem"))


def test_no_word_of_the_key_is_in_a_fault(pair: Pair) -> None:
    ensure(pair)
    text = pair[0].read_text().replace("A", "B")
    pair[0].write_text(text)
    body = text.splitlines()[1]
    with pytest.raises(keys.KeyFault) as caught:
        ensure(pair)
    assert body not in str(caught.value)
