"""Allocation on a large board: start from what runs, serve who waits, then let who runs grow into what is left.

A step down of a running task costs what its owner loses by it, per device; who waits pays for the cheapest steps that
free enough, when its point is worth more than they cost (the ask curve of `asks`, applied to one's own tasks).
The cost grows with the bidders at hand, not with pairs of them; `allocate` comes closer to the optimum on few.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop

from qipan.scheduler.allocate import Bidder, Candidate, preference


@dataclass(slots=True)
class _Floor:
    """What can be had of one resource: free devices, and steps down, cheapest first: (loss per device, task, number of the step,
    devices freed, the candidate it goes to; None: out)."""

    free: int
    steps: list[tuple[float, str, int, int, Candidate | None]]

    def price(self, devices: int) -> tuple[float, int] | None:
        """(value lost, steps taken) to have so many; None when they cannot be had."""
        lost, have, taken = 0.0, self.free, 0
        while have < devices:
            if taken == len(self.steps):
                return None
            loss, _, _, freed, _ = self.steps[taken]
            lost, have, taken = lost + loss * freed, have + freed, taken + 1
        return lost, taken


def adjust(bidders: Sequence[Bidder], capacity: Mapping[str, int]) -> dict[str, str]:
    """Task -> point; a task that is absent waits.  Those that wait are served in the order given.  Each candidate needs one
    resource."""
    chosen: dict[str, Candidate] = {}
    for bidder in bidders:
        now = next((one for one in bidder.candidates if one.point_id == bidder.current), None)
        if now is not None:
            chosen[bidder.task_id] = now
    floors = _floors(bidders, chosen, capacity)
    for bidder in bidders:
        if bidder.task_id not in chosen:
            _serve(bidder, chosen, floors)
    _grow(bidders, chosen, floors)
    return {task_id: candidate.point_id for task_id, candidate in chosen.items()}


def _floors(
    bidders: Sequence[Bidder], chosen: Mapping[str, Candidate], capacity: Mapping[str, int]
) -> dict[str, _Floor]:
    floors = {key: _Floor(devices, []) for key, devices in capacity.items()}
    for bidder in bidders:
        now = chosen.get(bidder.task_id)
        if now is None:
            continue
        [(key, held)] = now.needs
        floors[key].free -= held
        below = sorted(
            (one for one in bidder.candidates if one.needs[0][0] == key and one.needs[0][1] < held),
            key=lambda one: (-one.needs[0][1], -one.value),
        )
        at, devices, least = now.value, held, 0.0
        for number, lower in enumerate([*below, None]):
            left = lower.needs[0][1] if lower is not None else 0
            value = lower.value if lower is not None else 0.0
            if left == devices:
                continue
            least = max(least, (at - value) / (devices - left))
            floors[key].steps.append((least, bidder.task_id, number, devices - left, lower))
            at, devices = value, left
    for floor in floors.values():
        floor.steps.sort(key=lambda step: step[:3])
    return floors


def _serve(bidder: Bidder, chosen: dict[str, Candidate], floors: Mapping[str, _Floor]) -> None:
    best: tuple[float, Candidate, int] | None = None
    for candidate in sorted(bidder.candidates, key=preference, reverse=True):
        [(key, devices)] = candidate.needs
        price = floors[key].price(devices) if key in floors else None
        if price is not None and (best is None or candidate.value - price[0] > best[0]):
            best = (candidate.value - price[0], candidate, price[1])
    if best is None or best[0] <= 0:
        return
    _, candidate, taken = best
    [(key, devices)] = candidate.needs
    floor = floors[key]
    for _, task_id, _, freed, lower in floor.steps[:taken]:
        floor.free += freed
        if lower is None:
            del chosen[task_id]
        else:
            chosen[task_id] = lower
    del floor.steps[:taken]
    floor.free -= devices
    chosen[bidder.task_id] = candidate


def _grow(bidders: Sequence[Bidder], chosen: dict[str, Candidate], floors: Mapping[str, _Floor]) -> None:
    """Who runs untouched moves up where more is free, the most value gained per device first, once each."""
    moves = []
    for bidder in bidders:
        now = chosen.get(bidder.task_id)
        if now is None or bidder.current != now.point_id:
            continue
        [(key, held)] = now.needs
        for candidate in bidder.candidates:
            [(other, devices)] = candidate.needs
            more = devices - held if other == key else devices
            if candidate.value > now.value and 0 < more <= floors[other].free:
                moves.append(
                    (
                        -(candidate.value - now.value) / more,
                        bidder.task_id,
                        candidate.point_id,
                        candidate,
                        more,
                    )
                )
    heapify(moves)
    moved: set[str] = set()
    while moves:
        _, task_id, _, candidate, more = heappop(moves)
        [(key, _)] = candidate.needs
        if task_id in moved or floors[key].free < more:
            continue
        moved.add(task_id)
        floors[key].free -= more
        chosen[task_id] = candidate
