"""Quota rules: who may hold how many devices of a board, and what is lent while its owner does not need it."""

from dataclasses import dataclass
from fnmatch import fnmatchcase

from qipan.hardware import BoardId, ChipClassId

DAY_S = 86_400.0


@dataclass(frozen=True, slots=True)
class Loan:
    """When an owner's idle devices may be borrowed, in seconds of the day at `utc_offset_s`, and how long before they are back
    once they are needed.  A window that ends before it begins goes over midnight; equal ends mean always."""

    notice_s: float
    from_s: float = 0.0
    until_s: float = 0.0
    utc_offset_s: float = 8 * 3600.0

    def open_at(self, now_s: float) -> bool:
        if self.from_s == self.until_s:
            return True
        of_day_s = (now_s + self.utc_offset_s) % DAY_S
        if self.from_s < self.until_s:
            return self.from_s <= of_day_s < self.until_s
        return of_day_s >= self.from_s or of_day_s < self.until_s

    def next_change_s(self, now_s: float) -> float | None:
        """When it next opens or closes, after `now_s`."""
        if self.from_s == self.until_s:
            return None
        of_day_s = (now_s + self.utc_offset_s) % DAY_S
        return now_s + min((edge_s - of_day_s) % DAY_S or DAY_S for edge_s in (self.from_s, self.until_s))


@dataclass(frozen=True, slots=True)
class QuotaRule:
    """One tenant's part of one board.

    board    where it holds; "*" for every board
    chips    glob patterns of chip classes, counted together; empty: all
    share    of the board's devices of these chips: the tenant's own, lent whenever it is idle
    floor    devices that are the tenant's own, lent as `loan` says; without one they are kept free
    ceiling  devices that it never exceeds
    borrow   devices that it may hold beyond its own; None: as many as there are
    protect  kinds of its tasks that are never taken back from; they borrow nothing that is lent
    """

    board: BoardId
    tenant: str
    chips: tuple[str, ...] = ()
    share: float = 0.0
    floor: int = 0
    ceiling: int | None = None
    borrow: int | None = None
    loan: Loan | None = None
    protect: tuple[str, ...] = ()

    def covers(self, chip_class: ChipClassId | str) -> bool:
        return not self.chips or any(fnmatchcase(chip_class, pattern) for pattern in self.chips)

    def name(self) -> str:
        """As people see it."""
        chips = f" on {', '.join(self.chips)}" if self.chips else ""
        return f"the quota rule of {self.tenant} at {self.board}{chips}"
