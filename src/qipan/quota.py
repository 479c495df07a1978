"""Quota rules: who may hold how many devices of a board, and what is lent while its owner does not need it."""

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from qipan.hardware import BoardId, ChipClassId
from qipan.quantities import format_duration

DAY_S = 86_400.0
#: so many preemptions of a task, and of a tenant's tasks on one chip class, a board remembers, and for so long: no `Rate` asks for more
REMEMBERED, REMEMBERED_S = 64, 7 * DAY_S


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
class Rate:
    """At most `most` within any `window_s` seconds."""

    most: int
    window_s: float

    def reached(self, times_s: Iterable[float], now_s: float) -> bool:
        return sum(1 for at_s in times_s if at_s > now_s - self.window_s) >= self.most

    def __str__(self) -> str:
        return f"{self.most} in {format_duration(self.window_s)}"


@dataclass(frozen=True, slots=True)
class Idle:
    """A lease whose devices were busy for less than `below` of `for_s` seconds is lent `notice_s` after its holder was told, and
    is back as soon once the holder asks."""

    below: float
    for_s: float
    notice_s: float


@dataclass(frozen=True, slots=True)
class QuotaRule:
    """One tenant's part of one board; `tenant` "*" in a rule of `per_task`, `per_tenant` and `idle` alone: of every tenant.

    board    where it holds; "*" for every board
    chips    glob patterns of chip classes, counted together; empty: all
    share    of the board's devices of these chips: the tenant's own, lent whenever it is idle
    floor    devices that are the tenant's own, lent as `loan` says; without one they are kept free
    ceiling  devices that it never exceeds
    borrow   devices that it may hold beyond its own; None: as many as there are
    protect  kinds of its tasks that are never taken back from; they borrow nothing that is lent
    per_task, per_tenant   how often the board parks one task of the tenant, or any of them, for others
    idle     when a lease of its tasks is lent because its devices stand idle
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
    per_task: Rate | None = None
    per_tenant: Rate | None = None
    idle: Idle | None = None

    def about(self, tenant: str) -> bool:
        return self.tenant in ("*", tenant)

    def covers(self, chip_class: ChipClassId | str) -> bool:
        return not self.chips or any(fnmatchcase(chip_class, pattern) for pattern in self.chips)

    def name(self) -> str:
        """As people see it."""
        chips = f" on {', '.join(self.chips)}" if self.chips else ""
        whose = "every tenant" if self.tenant == "*" else self.tenant
        return f"the quota rule of {whose} at {self.board}{chips}"
