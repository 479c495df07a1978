"""The plan of a task on a site's boards, ranked as its scheduler will choose; and the order that comes of it.  Needs no server."""

from collections.abc import Mapping
from dataclasses import replace

import msgspec

from qipan.catalogue import site_catalogue
from qipan.curves import Curve
from qipan.engines.launcher import free_port
from qipan.errors import Infeasible
from qipan.leases import Order, TaskId
from qipan.planner import Option, Plan, plan_task, rank
from qipan.planner.charges import data_of
from qipan.planner.experience import Place
from qipan.planner.learn import Belief
from qipan.planner.sites import plan_sites
from qipan.scheduler.bids import most_efficient, worth_of
from qipan.scheduler.moves import links_of, move_to, worth_there
from qipan.workload import Launch, Task
from qipan.workload.site import Site


def plan_on(site: Site, task: Task, learned: Mapping[Place, Belief] | None = None) -> Plan:
    """Raises Infeasible when a part of a task over several sites has no option."""
    if task.sites is not None:
        return plan_parts(site, task, task.name, "")[1]
    plan = plan_task(
        task, site.root, site.links, vocab=vocabulary(task), chips=site_catalogue().chips, learned=learned
    )
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
    parts: dict[str, tuple[Task, Plan]] = {}
    for name, part in whole.parts.items():
        plan = plan_on(site, part)
        if plan.curve is None:
            raise Infeasible(
                f"{name}: " + "; ".join(f"{refused.place}: {refused.why}" for refused in plan.refused)
            )
        points = tuple(replace(point, strategy=whole.strategy) for point in plan.curve.points)
        parts[name] = (part, replace(plan, curve=replace(plan.curve, points=points)))
    options = tuple(replace(plan.options[0], why_not="") for _, plan in parts.values())
    first = next(iter(parts.values()))[1]
    return parts, replace(first, task=task.name, options=options, refused=(), curve=None)


def order_of(site: Site, task: Task, task_id: TaskId, curve: Curve, now_s: float) -> Order:
    """The task as the scheduler sees it.  It bids its budget over its device-hours at the most efficient point, or
    the dearest tariff it may meet."""
    best = most_efficient(curve)
    device_hours = curve.work_s / best.rate * best.devices / 3600
    if task.limits.max_cost_micro_cny is not None:
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
    )  # fmt: skip


def tenant_of(site: Site, task: Task) -> str:
    return task.tenant or (site.tenants[0].name if site.tenants else "me")


def vocabulary(task: Task) -> int:
    """The vocabulary that the built-in trainer will find in the data; 0 when the model states its own."""
    if task.run or task.model is None or task.model.vocab or task.kind not in ("train", "finetune"):
        return 0
    from qipan.trainer.data import load_corpus

    return load_corpus(task.data).vocab
