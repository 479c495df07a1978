"""What a construct of a script means on a target."""

from dataclasses import dataclass
from typing import Literal

Verdict = Literal["runs", "rewritten", "blocks"]


@dataclass(frozen=True, slots=True)
class Finding:
    """`line` from 1, of the original.  `new` is what stands there after the rewriting, empty unless rewritten."""

    line: int
    verdict: Verdict
    construct: str
    why: str
    new: str = ""
