"""Access tokens: good for five minutes and for one audience, so that whoever was shown one can use it nowhere else.

JWT as RFC 9068 profiles it (`at+jwt`), signed with Ed25519 (RFC 8037) by a key of this store alone."""

import secrets
from dataclasses import dataclass
from pathlib import Path

import jwt
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from qipan.errors import NotAllowed
from qipan.files import secret_in
from qipan.login.roles import ROLES

ACCESS_S = 300.0
ALGORITHM, TYPE = "EdDSA", "at+jwt"
TOKEN_CHARACTERS_MAX = 2000


@dataclass(frozen=True, slots=True)
class Bearer:
    """Whom a token stands for.  `tenant` "": of all.  `session` names what it was given out in, and is no secret.
    `issuer` "": a user of this host, else the OpenID provider that vouched."""

    user: str
    tenant: str
    role: str
    session: str
    issuer: str = ""


class Signer:
    """`path` holds the key, made when it is not there; `audience` names the board that gives out tokens and takes them."""

    def __init__(self, path: Path, audience: str) -> None:
        self.audience = audience
        self._key = _key_in(path)
        self._public = self._key.public_key()

    def sign(self, who: Bearer, now_s: float) -> str:
        claims = {
            "iss": self.audience, "aud": self.audience, "sub": who.user, "tenant": who.tenant, "role": who.role,
            "sid": who.session, "idp": who.issuer, "iat": int(now_s), "exp": int(now_s + ACCESS_S), "jti": secrets.token_hex(8),
        }  # fmt: skip
        return jwt.encode(claims, self._key, ALGORITHM, headers={"typ": TYPE})

    def read(self, token: str, now_s: float) -> Bearer:
        """Raises NotAllowed with what is wrong."""
        if len(token) > TOKEN_CHARACTERS_MAX:
            raise NotAllowed("the access token is too long to be one")
        try:
            if jwt.get_unverified_header(token).get("typ") != TYPE:
                raise NotAllowed("the token is no access token")
            claims = jwt.decode(
                token, self._public, [ALGORITHM], audience=self.audience, issuer=self.audience,
                options={"require": ["iss", "aud", "sub", "iat", "exp"], "verify_exp": False, "verify_iat": False},
            )  # fmt: skip
        except jwt.InvalidTokenError as error:
            raise NotAllowed(f"the access token is refused: {error}") from None
        began_s, until_s = claims["iat"], claims["exp"]
        if not isinstance(began_s, int) or not isinstance(until_s, int) or not began_s - 1 <= now_s < until_s:
            raise NotAllowed("the access token is over; ask for another with your refresh token")
        who = Bearer(*(str(claims.get(name, "")) for name in ("sub", "tenant", "role", "sid", "idp")))
        if who.role not in ROLES:
            raise NotAllowed("the access token names no role that this release knows")
        return who


def _key_in(path: Path) -> Ed25519PrivateKey:
    def make() -> bytes:
        return Ed25519PrivateKey.generate().private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )

    key = serialization.load_pem_private_key(secret_in(path, make), None)
    assert isinstance(key, Ed25519PrivateKey)
    return key
