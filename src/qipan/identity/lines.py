"""Encrypted lines between those who hold one secret, such as the sites of one task: TLS 1.3, both sides with the certificate
that follows from the secret.  Whoever does not hold it can neither read along nor answer, and nothing but it is handed out."""

import hashlib
import os
import ssl
import tempfile
from datetime import UTC, datetime
from functools import lru_cache

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.x509.oid import NameOID

HANDSHAKE_S = 10.0
#: a secret ends with what it is for, so its certificate has no end of its own
ALWAYS = datetime(2000, 1, 1, tzinfo=UTC), datetime(9999, 1, 1, tzinfo=UTC)


def line_name(of: str) -> str:
    """What a caller asks for (SNI), where one listener holds several secrets: a name of letters and digits alone."""
    return hashlib.blake2b(of.encode(), digest_size=16).hexdigest()


@lru_cache(maxsize=64)
def line_context(secret: str, *, answers: bool) -> ssl.SSLContext:
    """For whoever connects, or `answers`.  The same secret gives the same certificate anywhere, byte for byte."""
    key = Ed25519PrivateKey.from_private_bytes(hashlib.blake2b(secret.encode(), digest_size=32).digest())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "a holder of the secret")])
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), 1, *ALWAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, None)
    )
    pem = certificate.public_bytes(serialization.Encoding.PEM)
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if answers else ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False  # who holds the secret is right, wherever it stands
    context.verify_mode = ssl.CERT_REQUIRED
    if answers:
        context.num_tickets = (
            0  # a caller that only speaks would close with them unread, and its last words be lost
        )
    context.load_verify_locations(cadata=pem.decode())
    handle, path = tempfile.mkstemp()  # readable by its owner alone; ssl takes keys from files only
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(private + pem)
        context.load_cert_chain(path)
    finally:
        os.unlink(path)
    return context
