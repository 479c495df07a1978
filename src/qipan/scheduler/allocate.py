"""Which task runs at which of its points: the most value under the capacity.

A multiple-choice knapsack in several resources.  Three ways, chosen by the instance alone:

    free     everybody's best point fits: nothing to decide
    exact    few candidates: branch and bound, or where that would take long a mixed-integer program solved by HiGHS (in SciPy)
    greedy   otherwise: by value gained per device weighed by scarcity, then bounded local search

Ties are broken by task id, then point id; the order of the input does not matter.
"""

import heapq
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

#: candidates up to which an instance is solved exactly
EXACT_UP_TO = 16
#: a proven gap at which the exact search may stop
GAP = 1e-4
#: choices that branch and bound tries before it leaves an instance to HiGHS, which takes 20 ms for the smallest
NODES = 4000
#: rounds of local search over all bidders
ROUNDS = 4


@dataclass(frozen=True, slots=True)
class Candidate:
    """`needs`: (resource, devices); `value`: micro-CNY per second, the cost of changing taken off."""

    point_id: str
    needs: tuple[tuple[str, int], ...]
    value: float


@dataclass(frozen=True, slots=True)
class Bidder:
    """`current`: the point it runs at now; None when it does not run."""

    task_id: str
    candidates: tuple[Candidate, ...]
    current: str | None = None


@dataclass(frozen=True, slots=True)
class Allocation:
    """`chosen`: task -> point; a task that is absent waits.  `shadow_price`: resource -> value per second that one
    more device would bring, from what was turned away."""

    chosen: dict[str, str]
    shadow_price: dict[str, float]
    method: str


Choice = dict[str, Candidate]


def allocate(
    bidders: Sequence[Bidder],
    capacity: Mapping[str, int],
    *,
    exact_up_to: int = EXACT_UP_TO,
    local_search: bool = True,
) -> Allocation:
    """Values must be positive; a candidate that alone exceeds the capacity is never chosen.  Without `local_search` the greedy choice
    stands (for measuring what it is worth)."""
    usable = [_usable(bidder, capacity) for bidder in sorted(bidders, key=lambda bidder: bidder.task_id)]
    usable = [bidder for bidder in usable if bidder.candidates]
    best = {bidder.task_id: max(bidder.candidates, key=preference) for bidder in usable}
    if _fits(best, capacity):
        return _result(best, usable, capacity, "free")
    if sum(len(bidder.candidates) for bidder in usable) <= exact_up_to:
        exact = _searched(usable, capacity) or _solved(usable, capacity)
        if exact is not None:
            return _result(exact, usable, capacity, "exact")
    return _result(_heuristic(usable, capacity, local_search=local_search), usable, capacity, "greedy")


def at_rest(bidders: Sequence[Bidder], capacity: Mapping[str, int]) -> bool:
    """Whether what runs is the best choice since nobody's gain pays the devices it takes beyond free ones, each at what the cheapest of all
    loses per device by giving some up (a bound of the fractional knapsack, so never true of a choice that can be bettered).  Candidates
    need one resource each, those of who runs the one it holds; else False."""
    free, least = dict(capacity), dict.fromkeys(capacity, math.inf)
    gains: list[tuple[str, int, float]] = []
    for bidder in bidders:
        now = next((one for one in bidder.candidates if one.point_id == bidder.current), None)
        if (now is None) is not (bidder.current is None) or any(
            len(one.needs) > 1 for one in bidder.candidates
        ):
            return False
        held_key, held = now.needs[0] if now is not None else ("", 0)
        value = now.value if now is not None else 0.0
        if now is not None:
            free[held_key] -= held
            least[held_key] = min(least[held_key], value / held)
        for one in bidder.candidates:
            key, devices = one.needs[0]
            if now is not None and key != held_key:
                return False
            if devices < held:
                least[key] = min(least[key], (value - one.value) / (held - devices))
            if one.value > value and devices <= capacity.get(key, 0):
                gains.append((key, devices - held, one.value - value))
    fits = all(devices >= 0 for devices in free.values())
    return fits and all(
        free[key] < more and gain <= least[key] * (more - free[key]) for key, more, gain in gains
    )


def _usable(bidder: Bidder, capacity: Mapping[str, int]) -> Bidder:
    fitting = tuple(
        candidate
        for candidate in sorted(bidder.candidates, key=lambda candidate: candidate.point_id)
        if candidate.value > 0 and all(capacity.get(key, 0) >= devices for key, devices in candidate.needs)
    )
    return Bidder(bidder.task_id, fitting, bidder.current)


def preference(candidate: Candidate) -> tuple[float, int, str]:
    """More value, then fewer devices."""
    return (candidate.value, -sum(devices for _, devices in candidate.needs), candidate.point_id)


def dearest_first(bidders: Iterable[Bidder]) -> list[Bidder]:
    """By the most that each may be worth; all have candidates."""
    return sorted(bidders, key=lambda one: (-max(c.value for c in one.candidates), one.task_id))


def _heuristic(bidders: Sequence[Bidder], capacity: Mapping[str, int], *, local_search: bool) -> Choice:
    """The best of three starts, each improved: devices weighed by scarcity, all alike, and value alone."""
    scarce = _scarcity(bidders, capacity)
    starts = (scarce, dict.fromkeys(capacity, 1.0), dict.fromkeys(capacity, 0.0))
    found = [_greedy(bidders, capacity, weight) for weight in starts]
    if local_search:
        found = [_improve(bidders, capacity, choice) for choice in found]
    return max(found, key=lambda choice: sum(candidate.value for candidate in choice.values()))


# ---- greedy ----------------------------------------------------------------------------------------------------------


def _greedy(bidders: Sequence[Bidder], capacity: Mapping[str, int], weight: Mapping[str, float]) -> Choice:
    """Take the step with the most value per weighed device, again and again.  A step moves one bidder to a candidate
    of more value; freed devices go back."""
    by_id = {bidder.task_id: bidder for bidder in bidders}
    chosen: Choice = {}
    free = dict(capacity)
    steps: list[tuple[float, str, str, float]] = []  # (-score, task, point, value it starts from)
    for bidder in bidders:
        _push_steps(steps, bidder, None, weight)
    heapq.heapify(steps)
    while steps:
        _, task_id, point_id, from_value = heapq.heappop(steps)
        now = chosen.get(task_id)
        if (now.value if now else 0.0) != from_value:
            continue  # the bidder has moved since; its steps from there are in the heap
        bidder = by_id[task_id]
        candidate = next(one for one in bidder.candidates if one.point_id == point_id)
        if not _takes(free, now, candidate):
            continue
        chosen[task_id] = candidate
        fresh: list[tuple[float, str, str, float]] = []
        _push_steps(fresh, bidder, candidate, weight)
        for step in fresh:
            heapq.heappush(steps, step)
    return chosen


def _push_steps(
    steps: list[tuple[float, str, str, float]],
    bidder: Bidder,
    now: Candidate | None,
    weight: Mapping[str, float],
) -> None:
    base = now.value if now else 0.0
    held = dict(now.needs) if now else {}
    for candidate in bidder.candidates:
        gain = candidate.value - base
        if gain <= 0:
            continue
        extra = sum(max(0, devices - held.get(key, 0)) * weight[key] for key, devices in candidate.needs)
        steps.append((-gain / max(extra, 1e-12), bidder.task_id, candidate.point_id, base))


def _scarcity(bidders: Sequence[Bidder], capacity: Mapping[str, int]) -> dict[str, float]:
    """Wanted over available, per device of each resource; at least a little, so that free devices count too."""
    wanted: dict[str, float] = dict.fromkeys(capacity, 0.0)
    for bidder in bidders:
        best = max(bidder.candidates, key=preference)
        for key, devices in best.needs:
            wanted[key] += devices
    return {key: max(0.05, wanted[key] / devices) if devices else 1.0 for key, devices in capacity.items()}


def _takes(free: dict[str, int], now: Candidate | None, candidate: Candidate) -> bool:
    """Move from `now` to `candidate` when it fits; updates `free`."""
    back = dict(now.needs) if now else {}
    if any(free[key] + back.get(key, 0) < devices for key, devices in candidate.needs):
        return False
    for key, devices in back.items():
        free[key] += devices
    for key, devices in candidate.needs:
        free[key] -= devices
    return True


# ---- local search ----------------------------------------------------------------------------------------------------


def _improve(bidders: Sequence[Bidder], capacity: Mapping[str, int], chosen: Choice) -> Choice:
    """For each bidder below its best, try each better candidate, making room by taking others down (to a smaller
    candidate or out) at the least loss; keep what gains.  At most ROUNDS passes."""
    by_id = {bidder.task_id: bidder for bidder in bidders}
    for _ in range(ROUNDS):
        gained = False
        for bidder in dearest_first(bidders):
            now = chosen.get(bidder.task_id)
            for candidate in sorted(bidder.candidates, key=preference, reverse=True):
                if candidate.value <= (now.value if now else 0.0):
                    break
                trial = _make_room(by_id, capacity, chosen, bidder.task_id, candidate)
                if trial is not None:
                    chosen, gained = trial, True
                    break
        chosen = _fill(bidders, capacity, chosen)
        if not gained:
            return chosen
    return chosen


def _make_room(
    by_id: Mapping[str, Bidder],
    capacity: Mapping[str, int],
    chosen: Choice,
    task_id: str,
    candidate: Candidate,
) -> Choice | None:
    """The choice with `candidate` in it and others taken down at the least loss per device, when that gains."""
    trial = dict(chosen)
    before = chosen.get(task_id)
    trial[task_id] = candidate
    gain = candidate.value - (before.value if before else 0.0)
    free = _free(trial, capacity)
    while (short := sorted(key for key, devices in free.items() if devices < 0)) and gain > 0:
        key = short[0]
        down: list[tuple[float, str, Candidate | None, int]] = []
        for other, held in trial.items():
            own = dict(held.needs).get(key, 0)
            if other == task_id or own == 0:
                continue
            for lower in (*by_id[other].candidates, None):
                needs = dict(lower.needs) if lower else {}
                freed = own - needs.get(key, 0)
                if freed <= 0 or any(
                    devices > dict(held.needs).get(name, 0) + max(0, free[name])
                    for name, devices in needs.items()
                ):
                    continue
                loss = held.value - (lower.value if lower else 0.0)
                down.append((loss / min(freed, -free[key]), other, lower, freed))
        if not down:
            return None
        _, other, lower, _ = min(down, key=lambda one: (one[0], one[1], one[2].point_id if one[2] else ""))
        gain -= trial[other].value - (lower.value if lower else 0.0)
        if lower is None:
            del trial[other]
        else:
            trial[other] = lower
        free = _free(trial, capacity)
    return trial if gain > 1e-9 * max(1.0, candidate.value) else None


def _fill(bidders: Sequence[Bidder], capacity: Mapping[str, int], chosen: Choice) -> Choice:
    """Use what is free: every bidder moves up where it can, the most gain first."""
    free = _free(chosen, capacity)
    filled = dict(chosen)
    for bidder in dearest_first(bidders):
        for candidate in sorted(bidder.candidates, key=preference, reverse=True):
            now = filled.get(bidder.task_id)
            if candidate.value <= (now.value if now else 0.0):
                break
            if _takes(free, now, candidate):
                filled[bidder.task_id] = candidate
                break
    return filled


def _free(chosen: Choice, capacity: Mapping[str, int]) -> dict[str, int]:
    free = dict(capacity)
    for candidate in chosen.values():
        for key, devices in candidate.needs:
            free[key] -= devices
    return free


def _fits(chosen: Choice, capacity: Mapping[str, int]) -> bool:
    return all(devices >= 0 for devices in _free(chosen, capacity).values())


# ---- exact -----------------------------------------------------------------------------------------------------------


def _searched(bidders: Sequence[Bidder], capacity: Mapping[str, int]) -> Choice | None:
    """Depth first over the bidders, dearest first, each at its better candidates first, then out; a branch is left when even
    everybody's best could not beat what is known.  None after NODES choices."""
    order = dearest_first(bidders)
    ranked = [sorted(one.candidates, key=preference, reverse=True) for one in order]
    hope = [0.0] * (len(order) + 1)  # the best values of this bidder and those after it
    for at in range(len(order) - 1, -1, -1):
        hope[at] = hope[at + 1] + ranked[at][0].value
    best = _greedy(bidders, capacity, _scarcity(bidders, capacity))
    best_value = sum(candidate.value for candidate in best.values())
    free, nodes = dict(capacity), 0
    chosen: Choice = {}

    def descend(at: int, value: float) -> None:
        nonlocal best, best_value, nodes
        nodes += 1
        if value > best_value * (1 + 1e-12):
            best, best_value = dict(chosen), value
        if at == len(order) or nodes > NODES:
            return
        for candidate in ranked[at]:
            if value + candidate.value + hope[at + 1] <= best_value:
                return  # the others are worth less, and being out is worth nothing
            if _takes(free, None, candidate):
                chosen[order[at].task_id] = candidate
                descend(at + 1, value + candidate.value)
                del chosen[order[at].task_id]
                for key, devices in candidate.needs:
                    free[key] += devices
        if value + hope[at + 1] > best_value:
            descend(at + 1, value)

    descend(0, 0.0)
    return best if nodes <= NODES else None


def _solved(bidders: Sequence[Bidder], capacity: Mapping[str, int]) -> Choice | None:
    """One binary variable per candidate, one row per bidder and per resource.  None when SciPy, which brings HiGHS, is
    not installed."""
    try:
        from scipy.optimize import Bounds, LinearConstraint

        from qipan.solver import milp
    except ImportError:
        return None  # the base install has no solver; the heuristic answers
    flat = [(bidder.task_id, candidate) for bidder in bidders for candidate in bidder.candidates]
    row = {bidder.task_id: index for index, bidder in enumerate(bidders)}
    resource = {key: len(row) + index for index, key in enumerate(sorted(capacity))}
    matrix = np.zeros((len(row) + len(resource), len(flat)))
    for column, (task_id, candidate) in enumerate(flat):
        matrix[row[task_id], column] = 1.0
        for key, devices in candidate.needs:
            matrix[resource[key], column] = devices
    most = np.array([1.0] * len(row) + [float(capacity[key]) for key in sorted(capacity)])
    value = np.array([candidate.value for _, candidate in flat])
    found = milp(
        -value / value.max(),
        integrality=np.ones(len(flat)),
        bounds=Bounds(0, 1),
        constraints=LinearConstraint(matrix, -np.inf, most),
        options={"mip_rel_gap": GAP},
    )
    if found.x is None:
        return None
    chosen = {
        task_id: candidate for (task_id, candidate), taken in zip(flat, found.x, strict=True) if taken > 0.5
    }
    return chosen if _fits(chosen, capacity) else None


# ---- the answer ------------------------------------------------------------------------------------------------------


def _result(
    chosen: Choice, bidders: Sequence[Bidder], capacity: Mapping[str, int], method: str
) -> Allocation:
    free = _free(chosen, capacity)
    price = dict.fromkeys(sorted(capacity), 0.0)
    for bidder in bidders:
        now = chosen.get(bidder.task_id)
        held = dict(now.needs) if now else {}
        for candidate in bidder.candidates:
            gain = candidate.value - (now.value if now else 0.0)
            more = sum(max(0, devices - held.get(key, 0)) for key, devices in candidate.needs)
            if gain <= 0 or more == 0:
                continue
            for key, devices in candidate.needs:
                if devices - held.get(key, 0) > free[key]:
                    price[key] = max(price[key], gain / more)
    return Allocation({task: candidate.point_id for task, candidate in sorted(chosen.items())}, price, method)
