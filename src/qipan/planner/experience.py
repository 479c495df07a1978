"""What tasks that ended taught of the planner's constants: from facts that a board has anyway, for the next plan there."""

import statistics
from collections.abc import Iterable, Sequence

from qipan.events import TaskProgress
from qipan.planner.cluster import FASTER, SLOWER
from qipan.planner.learn import Belief, Seen, observe, planned
from qipan.planner.option import Plan

#: (site, chip class)
Place = tuple[str, str]
#: a site may be as far off as a chip that nobody measured
UNKNOWN = 2.0
STEP_S_MAX = 1e6


def seen_in(plan: Plan, facts: Sequence[TaskProgress]) -> list[tuple[Place, Seen]]:
    """Of each point that the task ran at: the median of the step times its trainer told, beside the planned parts.  Scripts that
    tell no step time, and points that the plan has no parts of, teach nothing."""
    told: dict[tuple[str, str], list[float]] = {}
    for fact in facts:
        if (step_s := _told_s(fact)) is not None:
            told.setdefault((fact.usage.board, fact.usage.point_id), []).append(step_s)
    options = {(option.place, option.point_id): option for option in plan.options}
    found: list[tuple[Place, Seen]] = []
    for key, times in sorted(told.items()):
        option = options.get(key)
        if option is not None and (parts := option.before_s or option.parts_s):
            seen = Seen(parts, statistics.median(times), len(times))
            found.append(((option.place, option.chip_class), seen))
    return found


def _told_s(fact: TaskProgress) -> float | None:
    """Only a number of seconds that a step can take is one."""
    said = fact.said()
    step_s = said.get("step_s") if said.get("event") == "progress" else None
    if isinstance(step_s, bool) or not isinstance(step_s, int | float):
        return None
    return float(step_s) if 0 < step_s <= STEP_S_MAX else None


def beliefs(lessons: Iterable[tuple[Place, Seen]]) -> dict[Place, Belief]:
    """One for each place where something was seen."""
    by_place: dict[Place, list[Seen]] = {}
    for place, seen in lessons:
        by_place.setdefault(place, []).append(seen)
    start = planned(FASTER**UNKNOWN, SLOWER**UNKNOWN)
    return {place: observe(start, seen) for place, seen in sorted(by_place.items())}
