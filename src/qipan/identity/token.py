"""Invitations: a token that lets one board join at one place, once."""

import base64
import hashlib
import secrets
from dataclasses import dataclass

import msgspec

from qipan.errors import InvalidInput

PREFIX = "qipan-join-"


class Token(msgspec.Struct, frozen=True):
    """What the invited board needs: where to connect, whom to trust, who it will be.  `secret` is known to the
    inviting board only as a digest.  `may_invite`: it gets an authority for its own children."""

    url: str
    root: bytes  # the grid's root certificate, DER
    place: tuple[str, ...]
    provider: str
    secret: str
    role: str = "board"
    may_invite: bool = False

    def encode(self) -> str:
        return PREFIX + base64.urlsafe_b64encode(msgspec.msgpack.encode(self)).decode().rstrip("=")

    @classmethod
    def decode(cls, text: str) -> "Token":
        text = text.strip()
        if not text.startswith(PREFIX):
            raise InvalidInput(
                f"{text[:20]!r}... is no join token; `qipan grid invite` prints one ({PREFIX}...)"
            )
        body = text.removeprefix(PREFIX)
        try:
            return msgspec.msgpack.decode(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)), type=cls)
        except (ValueError, msgspec.MsgspecError):
            raise InvalidInput("the join token is damaged; copy it whole, it is one line") from None


@dataclass(frozen=True, slots=True)
class Invite:
    """The inviting board's side of a token.  `used_s` None: not used yet."""

    digest: str
    place: tuple[str, ...]
    provider: str
    until_s: float
    role: str = "board"
    may_invite: bool = False
    used_s: float | None = None


def new_secret() -> str:
    return secrets.token_urlsafe(24)


def digest_of(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
