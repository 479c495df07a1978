"""What may be asked of a ledger, and what it answers.  A hold is money set aside in an account of its own, `hold/ID`; it is
captured in parts, and closed once: by its last capture, by a void, or by expiry."""

import hashlib
from dataclasses import dataclass
from enum import StrEnum

from qipan.ledger.transfer import Transfer


class HoldState(StrEnum):
    OPEN = "open"
    POSTED = "posted"
    VOIDED = "voided"
    EXPIRED = "expired"


@dataclass(frozen=True, slots=True)
class Hold:
    """`account` gave the money and gets back what is left.  `expires_s` None: only a person or a payment's proof ends it."""

    hold_id: str
    account: str
    currency: str
    amount_micro: int
    left_micro: int
    expires_s: float | None
    state: HoldState = HoldState.OPEN

    @property
    def own_account(self) -> str:
        return f"hold/{self.hold_id}"


@dataclass(frozen=True, slots=True)
class Post:
    """`owing`: accounts that may go below their floor by this, because the service was already given or the rules say
    that they owe it."""

    transfer: Transfer
    owing: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        return self.transfer.key

    @property
    def body_hash(self) -> str:
        return self.transfer.body_hash


@dataclass(frozen=True, slots=True)
class PlaceHold:
    key: str
    cause: str
    hold_id: str
    account: str
    amount_micro: int
    expires_s: float | None = None
    currency: str = "CNY"

    @property
    def body_hash(self) -> str:
        return _hash("place", self.cause, self.hold_id, self.account, self.amount_micro, self.expires_s, self.currency)  # fmt: skip


@dataclass(frozen=True, slots=True)
class CaptureHold:
    """Pay `amount_micro` out of the hold to `target`; `close` gives the rest back and ends it."""

    key: str
    cause: str
    hold_id: str
    target: str
    amount_micro: int
    close: bool = False

    @property
    def body_hash(self) -> str:
        return _hash("capture", self.cause, self.hold_id, self.target, self.amount_micro, self.close)


@dataclass(frozen=True, slots=True)
class VoidHold:
    key: str
    cause: str
    hold_id: str

    @property
    def body_hash(self) -> str:
        return _hash("void", self.cause, self.hold_id)


@dataclass(frozen=True, slots=True)
class ExpireHold:
    hold_id: str

    @property
    def key(self) -> str:
        return f"expire/{self.hold_id}"

    @property
    def body_hash(self) -> str:
        return _hash("expire", self.hold_id)


Request = Post | PlaceHold | CaptureHold | VoidHold | ExpireHold


@dataclass(frozen=True, slots=True)
class Posted:
    """`transfer` None: nothing moved (an empty hold was closed).  `repeated`: the key was known with this body, nothing was
    done again."""

    key: str
    body_hash: str
    transfer: Transfer | None
    hold: Hold | None = None
    repeated: bool = False


@dataclass(frozen=True, slots=True)
class Refused:
    """`clause` is the rulebook's."""

    key: str
    clause: str
    why: str


Outcome = Posted | Refused


def _hash(*parts: object) -> str:
    return hashlib.blake2b("\n".join(map(repr, parts)).encode(), digest_size=16).hexdigest()
