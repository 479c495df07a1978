"""Quota rules: the checked file, and what follows from the rules at a moment."""

from qipan.rules.entitlement import Holdings, Parks, Refusal, entitled, kept_free, may_borrow, refusal
from qipan.rules.file import check_rules, parse_rules

__all__ = [
    "Holdings", "Parks", "Refusal", "check_rules", "entitled", "kept_free", "may_borrow", "parse_rules", "refusal",
]  # fmt: skip
