"""Names: a board at the place cn/east/dc1 of the grid is `spiffe://dc1.east.cn.qipan/board`.

The place stands in the host part, because URI name constraints (RFC 5280, 4.2.1.10) see only that part.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from qipan.errors import InvalidInput, NotAllowed

SUFFIX = "qipan"
NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,40}[a-z0-9])?")
#: what a certificate may be for: a board, or the standby of one
ROLES = ("board", "standby")


class Unknown(NotAllowed):
    """A peer whose identity is refused; the message says why."""


@dataclass(frozen=True, slots=True)
class Peer:
    """Who is at the other end.  `place` from the top down."""

    place: tuple[str, ...]
    role: str
    serial: int
    until_s: float

    @property
    def name(self) -> str:
        return self.place[-1]


def host_of(place: tuple[str, ...]) -> str:
    """Raises InvalidInput when a name cannot stand in a host name."""
    for name in place:
        if not NAME.fullmatch(name):
            raise InvalidInput(
                f"{name[:60]!r} cannot name a board of a grid; use a-z, 0-9 and -, at most 42, such as dc1"
            )
    return ".".join((*reversed(place), SUFFIX))


def spiffe_of(place: tuple[str, ...], role: str = "board") -> str:
    return f"spiffe://{host_of(place)}/{role}"


def peer_of(certificate: bytes) -> Peer:
    """Who a certificate (DER, its chain already verified) names.  Raises Unknown when that is not exactly one board."""
    try:
        cert = x509.load_der_x509_certificate(certificate)
        names = cert.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (ValueError, x509.ExtensionNotFound) as error:
        raise Unknown(f"the certificate has no readable name ({error})") from None
    uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    if len(uris) != 1 or len(list(names)) != 1:
        raise Unknown(f"a board's certificate has one URI as its name, this one has {[*names]}"[:300])
    found = re.fullmatch(r"spiffe://([a-z0-9.-]{1,400})/([a-z]{1,20})", uris[0])
    if found is None or found[2] not in ROLES:
        raise Unknown(f"{uris[0][:200]!r} is no board's name; it looks like spiffe://dc1.cn.{SUFFIX}/board")
    *below, suffix = found[1].split(".")
    if suffix != SUFFIX or not below or not all(NAME.fullmatch(name) for name in below):
        raise Unknown(f"{uris[0][:200]!r} is no board's name; its host ends in .{SUFFIX}")
    if _is_authority(cert):
        raise Unknown("an authority's certificate was shown where a board's is needed")
    if not _may_speak(cert):
        raise Unknown("the certificate is not for TLS clients and servers both")
    return Peer(tuple(reversed(below)), found[2], cert.serial_number, cert.not_valid_after_utc.timestamp())


def expects(place: tuple[str, ...], roles: tuple[str, ...] = ("board",)) -> Callable[[bytes], None]:
    """A check that a certificate is of the board at `place`, or has another of the roles for it.  It raises Unknown."""

    def check(certificate: bytes) -> None:
        peer = peer_of(certificate)
        if peer.place != place or peer.role not in roles:
            found = "/".join(peer.place) + (f" ({peer.role})" if peer.role != "board" else "")
            raise Unknown(f"expected the {' or '.join(roles)} {'/'.join(place)}, found {found}")

    return check


def _is_authority(cert: x509.Certificate) -> bool:
    try:
        return cert.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except x509.ExtensionNotFound:
        return False


def _may_speak(cert: x509.Certificate) -> bool:
    try:
        usage = cert.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    except x509.ExtensionNotFound:
        return False
    return ExtendedKeyUsageOID.CLIENT_AUTH in usage and ExtendedKeyUsageOID.SERVER_AUTH in usage
