"""Stages of a task: which option each takes, how many workers feed a stage so that it never waits, and when each begins.

A feeding stage has one worker a device.  Samples are prepared apart from each other, so its rate is that of one worker times their number.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from qipan.curves import Curve
from qipan.errors import Infeasible
from qipan.events import TaskProgress
from qipan.planner.learn import OWN_SPREAD
from qipan.planner.option import Flow, Option, Plan, StagePlan
from qipan.quantities import format_duration, format_money
from qipan.workload import Task
from qipan.workload.stages import relations_of, streams_of

#: (task, stage, chip class) -> samples per second of one device, as a stage that ended there told
Rates = Mapping[tuple[str, str, str], float]
RATE_MAX = 1e12


@dataclass(frozen=True, slots=True)
class StagedPlan:
    """`parts`: stage -> its task and its plan, whose curve has the points that it may take."""

    parts: dict[str, tuple[Task, Plan]]
    whole: Plan


def plan_stages(
    task: Task, plans: Mapping[str, Plan], devices: Mapping[tuple[str, str], int], rates: Rates
) -> StagedPlan:
    """`plans`: of each stage by itself, as if it never waited.  `devices`: (site, chip class) -> how many there are.  Raises Infeasible."""
    stages = {stage.name: stage for stage in task.stages}
    flows: list[Flow] = []
    chosen: dict[str, Option] = {}
    begins: dict[str, float] = {}
    together = streams_of(task.stages)
    for group in _in_order(task.stages):
        seats = _seated(task.name, _sinks_first(group, stages), stages, plans, devices, rates)
        if seats is None:
            wanted = ", ".join(
                f"{name} on {' or '.join(sorted({one.chip_class for one in plans[name].options}))}"
                for name in group
            )
            raise Infeasible(
                f"{task.name}: {' and '.join(group)} start together, and no places have devices for all at once: {wanted};"
                " give them unlike chips or fewer devices"
            )
        begin_s = max(
            (
                begins[one] + chosen[one].finish_p50_s
                for name in group
                for one in relations_of(stages[name]).after
            ),
            default=0.0,
        )
        streams = [
            _flow(task.name, stages[name], stages, seats, rates)
            for name in group
            if relations_of(stages[name]).feeds
        ]
        flows += streams
        chosen.update(_stretched(seats, streams))
        begins.update(dict.fromkeys(group, begin_s))
    _within_limits(task, chosen, begins)
    parts = {
        name: _part(task, stage, plans[name], chosen, streaming=len(together[name]) > 1) for name, stage in stages.items()
    }  # fmt: skip
    return StagedPlan(parts, _whole(task, plans, chosen, begins, flows))


def _in_order(stages: Sequence[Task]) -> list[tuple[str, ...]]:
    """Groups that stream into each other, each after those that it comes after."""
    together = streams_of(stages)
    after = {
        name: {one for stage in stages if stage.name in group for one in relations_of(stage).after}
        for name, group in together.items()
    }
    done: list[tuple[str, ...]] = []
    while len(done) < len(set(together.values())):
        names = {name for group in done for name in group}
        done += sorted(
            {group for name, group in together.items() if group not in done and after[name] <= names}
        )
    return done


def _sinks_first(group: Sequence[str], stages: Mapping[str, Task]) -> list[str]:
    """A stage before those that feed it."""

    def far(name: str) -> int:
        fed = relations_of(stages[name]).feeds
        return 1 + far(fed) if fed else 0

    return sorted(group, key=lambda name: (far(name), group.index(name)))


def _seated(
    whole: str, names: Sequence[str], stages: Mapping[str, Task], plans: Mapping[str, Plan], devices: Mapping[tuple[str, str], int], rates: Rates
) -> dict[str, Option] | None:  # fmt: skip
    """Options of these stages that fit together, the first ones in order of preference: the fed stage's own ranking, then for its feeders
    the cheapest that keep up with it, then the fastest."""
    dead = set[tuple[int, frozenset[tuple[tuple[str, str], int]]]]()

    def step(
        number: int, seats: dict[str, Option], taken: dict[tuple[str, str], int]
    ) -> dict[str, Option] | None:
        if number == len(names):
            return seats
        left = (number, frozenset(taken.items()))  # whether the others fit depends on nothing else
        if left in dead:
            return None
        stage = stages[names[number]]
        options = plans[stage.name].options
        fed = relations_of(stage).feeds
        if fed:
            pace = _taken(whole, stages[fed], seats[fed], rates)[0]
            options = tuple(sorted(options, key=lambda one: _as_feeder(whole, stage, one, pace, rates)))
        for option in options:
            key = (option.place, option.chip_class)
            used = taken.get(key, 0) + option.devices
            if used > devices.get(key, 0):
                continue
            found = step(number + 1, {**seats, stage.name: option}, {**taken, key: used})
            if found is not None:
                return found
        dead.add(left)
        return None

    return step(0, {}, {})


def _as_feeder(whole: str, stage: Task, option: Option, pace: float, rates: Rates) -> tuple[float, ...]:
    """Sorts what keeps up before what does not; the cheapest of those, the fastest of these.  Where a rate is not known: the fewest devices."""
    per_s = _per_device(whole, stage, option, rates)[0] * option.devices
    price = option.cost_p50_micro_cny / max(option.finish_p50_s, 1e-9)
    if not per_s or not pace:
        return (1.0, option.devices, price)
    return (0.0, price, option.devices) if keeps_up(per_s, pace) else (1.0, -per_s, price)


def keeps_up(made_per_s: float, taken_per_s: float) -> bool:
    """With what measured rates are off by to spare: the buffer evens out jitter, not a mean that is too low."""
    return made_per_s >= taken_per_s * (1 + OWN_SPREAD)


def workers_needed(made_per_s: float, taken_per_s: float) -> int:
    """The least number of workers of `made_per_s` samples each that keep up."""
    return max(1, math.ceil(taken_per_s * (1 + OWN_SPREAD) / made_per_s - 1e-9))


def _per_device(whole: str, stage: Task, option: Option, rates: Rates) -> tuple[float, str]:
    """Samples per second of one device, and who says so."""
    measured = rates.get((whole, stage.name, option.chip_class), 0.0)
    if measured:
        return measured, "measured in earlier runs"
    stated = relations_of(stage).samples_per_s
    return stated, "stated" if stated else "not known"


def _taken(whole: str, stage: Task, option: Option, rates: Rates) -> tuple[float, str]:
    """Samples per second that a stage takes when it never waits."""
    per_device, source = _per_device(whole, stage, option, rates)
    if not per_device and option.step_s and stage.work.seq:
        return stage.work.global_batch_tokens / stage.work.seq / option.step_s, option.source
    return per_device * option.devices, source


def _flow(
    whole: str, stage: Task, stages: Mapping[str, Task], seats: Mapping[str, Option], rates: Rates
) -> Flow:
    fed = relations_of(stage).feeds
    made, made_source = _per_device(whole, stage, seats[stage.name], rates)
    taken, taken_source = _taken(whole, stages[fed], seats[fed], rates)
    workers = seats[stage.name].devices
    if not made or not taken:
        unknown = " and ".join(name for name, rate in ((stage.name, made), (fed, taken)) if not rate)
        text = f"{stage.name} -> {fed}: whether {fed} waits is not known: state samples_per_s of {unknown}, or run it once"
        return Flow(stage.name, fed, made, made_source, taken, taken_source, workers, None, None, "", text)
    wait_share, needed = max(0.0, 1 - made * workers / taken), workers_needed(made, taken)
    limit = stage.name if wait_share else fed
    rates_text = f"{workers} x {made:.1f} samples/s ({made_source}), {fed} takes {taken:.1f} ({taken_source})"
    if wait_share:
        end = f"{fed} waits {wait_share:.0%} of its time, limited by {stage.name}; {needed} workers would end that"
    else:
        end = f"{needed} {'worker is' if needed == 1 else 'workers are'} needed so that {fed} never waits; limited by {fed}"
    text = f"{stage.name} -> {fed}: {rates_text}: {end}"
    return Flow(
        stage.name, fed, made, made_source, taken, taken_source, workers, needed, wait_share, limit, text
    )


def _stretched(seats: Mapping[str, Option], flows: Iterable[Flow]) -> dict[str, Option]:
    """Stages that stream end together: the fed one later by what it waits, its feeders with it."""
    flows = list(flows)
    if not flows:
        return dict(seats)
    fed = {flow.fed for flow in flows}
    slowest = max(flow.wait_share or 0.0 for flow in flows)
    own_s = max(option.finish_p50_s for name, option in seats.items() if name in fed)
    ends_s = own_s / (1 - slowest)
    return {name: option.lasting(ends_s) for name, option in seats.items()}


def _within_limits(task: Task, chosen: Mapping[str, Option], begins: Mapping[str, float]) -> None:
    ends_s = max(begins[name] + option.finish_p50_s for name, option in chosen.items())
    deadline_s, most = task.limits.deadline_s, task.limits.max_cost_micro_cny
    if deadline_s is not None and ends_s > deadline_s:
        raise Infeasible(
            f"{task.name}: its last stage ends after {format_duration(ends_s)} (p50), limits.deadline is {format_duration(deadline_s)};"
            " give it more time or less to do"
        )
    cost = sum(option.cost_p50_micro_cny for option in chosen.values())
    if most is not None and cost > most:
        each = ", ".join(
            f"{name} {format_money(option.cost_p50_micro_cny)}" for name, option in chosen.items()
        )
        raise Infeasible(
            f"{task.name}: its stages cost {format_money(cost)} (p50: {each}), limits.max_cost is {format_money(most)}; raise it"
        )


def _part(
    task: Task, stage: Task, plan: Plan, chosen: Mapping[str, Option], *, streaming: bool
) -> tuple[Task, Plan]:
    """What streams takes the option that was planned for it, and keeps it; what does not may take any of its own."""
    assert plan.curve is not None
    option, most = chosen[stage.name], task.limits.max_cost_micro_cny
    if most is not None and stage.limits.max_cost_micro_cny is None:
        share = option.cost_p50_micro_cny / max(1, sum(one.cost_p50_micro_cny for one in chosen.values()))
        stage = replace(stage, limits=replace(stage.limits, max_cost_micro_cny=round(most * share)))
    if not streaming:
        return stage, plan
    point = replace(plan.curve.point(option.point_id), rate=1.0, rate_p10=option.finish_p50_s / option.finish_p90_s,
                    rate_p90=option.finish_p50_s / option.finish_p10_s)  # fmt: skip
    curve = Curve((point,), option.finish_p50_s, plan.curve.source)
    return replace(stage, elastic=False), replace(
        plan, options=(option,), chosen=option.option_id, curve=curve
    )


def _why_not(
    stage: str, options: Sequence[Option], chosen: Option, flows: Sequence[Flow]
) -> tuple[Option, ...]:
    """The options of a stage, each but the chosen one with what speaks against it."""
    flow = next((one for one in flows if one.feeder == stage and one.workers_needed is not None), None)

    def why(option: Option) -> str:
        if option.option_id == chosen.option_id:
            return ""
        if flow is not None and option.chip_class == chosen.chip_class:
            waits = 1 - flow.made_per_s * option.devices / flow.taken_per_s
            return (
                f"{flow.fed} would wait {waits:.0%} of its time"
                if waits > 0
                else "more workers than it takes"
            )
        return (
            option.why_not
            or f"no room for it beside {', '.join(sorted({one.fed for one in flows if one.feeder == stage} | {one.feeder for one in flows if one.fed == stage}))}"
        )

    return tuple(replace(option, why_not=why(option)) for option in options)


def _whole(
    task: Task,
    plans: Mapping[str, Plan],
    chosen: Mapping[str, Option],
    begins: Mapping[str, float],
    flows: Sequence[Flow],
) -> Plan:
    views = tuple(
        StagePlan(
            stage.name, begins[stage.name], begins[stage.name] + chosen[stage.name].finish_p50_s, relations_of(stage).after,
            relations_of(stage).feeds, _why_not(stage.name, plans[stage.name].options, chosen[stage.name], flows),
            plans[stage.name].refused, chosen[stage.name].option_id,
        )
        for stage in task.stages
    )  # fmt: skip
    options = tuple(
        replace(
            option, finish_p10_s=begins[name] + option.finish_p10_s, finish_p50_s=begins[name] + option.finish_p50_s,
            finish_p90_s=begins[name] + option.finish_p90_s, why_not="", on_front=True,
        )
        for name, option in ((stage.name, chosen[stage.name]) for stage in task.stages)
    )  # fmt: skip
    return Plan(task.name, options, (), options[0].option_id, None, stages=views, flows=tuple(flows))


def rate_in(facts: Iterable[TaskProgress]) -> dict[str, float]:
    """Chip class -> samples per second of one device, as a stage that streams told last."""
    found: dict[str, float] = {}
    for fact in facts:
        told = told_of_stream(fact)
        rate = told.get("samples_per_s_per_device") if told is not None else None
        if isinstance(rate, int | float) and not isinstance(rate, bool) and 0 < rate <= RATE_MAX:
            found[fact.usage.chip_class] = float(rate)
    return found


def told_of_stream(fact: TaskProgress) -> dict[str, object] | None:
    """Only what the stream's own library tells is one."""
    said = fact.said()
    return said if said.get("event") == "stream" else None


def stream_text(fed: str, reading: Mapping[str, object], feeder: str, writing: Mapping[str, object]) -> str:
    """One sentence on a stream as both ends told last; empty before the reader told anything."""
    share, taken = _number(reading, "wait_share"), _number(reading, "samples_per_s")
    made, workers = _number(writing, "samples_per_s_per_device"), _number(writing, "workers")
    if share is None:
        return ""
    text = f"{fed} waited {share:.0%} of its time for samples of {feeder}"
    if not taken or not made or not workers:
        return text
    text += f", whose {workers:.0f} {'worker prepares' if workers == 1 else 'workers prepare'} {made * workers:.1f}/s; it takes {taken:.1f}/s"
    need = workers_needed(made, taken)
    return f"{text}: {need} workers would keep it busy" if need > workers else text


def _number(told: Mapping[str, object], key: str) -> float | None:
    value = told.get(key)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
