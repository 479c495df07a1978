"""Contracts: discounts, the platform's fee, vouchers (算力券), bonds.  Shares are parts per million.
Clauses C-1 to C-6 of docs/rules/market.md."""

from collections.abc import Sequence
from dataclasses import dataclass

from qipan.errors import InvalidInput
from qipan.ledger.receipt import PPM, rounded_micro
from qipan.ledger.requests import Refused
from qipan.ledger.transfer import Transfer, move, shown


@dataclass(frozen=True, slots=True)
class Terms:
    """`discounts`: tenant -> share off; `fee_ppm`: of what a provider is paid."""

    fee_ppm: int = 20_000
    discounts: tuple[tuple[str, int], ...] = ()

    def __post_init__(self) -> None:
        for name, share in (("fee", self.fee_ppm), *self.discounts):
            check_share(share, name)

    def net_micro(self, tenant: str, cost_micro: int) -> int:
        return cost_micro - rounded_micro(cost_micro, dict(self.discounts).get(tenant, 0), PPM)

    def fee_micro(self, net_micro: int) -> int:
        return rounded_micro(net_micro, self.fee_ppm, PPM)


@dataclass(frozen=True, slots=True)
class Scheme:
    """A programme of vouchers.  `shares`: origin of the chip ("domestic", "imported", ...) -> share of a paid bill that is given
    back.  `cap_micro_per_firm_year` binds all vouchers of a firm together."""

    scheme_id: str
    shares: tuple[tuple[str, int], ...]
    cap_micro_per_firm_year: int

    def __post_init__(self) -> None:
        for name, share in self.shares:
            check_share(share, name)

    @property
    def account(self) -> str:
        return f"subsidy/{self.scheme_id}"


@dataclass(frozen=True, slots=True)
class Voucher:
    voucher_id: str
    scheme_id: str
    tenant: str
    amount_micro: int
    expires_s: float


@dataclass(frozen=True, slots=True)
class Paid:
    """Proof of payment: a posting by which a tenant paid for chips of an origin."""

    key: str
    tenant: str
    amount_micro: int
    origin: str


def redeem(
    voucher: Voucher,
    scheme: Scheme,
    paid: Paid | None,
    *,
    used_micro: int,
    firm_year_micro: int,
    now_s: float,
) -> Transfer | Refused:
    """`used_micro`: what the voucher gave already; `firm_year_micro`: what the firm got of the scheme this year.  The transfer's key is
    of the payment: a payment is subsidised once, whatever voucher is shown."""
    key = f"voucher/{paid.key if paid else voucher.voucher_id}"
    if voucher.scheme_id != scheme.scheme_id:
        return Refused(key, "C-3", f"voucher {shown(voucher.voucher_id)} is of {shown(voucher.scheme_id)}, not of {shown(scheme.scheme_id)}")  # fmt: skip
    if paid is None:
        return Refused(key, "C-4", f"voucher {shown(voucher.voucher_id)}: no payment is proven; pay first")
    if paid.tenant != voucher.tenant:
        return Refused(key, "C-3", f"voucher {shown(voucher.voucher_id)} is {shown(voucher.tenant)}'s, {shown(paid.tenant)} paid")  # fmt: skip
    if now_s >= voucher.expires_s:
        return Refused(key, "C-5", f"voucher {shown(voucher.voucher_id)} ran out at {voucher.expires_s}, it is {now_s}")  # fmt: skip
    share = dict(scheme.shares).get(paid.origin, 0)
    if share == 0 or paid.amount_micro <= 0:
        return Refused(key, "C-3", f"scheme {shown(scheme.scheme_id)} gives nothing for {paid.amount_micro} on {shown(paid.origin)} chips")  # fmt: skip
    left = min(voucher.amount_micro - used_micro, scheme.cap_micro_per_firm_year - firm_year_micro)
    given = min(rounded_micro(paid.amount_micro, share, PPM), left)
    if given <= 0:
        return Refused(key, "C-6", f"voucher {shown(voucher.voucher_id)} gave {used_micro} of {voucher.amount_micro}, the firm got {firm_year_micro} of {scheme.cap_micro_per_firm_year} this year")  # fmt: skip
    return move(key, voucher.voucher_id, scheme.account, f"tenant/{voucher.tenant}", given)


def lodge(provider: str, amount_micro: int, key: str) -> Transfer:
    return move(key, "bond", f"provider/{provider}", f"bond/{provider}", amount_micro)


def seize(provider: str, amount_micro: int, target: str, key: str, why: str) -> Transfer:
    """A bond pays what its provider owes."""
    return move(key, why, f"bond/{provider}", target, amount_micro)


def check_share(share: int, name: str) -> None:
    """Raises InvalidInput."""
    if not 0 <= share <= PPM:
        raise InvalidInput(f"{shown(name)}: a share of {share} ppm; give 0 to {PPM}")


def split(total: int, weights: Sequence[int]) -> list[int]:
    """`total` in whole parts by `weights`, the largest remainders first, then the earlier: exact (Hamilton's method)."""
    whole = sum(weights)
    if whole <= 0:
        raise InvalidInput(f"nothing to split {total} by: weights {list(weights)[:10]}")
    parts = [total * weight // whole for weight in weights]
    rests = sorted(range(len(weights)), key=lambda i: (-(total * weights[i] % whole), i))
    for i in rests[: total - sum(parts)]:
        parts[i] += 1
    return parts
