"""Certificates: what an authority issues, and what it refuses to sign.  Time is handed in."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from qipan.errors import InvalidInput
from qipan.identity.names import Unknown, host_of, spiffe_of

AUTHORITY_S = 10 * 365 * 86400.0
BOARD_S = 86400.0  # renewed at half of it
#: clocks of two hosts may differ by so much
SKEW_S = 900.0
LEVELS_BELOW_MAX = 6


@dataclass(frozen=True, slots=True)
class Authority:
    """It signs for the place `place` and below.  `chain`: its certificate and those above it, without the root's when
    it is not the root itself."""

    place: tuple[str, ...]
    key: ec.EllipticCurvePrivateKey
    chain: tuple[x509.Certificate, ...]

    @property
    def above(self) -> tuple[x509.Certificate, ...]:
        """What a certificate needs beside it to be traced to the root.  A standby's authority has the name of the one that signed it,
        its board's, as the root has its own: only the root stands alone."""
        is_root = len(self.chain) == 1 and self.chain[0].issuer == self.chain[0].subject
        return () if is_root else self.chain

    @classmethod
    def root(cls, name: str, now_s: float) -> "Authority":
        key = ec.generate_private_key(ec.SECP256R1())
        subject = _subject(f"root of {host_of((name,))}")
        built = _authority(subject, subject, key.public_key(), (name,), LEVELS_BELOW_MAX, now_s, AUTHORITY_S)
        built = built.add_extension(
            x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False
        )
        return cls((name,), key, (built.sign(key, hashes.SHA256()),))

    def board(
        self,
        request: bytes,
        place: tuple[str, ...],
        now_s: float,
        life_s: float = BOARD_S,
        role: str = "board",
    ) -> x509.Certificate:
        """A board's certificate for the key in a signing request.  Raises Unknown, InvalidInput."""
        csr = check_request(request, place, role)
        self._check_below(place)
        built = (
            _names(_subject(host_of(place)), self.chain[0].subject, csr.public_key(), now_s, life_s)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(
                x509.SubjectAlternativeName([x509.UniformResourceIdentifier(spiffe_of(place, role))]),
                critical=False,
            )
            .add_extension(
                x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH]),
                critical=False,
            )
            .add_extension(_usage(signs=False), critical=True)
            .add_extension(self._signed_by(), critical=False)
        )
        return built.sign(self.key, hashes.SHA256())

    def below(self, request: bytes, place: tuple[str, ...], now_s: float) -> x509.Certificate:
        """An authority's certificate for a board that may have children: names below its own only."""
        csr = check_request(request, place)
        self._check_below(place)
        levels = LEVELS_BELOW_MAX - (len(place) - 1)
        subject = _subject(f"authority of {host_of(place)}")
        built = _authority(
            subject, self.chain[0].subject, csr.public_key(), place, levels, now_s, AUTHORITY_S / 10
        ).add_extension(self._signed_by(), critical=False)
        built = built.add_extension(
            x509.SubjectKeyIdentifier.from_public_key(csr.public_key()), critical=False
        )
        return built.sign(self.key, hashes.SHA256())

    def _check_below(self, place: tuple[str, ...]) -> None:
        if place[: len(self.place)] != self.place:
            raise Unknown(f"{'/'.join(place)} is not below {'/'.join(self.place)}")

    def _signed_by(self) -> x509.AuthorityKeyIdentifier:
        return x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key())


def make_request(key: ec.EllipticCurvePrivateKey, place: tuple[str, ...], role: str = "board") -> bytes:
    """A signing request (PEM) for a board's key."""
    names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(spiffe_of(place, role))])
    built = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(_subject(host_of(place)))
        .add_extension(names, critical=False)
    )
    return built.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def make_authority_request(key: ec.EllipticCurvePrivateKey, place: tuple[str, ...]) -> bytes:
    """It asks for nothing but a signature: what its holder may do is the signer's decision."""
    return make_request(key, place)


def check_request(
    request: bytes, place: tuple[str, ...], role: str = "board"
) -> x509.CertificateSigningRequest:
    """Raises Unknown when the request asks for more than the name that was invited, or its key is weak or not its
    sender's."""
    try:
        csr = x509.load_pem_x509_csr(request)
        signed = csr.is_signature_valid
        extensions = list(csr.extensions)
    except (ValueError, InvalidSignature) as error:
        raise InvalidInput(f"unreadable signing request: {error}") from None
    if not signed:
        raise Unknown("the request is not signed with the key that it names")
    key = csr.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise Unknown(f"the key is {type(key).__name__}; a board's key is on the curve P-256")
    wanted = [x509.UniformResourceIdentifier(spiffe_of(place, role))]
    for extension in extensions:
        value = extension.value
        if isinstance(value, x509.BasicConstraints) and value.ca:
            raise Unknown(
                "the request asks to be an authority (CA:TRUE); an authority is given by the invite only"
            )
        if not isinstance(value, x509.SubjectAlternativeName):
            raise Unknown(
                f"the request asks for {extension.oid.dotted_string}; it may name the board and no more"
            )
        if list(value) != wanted:
            raise Unknown(
                f"the request names {[str(name.value) for name in value]}, the invite {wanted[0].value}"
            )
    return csr


def _subject(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name[:64])])


def _names(
    subject: x509.Name, issuer: x509.Name, key: object, now_s: float, life_s: float
) -> x509.CertificateBuilder:
    now = datetime.fromtimestamp(now_s, UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)  # type: ignore[arg-type]
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(seconds=min(SKEW_S, life_s)))
        .not_valid_after(now + timedelta(seconds=life_s))
    )


def _authority(
    subject: x509.Name,
    issuer: x509.Name,
    key: object,
    place: tuple[str, ...],
    levels: int,
    now_s: float,
    life_s: float,
) -> x509.CertificateBuilder:
    host = host_of(place)
    allowed: Sequence[x509.GeneralName] = [
        x509.UniformResourceIdentifier(host), x509.UniformResourceIdentifier(f".{host}"),
    ]  # fmt: skip
    return (
        _names(subject, issuer, key, now_s, life_s)
        .add_extension(x509.BasicConstraints(ca=True, path_length=levels), critical=True)
        .add_extension(_usage(signs=True), critical=True)
        .add_extension(x509.NameConstraints(allowed, None), critical=True)
    )


def _usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs, content_commitment=False, key_encipherment=False, data_encipherment=False,
        key_agreement=False, key_cert_sign=signs, crl_sign=signs, encipher_only=False, decipher_only=False,
    )  # fmt: skip
