"""What a service asks for by the clock: a forecast that repeats, and the hours of each of its replicas that follow from it."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

DAY_S = 86_400.0
#: Monday, 5 January 1970, 00:00 UTC: periods are counted from there
MONDAY_S = 4 * DAY_S
#: a moment so little before a change belongs to what follows it: Unix seconds as floats are no finer than 2e-7 s
EDGE_S = 1e-3
DAYS = ("Thu", "Fri", "Sat", "Sun", "Mon", "Tue", "Wed")  # 1 January 1970 was a Thursday


@dataclass(frozen=True, slots=True)
class Forecast:
    """`steps`: (seconds from the beginning of a period, replicas asked for from then on), in order, the first at 0.  Periods of
    `every_s` seconds follow each other from a Monday's midnight at `utc_offset_s`.  `notice_s`: so long before a lent device is back its
    borrower is told; `start_s`: so long a replica takes to serve."""

    every_s: float
    steps: tuple[tuple[float, int], ...]
    notice_s: float = 300.0
    start_s: float = 60.0
    utc_offset_s: float = 8 * 3600.0

    def most(self) -> int:
        return max(replicas for _, replicas in self.steps)

    def asked_at(self, now_s: float) -> int:
        """Replicas."""
        of_period_s = (now_s + EDGE_S - self.begins_s()) % self.every_s
        return [replicas for from_s, replicas in self.steps if from_s <= of_period_s][-1]

    def spans(self) -> Iterator[tuple[float, float, int]]:
        """(from, until, replicas) of a period, in order."""
        ends = [from_s for from_s, _ in self.steps[1:]] + [self.every_s]
        for (from_s, replicas), end_s in zip(self.steps, ends, strict=True):
            yield from_s, end_s, replicas

    def begins_s(self) -> float:
        """Unix seconds at which one of its periods began."""
        return MONDAY_S - self.utc_offset_s

    def hours_of(self, replica: int, until_s: float | None = None) -> "Hours":
        """Of one replica (from 1).  Times shorter than its lead are not lent: it would be back at once."""
        lead_s, every_s = self.start_s + self.notice_s, self.every_s
        asked: list[tuple[float, float]] = []
        for from_s, end_s, replicas in self.spans():
            if replicas < replica:
                continue
            if asked and from_s - asked[-1][1] <= lead_s:
                asked[-1] = (asked[-1][0], end_s)
            else:
                asked.append((from_s, end_s))
        if asked and asked[0][0] + every_s - asked[-1][1] <= lead_s:  # on into the next period
            if len(asked) == 1:
                asked = [(0.0, every_s)]
            else:
                first, last = asked.pop(0), asked.pop()
                asked.append((last[0], every_s + first[1]))
        return Hours(
            replica, every_s, self.begins_s(), tuple(asked), lead_s, self.notice_s, until_s, self.utc_offset_s
        )


@dataclass(frozen=True, slots=True)
class Hours:
    """When one replica of a service (`replica`, from 1) is asked for: `windows` (from, until) in seconds of a period, in order and more than
    `lead_s` apart; the last may go on into the next period.  It is wanted `lead_s` earlier: its start and the notice of those that
    borrowed its devices.  `until_s`: Unix seconds at which the service ends; None: it does not."""

    replica: int
    every_s: float
    begins_s: float
    windows: tuple[tuple[float, float], ...]
    lead_s: float
    notice_s: float
    until_s: float | None = None
    utc_offset_s: float = 0.0

    def wanted(self, now_s: float) -> bool:
        return not self.over(now_s) and self._within(now_s, self.lead_s)

    def asked_at(self, now_s: float) -> bool:
        """Whether it is asked for at that time of a period, its lead and its end apart."""
        return self._within(now_s, 0.0)

    def over(self, now_s: float) -> bool:
        return self.until_s is not None and now_s + EDGE_S >= self.until_s

    def next_change_s(self, now_s: float) -> float | None:
        """When it is next wanted, or no longer; None: never."""
        if self.over(now_s):
            return None
        changes = [] if self.until_s is None else [self.until_s]
        if self.windows != ((0.0, self.every_s),):
            edges = [edge_s for from_s, until_s in self.windows for edge_s in (from_s - self.lead_s, until_s)]
            changes += self._next(edges, now_s)
        return min(changes, default=None)

    def next_asked_s(self, now_s: float) -> float | None:
        """When a time in which it is asked for begins; None: never."""
        begins = self._next([from_s for from_s, _ in self.windows], now_s)
        return min((at_s for at_s in begins if self.until_s is None or at_s < self.until_s), default=None)

    def asked_s_of_period(self) -> float:
        """Seconds of each period in which it is asked for."""
        return sum(until_s - from_s for from_s, until_s in self.windows)

    def lent_text(self, now_s: float) -> str:
        """Until when its devices are lent, and what for they come back."""
        asked_s = self.next_asked_s(now_s)
        if asked_s is None:
            return f"the forecast asks for replica {self.replica} no more"
        back, asked = self.clock(asked_s - self.lead_s, now_s), self.clock(asked_s, now_s)
        return f"lent until {back}: the forecast asks for replica {self.replica} at {asked}"

    def clock(self, at_s: float, now_s: float) -> str:
        """The time of day where the service's hours are counted, with the day where it is not within one."""
        whole_s = round(at_s + self.utc_offset_s)
        day, of_day_s = divmod(whole_s, 86_400)
        text = f"{of_day_s // 3600:02d}:{of_day_s // 60 % 60:02d}"
        text += f":{of_day_s % 60:02d}" if of_day_s % 60 else ""
        return text if abs(at_s - now_s) < DAY_S else f"{DAYS[day % 7]} {text}"

    def _within(self, now_s: float, lead_s: float) -> bool:
        of_period_s = (now_s + EDGE_S - self.begins_s) % self.every_s
        turns = (of_period_s - self.every_s, of_period_s, of_period_s + self.every_s)
        return any(from_s - lead_s <= at_s < until_s for from_s, until_s in self.windows for at_s in turns)

    def _next(self, edges: list[float], now_s: float) -> list[float]:
        """Each edge of a period as Unix seconds, the first time after `now_s`."""
        at_s = now_s + EDGE_S
        begins_s = at_s - (at_s - self.begins_s) % self.every_s
        times = [begins_s + edge_s + turn * self.every_s for edge_s in edges for turn in (-1, 0, 1)]
        return [time_s for time_s in times if time_s > at_s]


@dataclass(frozen=True, slots=True)
class Busy:
    """A stretch of time of one replica in which its devices worked so much of the time."""

    from_s: float
    until_s: float
    busy_share: float


@dataclass(frozen=True, slots=True)
class Learnt:
    """One stretch of a period: replicas as they stood (`asked`), replicas' worth of work in the busiest of the recorded periods (`busy`; None:
    nothing was recorded), replicas that keep it within the wanted share (`replicas`); `cut`: they worked all the time, so more may
    have been wanted than was seen."""

    from_s: float
    asked: int
    busy: float | None
    replicas: int
    cut: bool


#: devices that worked so much of the time may have had more to do
CUT_AT = 0.95


def learnt(hours: Sequence[Hours], record: Iterable[Busy], busy_share: float) -> list[Learnt]:
    """What a service should have asked for by the hour (at least 24 parts of a period, at most 168), from what its replicas' devices did: as many as
    would have worked `busy_share` of the time in the busiest recorded period, one more than stood where all of them worked all the
    time, one at least where any was asked for (who may come is to be answered), and what was asked for where nothing was recorded.  `hours`: of its replicas.  A part counts once replicas were seen in it for half of its length."""
    every_s, begins_s = hours[0].every_s, hours[0].begins_s
    parts = min(168, max(24, round(every_s / 3600)))
    bucket_s = every_s / parts
    sums: dict[tuple[int, int], list[float]] = {}  # (period, bucket) -> seconds that replicas were up, busy
    for one in record:
        at_s = one.from_s
        while at_s < one.until_s:
            number = math.floor((at_s + EDGE_S - begins_s) / bucket_s)
            end_s = min(one.until_s, begins_s + (number + 1) * bucket_s)
            entry = sums.setdefault(divmod(number, parts), [0.0, 0.0])
            entry[0] += end_s - at_s
            entry[1] += (end_s - at_s) * one.busy_share
            at_s = max(end_s, at_s + EDGE_S)
    found = []
    for bucket in range(parts):
        middle_s = begins_s + (bucket + 0.5) * bucket_s
        asked = sum(one.asked_at(middle_s) for one in hours)
        seen = [
            entry
            for (_, number), entry in sorted(sums.items())
            if number == bucket and entry[0] >= bucket_s / 2
        ]
        if not seen:
            found.append(Learnt(bucket * bucket_s, asked, None, asked, False))
            continue
        replicas, cut = min(1, asked), False
        for up_s, busy_s in seen:
            full = busy_s >= CUT_AT * up_s
            wanted = math.ceil(up_s / bucket_s - EDGE_S) + 1 if full else 0
            replicas = max(replicas, wanted, math.ceil(busy_s / bucket_s / busy_share - EDGE_S))
            cut = cut or full
        most = max(busy_s for _, busy_s in seen) / bucket_s
        found.append(Learnt(bucket * bucket_s, asked, round(most, 3), replicas, cut))
    return found


def steps_of(buckets: Sequence[Learnt]) -> tuple[tuple[float, int], ...]:
    """As a forecast states them."""
    steps: list[tuple[float, int]] = []
    for one in buckets:
        if not steps or steps[-1][1] != one.replicas:
            steps.append((one.from_s, one.replicas))
    return tuple(steps)
