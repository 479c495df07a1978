"""The plan of a task on a site's boards, ranked as its scheduler will choose; and the order that comes of it.  Needs no server."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import permutations

import msgspec

from qipan.catalogue import site_catalogue
from qipan.curves import Curve, Point
from qipan.engines.launcher import free_port
from qipan.errors import Infeasible
from qipan.hardware import BoardId
from qipan.leases import Order, TaskId
from qipan.network import link_between
from qipan.planner import Option, Plan, plan_task, rank
from qipan.planner.charges import data_of
from qipan.planner.experience import Place
from qipan.planner.learn import Belief
from qipan.planner.option import Meetings
from qipan.planner.sites import meetings, plan_sites
from qipan.planner.stages import Rates, StagedPlan, plan_stages
from qipan.quantities import format_duration, format_money
from qipan.scheduler.bids import most_efficient, worth_of
from qipan.scheduler.moves import links_of, move_to, worth_there
from qipan.strategy import Strategy
from qipan.workload import Launch, Task
from qipan.workload.model import parameter_count
from qipan.workload.site import Site
from qipan.workload.stages import relations_of
from qipan.workload.task import Replica

#: so many times as long as planned may lie between checkpoints of the built-in trainer where the storage is short of bytes/s: what they
#: and failures cost together is then 2.1 times the least (Young 1974: k + 1/k over 2)
LONGER = 4.0
#: seconds of work of what ends by its time alone, far beyond any
ENDLESS_S = 1e10


def plan_on(
    site: Site, task: Task, learned: Mapping[Place, Belief] | None = None, rates: Rates | None = None
) -> Plan:
    """Raises Infeasible when a part of a task over several sites, or a stage, has no option."""
    if task.sites is not None:
        return plan_parts(site, task, task.name, "")[1]
    if task.stages:
        return plan_staged(site, task, learned, rates).whole
    if task.is_service and task.replica is None:
        return plan_service(site, task, task.name)[1]
    return _ranked(site, task, learned)


def _ranked(
    site: Site, task: Task, learned: Mapping[Place, Belief] | None = None, samples: int = 0,
    samples_per_s: Mapping[str, float] | None = None,
) -> Plan:  # fmt: skip
    plan = plan_task(
        task, site.root, site.links, vocab=vocabulary(task), chips=site_catalogue().chips, learned=learned, samples=samples,
        samples_per_s=samples_per_s,
    )  # fmt: skip
    if plan.curve is None:
        return plan
    curve = plan.curve
    order, links = order_of(site, task, TaskId(task.name), curve, 0.0), links_of(site.links)
    worth = worth_of(order, 0.0, 0.0)
    tariffs = {
        f"{pool.site}|{pool.chip_class}": pool.tariff_micro_cny_per_device_hour for pool in site.pools()
    }

    def score(option: Option) -> float:
        tariff = tariffs[f"{option.place}|{option.chip_class}"]
        move = move_to(links, order.data_bytes_at, option.place)
        return -worth_there(worth, curve.point(option.point_id), tariff, move)

    ranked = rank(plan.options, score)
    return replace(plan, options=ranked, chosen=ranked[0].option_id)


def plan_parts(
    site: Site, task: Task, task_id: str, coordinator: str
) -> tuple[dict[str, tuple[Task, Plan]], Plan]:
    """Each part with its plan, under one strategy; and the plan of all of them together.  Raises Infeasible."""
    assert task.sites is not None
    endpoints = {part.at: f"127.0.0.1:{free_port()}" for part in task.sites.parts}
    whole = plan_sites(task, task_id, site.root, site.links, coordinator, endpoints)
    plans: dict[str, Plan] = {}
    for name, part in whole.parts.items():
        plan = plan_on(site, part)
        if plan.curve is None:
            raise Infeasible(
                f"{name}: " + "; ".join(f"{refused.place}: {refused.why}" for refused in plan.refused)
            )
        plans[name] = plan
    met = _met(site, task, whole.strategy, plans)
    parts = {name: (whole.parts[name], _meeting(plan, met, whole.strategy)) for name, plan in plans.items()}
    options = tuple(replace(plan.options[0], why_not="") for _, plan in parts.values())
    _within_limits(task, options)
    first = next(iter(parts.values()))[1]
    return parts, replace(first, task=task.name, options=options, refused=(), curve=None, meetings=met)


def _met(site: Site, task: Task, strategy: Strategy, plans: Mapping[str, Plan]) -> Meetings | None:
    """None where no link between the sites is stated."""
    assert task.model is not None
    ways, ids = site.root.ways(), [BoardId(one.id) for one in strategy.sites]
    links = [
        replace(link, source=source, target=target)
        for source, target in permutations(ids, 2)
        if (link := link_between(site.links, ways[source], ways[target])) is not None
    ]
    if not links:
        return None
    model = replace(task.model, vocab=task.model.vocab or vocabulary(task))
    steps = task.work.tokens // task.work.global_batch_tokens
    inner_s = max(plan.options[0].step_s for plan in plans.values())
    return meetings(strategy, parameter_count(model), steps, inner_s, links)


def _meeting(plan: Plan, met: Meetings | None, strategy: Strategy) -> Plan:
    """The plan of a part, with the strategy of the whole and the time that its meetings take."""
    assert plan.curve is not None
    extra_s = met.extra_s if met is not None else 0.0
    points = tuple(replace(point, strategy=strategy) for point in plan.curve.points)
    curve = replace(plan.curve, points=points, work_s=plan.curve.work_s + extra_s)
    options = tuple(option.lasting(option.finish_p50_s + extra_s) for option in plan.options)
    return replace(plan, options=options, curve=curve)


def _within_limits(task: Task, options: Sequence[Option]) -> None:
    """Each part was planned within them before what its sites exchange was counted."""
    limits, less = task.limits, "exchange less (`sites: every`, `codec`)"
    ends_s = max(option.finish_p50_s for option in options)
    if limits.deadline_s is not None and ends_s > limits.deadline_s:
        raise Infeasible(
            f"{task.name}: with what its sites exchange it ends after {format_duration(ends_s)} (p50), limits.deadline is"
            f" {format_duration(limits.deadline_s)}; give it more time, or {less}"
        )
    cost = sum(option.cost_p50_micro_cny for option in options)
    if limits.max_cost_micro_cny is not None and cost > limits.max_cost_micro_cny:
        raise Infeasible(
            f"{task.name}: with what its sites exchange it costs {format_money(cost)} (p50), limits.max_cost is"
            f" {format_money(limits.max_cost_micro_cny)}; raise it, or {less}"
        )


def plan_staged(
    site: Site, task: Task, learned: Mapping[Place, Belief] | None = None, rates: Rates | None = None
) -> StagedPlan:
    """Each stage with its plan, and the plan of all of them together.  Raises Infeasible."""
    known = rates or {}
    plans: dict[str, Plan] = {}
    for stage in task.stages:
        own = relations_of(stage)
        feeders = [relations_of(one) for one in task.stages if relations_of(one).feeds == stage.name]
        samples = own.samples or max((one.samples for one in feeders), default=0)
        per_s: dict[str, float] = {
            pool.chip_class: own.samples_per_s for pool in site.pools() if own.samples_per_s
        }
        per_s |= {
            chip: rate for (name, at, chip), rate in known.items() if (name, at) == (task.name, stage.name)
        }
        plan = plans[stage.name] = _ranked(site, stage, learned, samples, per_s)
        if plan.curve is None:
            raise Infeasible(
                f"{task.name}, stage {stage.name}: no place can run it: "
                + "; ".join(f"{refused.place}: {refused.why}" for refused in plan.refused)
            )
    devices: dict[tuple[str, str], int] = {}
    for pool in site.pools():
        devices[pool.site, pool.chip_class] = devices.get((pool.site, pool.chip_class), 0) + pool.devices
    return plan_stages(task, plans, devices, known)


def plan_service(site: Site, task: Task, task_id: str) -> tuple[dict[str, tuple[Task, Plan]], Plan]:
    """Each replica with its plan, and the plan of all of them, for the service's `time`, else for a period of the forecast.  Raises Infeasible."""
    forecast = task.forecast
    assert forecast is not None, "it was checked: a service has one"
    asked_s = [forecast.hours_of(number + 1).asked_s_of_period() for number in range(forecast.most())]
    parts: dict[str, tuple[Task, Plan]] = {}
    plans: dict[float, Plan] = {}  # seconds of a period in which a replica is asked for -> its plan
    for number, own_s in enumerate(asked_s, 1):
        budget = task.limits.max_cost_micro_cny
        if budget is not None:
            budget = round(budget * own_s / sum(asked_s))
        limits = replace(task.limits, max_cost_micro_cny=budget)
        part = replace(task, replica=Replica(task_id, number), limits=limits)
        if own_s not in plans:
            plans[own_s] = _ranked(site, part)
        plan = plans[own_s]
        if plan.curve is None:
            reasons = "; ".join(f"{refused.place}: {refused.why}" for refused in plan.refused)
            raise Infeasible(f"{task.name}: no place can run its replica {number}: {reasons}")
        parts[f"{task_id}.r{number}"] = (part, plan)
    first = parts[f"{task_id}.r1"][1]
    more = sum(asked_s) / asked_s[0]
    assert first.curve is not None
    usable = {need.chip_class for point in first.curve.points for need in point.needs}
    room = sum(pool.devices // task.devices.min for pool in site.pools() if pool.chip_class in usable)
    short = f", room for {room} at once" if room < len(parts) else ""
    options = tuple(
        replace(
            option, devices=option.devices * len(parts), strategy=f"{len(parts)} replicas of its own script{short}",
            cost_p50_micro_cny=round(option.cost_p50_micro_cny * more),
            cost_p90_micro_cny=round(option.cost_p90_micro_cny * more),
        )
        for option in first.options
    )  # fmt: skip
    ranked = rank(options, options.index)  # in their order: each says by how much all its replicas are dearer
    return parts, replace(first, task=task.name, options=ranked, curve=None)


def order_of(site: Site, task: Task, task_id: TaskId, curve: Curve, now_s: float) -> Order:
    """The task as the scheduler sees it.  It bids its budget over its device-hours at the most efficient point, or
    the dearest tariff it may meet."""
    best, hours, work_s = most_efficient(curve), None, curve.work_s
    if task.forecast is not None and task.replica is not None:
        life_s = task.limits.time_limit_s
        hours = task.forecast.hours_of(task.replica.number, now_s + life_s if life_s is not None else None)
        work_s = hours.asked_s_of_period() * (life_s or hours.every_s) / hours.every_s
        curve = replace(curve, work_s=ENDLESS_S)
    device_hours = work_s / best.rate * best.devices / 3600
    if task.limits.max_cost_micro_cny is not None and (hours is None or hours.until_s is not None):
        bid = round(task.limits.max_cost_micro_cny / device_hours)
    else:
        usable = {need.chip_class for point in curve.points for need in point.needs}
        bid = max(pool.tariff_micro_cny_per_device_hour for pool in site.pools() if pool.chip_class in usable)
    deadline_s = now_s + task.limits.deadline_s if task.limits.deadline_s is not None else None
    size = best.storage_bytes // task.checkpoint.keep
    return Order(
        task_id, tenant_of(site, task), task.name, curve, bid, now_s, deadline_s, task.elastic, task.objective,
        task.limits.regions, task.limits.vendors, on_partition=task.on_partition,
        launch=msgspec.json.encode(Launch(task)), preemptible=task.elastic, kind=task.kind, apart=task.limits.apart,
        data_bytes_at=data_of(task, site.root), checkpoint_bytes=size,
        checkpoint_longer_max=longer_max(task, best), hours=hours,
    )  # fmt: skip


def longer_max(task: Task, point: Point) -> float:
    """How many times as long as planned may lie between its checkpoints.  The built-in trainer's planned ones lose little by it; what a
    file states is changed only as far as it says, and so is a script's, which must follow QIPAN_CHECKPOINT_EVERY_S."""
    if not point.storage_bytes or not point.storage_bytes_per_s:
        return 1.0
    stated = task.checkpoint
    if stated.longest_s is not None:
        return max(1.0, stated.longest_s * point.storage_bytes_per_s * stated.keep / point.storage_bytes)
    return 1.0 if task.run or stated.every_s is not None or task.stage is not None else LONGER


def tenant_of(site: Site, task: Task) -> str:
    return task.tenant or (site.tenants[0].name if site.tenants else "me")


def vocabulary(task: Task) -> int:
    """The vocabulary that the built-in trainer will find in the data; 0 when the model states its own."""
    if task.run or task.model is None or task.model.vocab or task.kind not in ("train", "finetune"):
        return 0
    from qipan.trainer.data import load_corpus

    return load_corpus(task.data).vocab
