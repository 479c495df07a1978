"""The API for people on other hosts: HTTPS on a port, with the operator's certificate or one made here."""

import ipaddress
import re
import socket
import ssl
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from qipan.errors import InvalidInput
from qipan.files import write_whole

LIFE_S, HALF = 365 * 86_400.0, 0.5


@dataclass(frozen=True, slots=True)
class Listen:
    """`certificate` and `key` are PEM files; without them `api.pem` and `api.key` of the store's folder, made here."""

    host: str
    port: int
    certificate: Path | None = None
    key: Path | None = None


def listen_of(text: str, certificate: Path | None, key: Path | None) -> Listen:
    """HOST:PORT, or a port of every address.  Raises InvalidInput."""
    host, port = host_and_port(text)
    if (certificate is None) != (key is None):
        raise InvalidInput("a certificate has a key: name both, --api-cert and --api-key, or neither")
    for path in (certificate, key):
        if path is not None and not path.is_file():
            raise InvalidInput(f"{path}: no such file")
    return Listen(host, port, certificate, key)


def host_and_port(text: str) -> tuple[str, int]:
    """Of HOST:PORT, :PORT or PORT to listen at; the last two mean every address.  Raises InvalidInput."""
    host, _, port = text.rpartition(":")
    if not re.fullmatch("[0-9]{1,5}", port) or int(port) > 65535:
        raise InvalidInput(f"{text[:60]!r} is no HOST:PORT to listen at, such as 0.0.0.0:8444")
    return host.strip("[]") or "0.0.0.0", int(port)


def bound(listen: Listen) -> socket.socket:
    """Raises InvalidInput when the port is taken."""
    family = socket.AF_INET6 if ":" in listen.host else socket.AF_INET
    line = socket.socket(family, socket.SOCK_STREAM)
    line.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        line.bind((listen.host, listen.port))
    except OSError as error:
        line.close()
        raise InvalidInput(
            f"cannot listen at {listen.host}:{listen.port} ({error}); give another --api"
        ) from None
    line.listen(2048)
    return line


def certificate_for(listen: Listen, folder: Path) -> tuple[Path, Path]:
    """(certificate, key).  What is made here names this host and the address; it is made anew at half its life, for another
    address, and when it cannot be read.  Raises InvalidInput when the operator's own cannot."""
    if listen.certificate is not None and listen.key is not None:
        try:
            _load(listen.certificate, listen.key)
        except OSError as error:
            raise InvalidInput(
                f"{listen.certificate} and {listen.key} are no certificate and its key in PEM, without a passphrase ({error});"
                " name a pair with --api-cert and --api-key, or neither"
            ) from None
        return listen.certificate, listen.key
    certificate, key = folder / "api.pem", folder / "api.key"
    names = names_of(listen)
    if not _still_good(certificate, key, names):
        _make(certificate, key, names)
    return certificate, key


def names_of(listen: Listen) -> list[x509.GeneralName]:
    """Under which others reach it."""
    texts = {socket.gethostname(), "localhost", "127.0.0.1", "::1", listen.host} - {"0.0.0.0", "::"}
    return [_name(text) for text in sorted(texts)]


def _name(text: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(text))
    except ValueError:
        return x509.DNSName(text)


def _load(certificate: Path, key: Path) -> None:
    """As the server will.  Raises OSError (ssl.SSLError is one)."""
    ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password="")


def _still_good(certificate: Path, key: Path, names: list[x509.GeneralName]) -> bool:
    try:
        _load(certificate, key)
        cert = x509.load_pem_x509_certificate(certificate.read_bytes())
        held = set(cert.extensions.get_extension_for_class(x509.SubjectAlternativeName).value)
    except (OSError, ValueError, x509.ExtensionNotFound):
        return False
    left = cert.not_valid_after_utc - datetime.now(UTC)
    return set(names) <= held and left.total_seconds() > LIFE_S * HALF


def _make(certificate: Path, key_path: Path, names: list[x509.GeneralName]) -> None:
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "qipan API")])
    cert = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=15))
        .not_valid_after(now + timedelta(seconds=LIFE_S))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .sign(key, hashes.SHA256())
    )
    body = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    for path, content, mode in ((key_path, body, 0o600), (certificate, cert.public_bytes(serialization.Encoding.PEM), 0o644)):  # fmt: skip
        write_whole(path, content, mode)
