"""Who leads a board that has a standby: its own process, or the standby.  Pure rules; times are monotonic seconds of whoever
asks, and no two hosts' times are compared.

A board leads while most of the boards right below it follow it; each follows one process at a time, and for `lead_s`.  The
child asks, and sends back the stamp of the answer before: a leader counts from its own stamp, the child from when the answer came, which is
later.  So when most children have been without an answer for `lead_s`, the old leader has stopped leading.  A claim has a number, the
*reign*; a child that took a later reign never again follows an earlier one.
"""

from collections.abc import Collection
from dataclasses import dataclass, field

#: of the lease of a task: a standby must lead, and renew, before leases end
SHARE = 0.25
#: clocks of two hosts may run so much unlike each other
DRIFT = 1.1
#: a report of silence is as good as the child's next one is far
FRESH_S = 5.0
#: reigns go up one by one; nobody is believed who knows of one so far ahead
REIGNS_AHEAD_MAX = 1000


def lead_s_of(lease_s: float) -> float:
    return lease_s * SHARE


def most(voters: Collection[str], those: Collection[str]) -> bool:
    """More than half, and at least one."""
    return 2 * len(set(voters) & set(those)) > len(voters)


@dataclass(slots=True)
class Lead:
    """A leader's side.  `stamps`: child -> the newest of our own stamps that it sent back.  `shipped`: the voters that the standby
    counts, None while it counts none and cannot claim."""

    lead_s: float
    stamps: dict[str, float] = field(default_factory=dict)
    shipped: frozenset[str] | None = None

    def came_back(self, child: str, stamp_s: float | None, now_s: float) -> None:
        """A stamp that is not before now is none of this process's."""
        if stamp_s is not None and stamp_s <= now_s:
            self.stamps[child] = max(self.stamps.get(child, stamp_s), stamp_s)

    def followers(self, now_s: float) -> set[str]:
        return {child for child, stamp_s in self.stamps.items() if now_s < stamp_s + self.lead_s}

    def leads(self, voters: Collection[str], now_s: float) -> bool:
        """Most of those below now, and most of those that the standby may count yet."""
        if not self.shipped:
            return True
        followers = self.followers(now_s)
        return most(voters, followers) and most(self.shipped, followers)


@dataclass(slots=True)
class Follow:
    """A child's side: the reign that it follows, and when it last heard from its leader."""

    reign: int
    heard_s: float
    lead_s: float
    leaderless_s: float | None = None  # since when the process that it follows says that it does not lead

    def silent_s(self, now_s: float) -> float:
        return now_s - self.heard_s

    def looks_around(self, now_s: float) -> bool:
        """Whether it asks the standby, too."""
        waits = self.leaderless_s is not None and now_s > self.leaderless_s + self.lead_s
        return waits or self.silent_s(now_s) > self.lead_s / 2

    def takes(self, reign: int, leads: bool, now_s: float) -> bool:
        """A later reign: when its leader was silent for long enough, or when that one leads already, since then most of the others
        have left the earlier one."""
        return reign > self.reign and (leads or self.silent_s(now_s) >= self.lead_s * DRIFT)


@dataclass(slots=True)
class Claim:
    """A standby's side.  `reports`: child -> (how long it heard nothing from the leader, when it said so)."""

    lead_s: float
    reports: dict[str, tuple[float, float]] = field(default_factory=dict)
    claimed: int = 0  # the reign that it claims; 0: none
    granted: set[str] = field(default_factory=set)

    def told(self, child: str, silent_s: float, reign: int, now_s: float) -> None:
        self.reports[child] = (silent_s, now_s)
        if self.claimed and reign == self.claimed:
            self.granted.add(child)

    def silent(self, now_s: float) -> set[str]:
        return {
            child
            for child, (silent_s, at_s) in self.reports.items()
            if silent_s >= self.lead_s * DRIFT and now_s <= at_s + FRESH_S
        }

    def may_claim(self, voters: Collection[str], now_s: float) -> bool:
        return not self.claimed and most(voters, self.silent(now_s))

    def may_lead(self, voters: Collection[str]) -> bool:
        return self.claimed > 0 and most(voters, self.granted)
