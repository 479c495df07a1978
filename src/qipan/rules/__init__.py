"""Quota rules: the checked file, and what follows from the rules at a moment."""

from qipan.rules.entitlement import (
    Holdings,
    Parks,
    Refusal,
    beyond_own,
    entitled,
    kept_free,
    may_borrow,
    refusal,
    shortfall,
)
from qipan.rules.file import check_rules, parse_rules

__all__ = [
    "Holdings", "Parks", "Refusal", "beyond_own", "check_rules", "entitled", "kept_free", "may_borrow", "parse_rules", "refusal",
    "shortfall",
]  # fmt: skip
