"""Which task runs at which of its points (greedy form: by value gained per further device)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Candidate:
    point_id: str
    needs: tuple[tuple[str, int], ...]
    value: float


@dataclass(frozen=True, slots=True)
class Bidder:
    task_id: str
    candidates: tuple[Candidate, ...]
    current: str | None = None


@dataclass(frozen=True, slots=True)
class Allocation:
    chosen: dict[str, str]
    shadow_price: dict[str, float]
    method: str


def allocate(bidders: Sequence[Bidder], capacity: Mapping[str, int], *, exact_up_to: int = 0) -> Allocation:
    free = dict(capacity)
    chosen: dict[str, Candidate] = {}
    while True:
        best = None
        for b in sorted(bidders, key=lambda b: b.task_id):
            now = chosen.get(b.task_id)
            for c in b.candidates:
                gain = c.value - (now.value if now else 0.0)
                extra = dict(c.needs)
                for k, n in now.needs if now else ():
                    extra[k] = extra.get(k, 0) - n
                if gain <= 0 or any(free.get(k, 0) < n for k, n in extra.items()):
                    continue
                score = gain / max(1, sum(max(0, n) for n in extra.values()))
                if best is None or score > best[0]:
                    best = (score, b.task_id, c, extra)
        if best is None:
            break
        _, t, c, extra = best
        chosen[t] = c
        for k, n in extra.items():
            free[k] -= n
    return Allocation({t: c.point_id for t, c in chosen.items()}, {}, "greedy")
