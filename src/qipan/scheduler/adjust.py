"""Allocation on a large board, near linear in the candidates; `allocate` solves small ones exactly.

prices    what a device of each resource is worth: where those who pay it, each at the best of its curve, want what there is
start     from what runs, and from those who would stay at far higher prices
improve   everybody in turn tries the places that promise most: others step down for it and find places of their own, what is left
          free is filled; kept when the sum of values grew
enough    near the most that any choice can be worth at those prices (weak duality) nothing more is sought

A step down costs what its owner loses by it, per device (the ask curve of `asks`, applied to one's own tasks).  Takes the time of
sorting the candidates and of at most LOOKS looks at one.
"""

import math
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from heapq import heapify, heappop, heappush

from qipan.scheduler.allocate import Bidder, Candidate, dearest_first

#: times that each resource is priced with the others' prices as they are
PRICED = 4
#: the second start is everybody's best at so many times the prices; what they leave is filled
DEAR = 2.0
#: passes of improvement, changes of a bidder that are tried in one, and candidates looked at in all
PASSES, TRIES, LOOKS = 4, 3, 100_000
#: a choice within so much of the most that any can be worth is taken as it is
ENOUGH = 0.003
#: (value lost per device, task, number of the step from where it is, devices freed, the candidate it goes to; None: out)
Step = tuple[float, str, int, int, Candidate | None]
#: (task, point it is at) -> its steps down from there
Ladders = dict[tuple[str, str], tuple[Step, ...]]


def adjust(bidders: Sequence[Bidder], capacity: Mapping[str, int]) -> dict[str, str]:
    """Task -> point; a task that is absent waits.  Each candidate needs one resource.  Of equal choices the one nearer to what
    runs now; the order of the input does not matter."""
    fitting: dict[int, tuple[Candidate, ...]] = {}  # alike tasks have the same candidates
    usable = []
    for bidder in sorted(bidders, key=lambda one: one.task_id):
        own = fitting.get(id(bidder.candidates))
        if own is None:
            own = fitting[id(bidder.candidates)] = _fitting(bidder.candidates, capacity)
        usable.append(Bidder(bidder.task_id, own, bidder.current))
    price = prices_of(usable, capacity)
    enough = (1 - ENOUGH) * most_of_all(usable, capacity, price)
    ladders: Ladders = {}
    best = _Board(usable, capacity, price, _running(usable), ladders)
    best.improve(enough)
    if best.value < enough:
        dear = {key: DEAR * of_one for key, of_one in price.items()}
        other = _Board(usable, capacity, price, _at_prices(usable, dear), ladders)
        other.improve(enough)
        if other.value > best.value * (1 + 1e-9):
            best = other
    return {task_id: candidate.point_id for task_id, candidate in best.chosen.items()}


def _fitting(candidates: Iterable[Candidate], capacity: Mapping[str, int]) -> tuple[Candidate, ...]:
    fitting = [
        one for one in candidates if one.value > 0 and capacity.get(one.needs[0][0], 0) >= one.needs[0][1]
    ]
    return tuple(sorted(fitting, key=lambda one: (one.needs[0], one.point_id)))


def _running(bidders: Iterable[Bidder]) -> dict[str, Candidate]:
    return {
        bidder.task_id: one
        for bidder in bidders
        for one in bidder.candidates
        if one.point_id == bidder.current
    }


def _at_prices(bidders: Iterable[Bidder], price: Mapping[str, float]) -> dict[str, Candidate]:
    chosen = {bidder.task_id: _best(bidder, price)[0] for bidder in bidders}
    return {task_id: one for task_id, one in chosen.items() if one is not None}


def _best(bidder: Bidder, price: Mapping[str, float]) -> tuple[Candidate | None, float]:
    """What gains it most at the prices, and how much; (None, 0.0) when nothing does."""
    best, most = None, 0.0
    for one in bidder.candidates:
        ((key, devices),) = one.needs
        surplus = one.value - price[key] * devices
        if surplus > most:
            best, most = one, surplus
    return best, most


# ---- prices ------------------------------------------------------------------------------------------------------------


def prices_of(bidders: Sequence[Bidder], capacity: Mapping[str, int]) -> dict[str, float]:
    """Value per device of each resource at which the concave hulls of those that want it fill it, one resource after the other:
    coordinate descent on the Lagrangian dual of the knapsack."""
    # From 0 none would rise where all that wait may go to any of several.
    price = dict.fromkeys(capacity, math.inf)
    times = Counter(id(bidder.candidates) for bidder in bidders)
    alike: list[tuple[dict[str, list[tuple[int, float]]], int]] = []  # points by resource, of so many bidders
    for mark, candidates in {id(bidder.candidates): bidder.candidates for bidder in bidders}.items():
        points: dict[str, list[tuple[int, float]]] = {}
        for one in candidates:
            ((key, devices),) = one.needs
            points.setdefault(key, []).append((devices, one.value))
        alike.append((points, times[mark]))
    for _ in range(PRICED if len(capacity) > 1 else 1):
        before = {**price}
        for key in sorted(capacity):
            slopes: list[tuple[float, int]] = []
            for points, count in alike:
                here = points.get(key)
                if here is not None:
                    elsewhere = 0.0
                    for other, there in points.items():
                        if other != key:
                            of_one = price[other]
                            for devices, value in there:
                                elsewhere = max(elsewhere, value - of_one * devices)
                    slopes += _slopes(here, elsewhere) * count
            slopes.sort(reverse=True)
            left, price[key] = capacity[key], 0.0
            for slope, devices in slopes:
                left -= devices
                if left < 0:
                    price[key] = slope
                    break
        if price == before:
            break
    return price


def most_of_all(bidders: Iterable[Bidder], capacity: Mapping[str, int], price: Mapping[str, float]) -> float:
    """No choice within the capacity is worth more: the Lagrangian dual at these prices."""
    most = sum(price[key] * max(0, devices) for key, devices in capacity.items())
    return most + sum(_best(bidder, price)[1] for bidder in bidders)


def _slopes(points: Iterable[tuple[int, float]], base: float) -> list[tuple[float, int]]:
    """(value per device, devices) along the upper concave hull from no devices, worth `base`; points in order of devices."""
    hull: list[tuple[int, float, float]] = [(0, base, float("inf"))]  # (devices, value, slope to it)
    for devices, value in points:
        if value <= hull[-1][1]:
            continue
        while devices == hull[-1][0] or (value - hull[-1][1]) / (devices - hull[-1][0]) >= hull[-1][2]:
            hull.pop()
        hull.append((devices, value, (value - hull[-1][1]) / (devices - hull[-1][0])))
    return [
        (slope, at[0] - before[0])
        for before, at, slope in zip(hull, hull[1:], (one[2] for one in hull[1:]), strict=False)
    ]


# ---- improvement ---------------------------------------------------------------------------------------------------------


class _Board:
    """A choice that is being improved; it never holds more than there is once it was made."""

    def __init__(
        self,
        bidders: Sequence[Bidder],
        capacity: Mapping[str, int],
        price: Mapping[str, float],
        start: Mapping[str, Candidate],
        ladders: Ladders,
    ) -> None:
        """`ladders`: kept of boards with the same bidders and prices."""
        self.price = price
        self.bidders = {bidder.task_id: bidder for bidder in bidders if bidder.candidates}
        self.chosen = dict(start)
        self.value = sum(one.value for one in start.values())
        self.free = dict(capacity)
        self.at: dict[str, list[tuple[str, Candidate]]] = {key: [] for key in capacity}
        for bidder in bidders:
            for one in bidder.candidates:
                self.at[one.needs[0][0]].append((bidder.task_id, one))
        for one in start.values():
            ((key, devices),) = one.needs
            self.free[key] -= devices
        self.looks = LOOKS
        self._done: list[tuple[str, Candidate | None]] = []  # moves: who, and where it was
        self._ladders = ladders
        self.steps: dict[str, list[Step]] = {key: [] for key in self.free}
        for task_id, one in start.items():
            self.steps[one.needs[0][0]] += self._ladder(task_id, one)
        for steps in self.steps.values():
            steps.sort(key=lambda step: step[:3])
        for key in sorted(capacity):
            if self.free[key] < 0:
                room = self.room(key, 0, "")
                if room is not None:  # else others than the bidders hold more than there is
                    self._take(room[1])

    # -- moves

    def improve(self, enough: float) -> None:
        """Everybody, the dearest first, tries the changes that promise most at the prices, until the value is `enough`."""
        self.fill(self.free)
        if self.value >= enough:
            return
        dearest = dearest_first(self.bidders.values())
        for _ in range(PASSES):
            before = self.value
            for bidder in dearest:
                if self.value >= enough:
                    return
                for to in self._promising(bidder):
                    if self.looks > 0 and self._tried(bidder.task_id, to):
                        break
            if self.value <= before * (1 + 1e-9):
                break

    def fill(self, keys: Iterable[str]) -> None:
        """Whoever can moves up into what is free of `keys`, the most value gained per device first."""
        heap: list[tuple[float, str, str, Candidate]] = []
        for key in sorted(keys):
            if self.free[key] > 0:
                self.looks -= len(self.at[key])
                for task_id, one in self.at[key]:
                    up = self._up(task_id, one)
                    if up > 0:
                        heap.append((-up, task_id, one.point_id, one))
        heapify(heap)
        while heap:
            up, task_id, point_id, one = heappop(heap)
            now = self._up(task_id, one)
            if 0 < now < -up:
                heappush(heap, (-now, task_id, point_id, one))
            elif now > 0:
                self.move(task_id, one)

    def _up(self, task_id: str, one: Candidate) -> float:
        """Value gained per device by moving to `one`; 0 when it does not fit or gains nothing."""
        ((key, devices),) = one.needs
        now = self.chosen.get(task_id)
        if now is None:
            return one.value / devices if devices <= self.free[key] else 0.0
        if one.value <= now.value:
            return 0.0
        ((held_key, held),) = now.needs
        if held_key == key:
            devices -= held
        return (one.value - now.value) / max(devices, 1e-9) if devices <= self.free[key] else 0.0

    def _promising(self, bidder: Bidder) -> list[Candidate | None]:
        """Where else it could be (None: out), the most promising first: value gained, what it leaves at its price, less what others
        lose by making room."""
        now = self.chosen.get(bidder.task_id)
        here = 0.0 if now is None else now.value - self._worth(now)
        found: list[tuple[float, str, Candidate | None]] = []
        if here < 0:
            found.append((here, "", None))
        for one in bidder.candidates:
            if one is not now:
                more = self._more(now, one)
                most = one.value - self._worth(one) - here + self.price[one.needs[0][0]] * max(0, more)
                room = self.room(one.needs[0][0], more, bidder.task_id, most)
                if room is not None:
                    found.append((room[0] - most, one.point_id, one))
        self.looks -= len(bidder.candidates)
        return [one for _, _, one in sorted(found, key=lambda one: one[:2])[:TRIES]]

    def _worth(self, one: Candidate) -> float:
        """Of its devices, at the prices."""
        ((key, devices),) = one.needs
        return self.price[key] * devices

    def _tried(self, task_id: str, to: Candidate | None) -> bool:
        """Makes the change, those it puts out find other places, what is free is filled; undone when that gains nothing."""
        before, done = self.value, len(self._done)
        touched = self._change(task_id, to)
        put_out = sorted({moved for moved, _ in self._done[done:] if moved != task_id})
        for other in put_out:
            one = self._best_reply(self.bidders[other])
            if one is not None:
                touched |= self._change(other, one)
        self.fill(touched)
        if self.value > before * (1 + 1e-9):
            return True
        while len(self._done) > done:
            self.move(*self._done[-1])
            del self._done[-2:]
        self.value = before
        return False

    def _change(self, task_id: str, to: Candidate | None) -> set[str]:
        """Moves it there, others step down for it; the resources that were touched."""
        now, touched = self.chosen.get(task_id), set[str]()
        if now is not None:
            touched.add(now.needs[0][0])
        if to is not None:
            touched.add(to.needs[0][0])
            room = self.room(to.needs[0][0], self._more(now, to), task_id)
            if room is None:
                return touched
            self._take(room[1])
        self.move(task_id, to)
        return touched

    def _best_reply(self, bidder: Bidder) -> Candidate | None:
        """Where it gains most over what others lose by making room."""
        now = self.chosen.get(bidder.task_id)
        value = 0.0 if now is None else now.value
        most, best = 0.0, None
        for one in bidder.candidates:
            if one.value - value > most:
                room = self.room(
                    one.needs[0][0], self._more(now, one), bidder.task_id, one.value - value - most
                )
                if room is not None:
                    most, best = one.value - value - room[0], one
        return best

    # -- steps

    def room(
        self, key: str, devices: int, task_id: str, most: float = float("inf")
    ) -> tuple[float, list[Step]] | None:
        """(value lost, steps) that free so many of `key`, none of them of `task_id`, the cheapest first without those that later
        ones make needless; None when that costs `most` or more."""
        taken, have, lost = list[Step](), self.free[key], 0.0
        for step in self.steps[key]:
            if have >= devices:
                break
            loss, owner, _, freed, _ = step
            if owner != task_id:
                if lost >= most and loss >= 0:
                    return None
                taken.append(step)
                have += freed
                lost += loss * freed
        if have < devices:
            return None
        kept, later = list[Step](), set[str]()
        for step in reversed(taken):
            loss, owner, _, freed, _ = step
            if have - freed >= devices and owner not in later and loss > 0:
                have -= freed
                lost -= loss * freed
            else:
                kept.append(step)
                later.add(owner)
        return (lost, kept[::-1]) if lost < most else None

    def _take(self, steps: Iterable[Step]) -> None:
        for task_id, to in {step[1]: step[4] for step in steps}.items():
            self.move(task_id, to)

    def move(self, task_id: str, to: Candidate | None) -> None:
        now = self.chosen.pop(task_id, None)
        self._done.append((task_id, now))
        if now is not None:
            ((key, devices),) = now.needs
            self.value -= now.value
            self.free[key] += devices
            for step in self._ladder(task_id, now):
                del self.steps[key][bisect_left(self.steps[key], step)]
        if to is not None:
            ((key, devices),) = to.needs
            self.chosen[task_id] = to
            self.value += to.value
            self.free[key] -= devices
            for step in self._ladder(task_id, to):
                insort(self.steps[key], step)

    def _ladder(self, task_id: str, now: Candidate) -> tuple[Step, ...]:
        """The steps down from `now` on its resource, each the one that loses least per device: never cheaper on the way."""
        known = self._ladders.get((task_id, now.point_id))
        if known is not None:
            return known
        ((key, held),) = now.needs
        elsewhere = [one for one in self.bidders[task_id].candidates if one.needs[0][0] != key]
        out = max([0.0, *(one.value - self._worth(one) for one in elsewhere)])
        below: list[tuple[int, float, Candidate | None]] = [(0, out, None)]
        below += [
            (one.needs[0][1], one.value, one)
            for one in self.bidders[task_id].candidates
            if one.needs[0][0] == key and one.needs[0][1] < held
        ]
        steps, value = list[Step](), now.value
        while held > 0:
            lost, left, next_value, to = min(
                (
                    ((value - worth) / (held - devices), devices, worth, to)
                    for devices, worth, to in below
                    if devices < held
                ),
                key=lambda one: one[:2],
            )
            steps.append((lost, task_id, len(steps), held - left, to))
            held, value = left, next_value
        self._ladders[task_id, now.point_id] = tuple(steps)
        return tuple(steps)

    @staticmethod
    def _more(now: Candidate | None, to: Candidate) -> int:
        """Devices of its resource that it needs beside those it holds."""
        ((key, devices),) = to.needs
        return devices - (now.needs[0][1] if now is not None and now.needs[0][0] == key else 0)
