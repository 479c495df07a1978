"""Metering: cumulative counters heal loss, and repeats are harmless.  Clauses M-1 to M-5 of docs/rules/grid.md.

An event is named by (node, lease, boot, sequence).  Its counters count from the boot of the node, so one that is lost is made
good by the next; what an event adds is the difference from the newest one of its boot."""

import math
from dataclasses import astuple, dataclass, field, replace

from qipan.ledger.requests import Refused
from qipan.ledger.transfer import check_text, shown
from qipan.quantities import format_devices

#: a node's clock may be this far ahead of the board's
SKEW_S = 300.0
#: a reading may be this much late against its stamp
SLACK_US = 2_000_000


@dataclass(frozen=True, slots=True)
class Counters:
    """Device-microseconds, memory byte-seconds, stored byte-seconds, moved bytes, millijoules."""

    device_us: int = 0
    memory_byte_s: int = 0
    stored_byte_s: int = 0
    moved_bytes: int = 0
    millijoules: int = 0

    def plus(self, other: "Counters") -> "Counters":
        return Counters(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def minus(self, other: "Counters") -> "Counters":
        return Counters(*(a - b for a, b in zip(astuple(self), astuple(other), strict=True)))


@dataclass(frozen=True, slots=True)
class MeterEvent:
    """`devices`: how many the lease holds on the node.  `started_s`: when the counters began (the lease's start, or the boot)."""

    node: str
    lease: str
    boot: str
    sequence: int
    at_s: float
    started_s: float
    devices: int
    counters: Counters

    @property
    def event_id(self) -> str:
        return f"{self.node}/{self.lease}/{self.boot}/{self.sequence}"


@dataclass(slots=True)
class Meters:
    """`newest`: (node, lease, boot) -> its newest event.  `seen`: event id -> counters, of the events taken."""

    newest: dict[tuple[str, str, str], MeterEvent] = field(default_factory=dict)
    seen: dict[str, Counters] = field(default_factory=dict)

    def absorb(self, event: MeterEvent, now_s: float) -> Counters | Refused:
        """What it adds (nothing for a repeat or a late one).  Refused: nothing was taken."""
        why = _wrong(event, now_s)
        if why is not None:
            return Refused(event.event_id[:200], *why)
        known = self.seen.get(event.event_id)
        if known is not None:
            if known == event.counters:
                return Counters()
            return Refused(
                event.event_id, "M-1", f"event {shown(event.event_id)} was sent before with other counters; number events once"
            )  # fmt: skip
        place = (event.node, event.lease, event.boot)
        before = self.newest.get(place)
        older, newer = before, event
        if before is not None and event.sequence < before.sequence:
            older, newer = event, before
        rise = newer.counters.minus(older.counters if older else Counters())
        if min(astuple(rise)) < 0:
            return Refused(
                event.event_id, "M-2",
                f"event {shown(event.event_id)}: its counters and those of its neighbour go back; count on from the boot",
            )  # fmt: skip
        since_s = older.at_s if older else newer.started_s
        possible_us = round(max(0.0, newer.at_s - since_s) * newer.devices * 1e6) + SLACK_US * newer.devices
        if rise.device_us > possible_us:
            return Refused(
                event.event_id, "M-4",
                f"event {shown(event.event_id)}: {rise.device_us} device-us in {newer.at_s - since_s:g} s on {format_devices(newer.devices)};"
                f" at most {possible_us} can be",
            )  # fmt: skip
        self.seen[event.event_id] = event.counters
        if newer is not event:
            return Counters()
        self.newest[place] = event
        return rise

    def total(self, lease: str) -> Counters:
        """Of all nodes and boots of a lease."""
        found = Counters()
        for (_, name, _), event in sorted(self.newest.items()):
            if name == lease:
                found = found.plus(event.counters)
        return found


def _wrong(event: MeterEvent, now_s: float) -> tuple[str, str] | None:
    for name in (event.node, event.lease, event.boot):
        check_text(name)
    if not (math.isfinite(event.at_s) and math.isfinite(event.started_s)) or event.at_s > now_s + SKEW_S:
        return "M-3", f"the event is of {event.at_s}, it is {now_s}; set the node's clock"
    if event.at_s < event.started_s:
        return "M-3", f"the event is of {event.at_s}, before its counters began at {event.started_s}"
    if event.sequence < 1 or event.devices < 1 or min(astuple(event.counters)) < 0:
        return "M-2", f"sequence {event.sequence}, {format_devices(event.devices)}, {event.counters}; give numbers of zero or more"  # fmt: skip
    if max(astuple(event.counters)) > 2**62:
        return "M-2", "a counter is beyond 2^62; start the node's meter again"
    return None


def moved(event: MeterEvent, sequence: int, at_s: float, more: Counters) -> MeterEvent:
    """The next event of the same meter."""
    return replace(event, sequence=sequence, at_s=at_s, counters=event.counters.plus(more))
