"""A plan: options with cost and finish, refusals with reasons, and the curve that the scheduler runs on."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from itertools import combinations

from qipan.curves import Curve, Need, Point
from qipan.hardware import BoardSpec, ChipClass, ChipClassId, Pool
from qipan.network import Link
from qipan.planner.charges import kept_micro_cny, lies_at, move, saving, stored_bytes, usual_bytes
from qipan.planner.cluster import SAVE_S, START_S, Best, band, best_layouts, failures_per_s, known, why_none
from qipan.planner.evidence import nearest
from qipan.planner.groups import best_groups
from qipan.planner.learn import Belief, corrected_s, scaled_parts
from qipan.planner.machine import CHECKPOINT_BYTES
from qipan.planner.mixed import Mixed, Side, best_mixed
from qipan.planner.option import Option, Plan, Refused, Scene
from qipan.planner.risk import finish
from qipan.planner.steps import Layout, best_layout, memory_bytes, parts_s, strategy_of
from qipan.planner.useful import checkpoint_every_s as young_s
from qipan.planner.useful import useful_share
from qipan.quantities import format_devices, format_duration, format_money
from qipan.strategy import Strategy
from qipan.workload import Task
from qipan.workload.model import Model, parameter_count

#: relative half-width of the 10-90 % band that the closed form itself earns, beside what the probe scattered
MODEL_BAND = 0.15
#: failures of a local process per device-hour, for the checkpoint interval
FAILURES_PER_DEVICE_HOUR = 0.1
BAND_START = 0.35
#: ranks make their world anew (`benchmarks.resize`, loaded cores: 0.2 s to shrink, 3 s to grow)
RESHAPE_S = 3.0
#: of a feeding stage that states no `devices`
WORKERS_MOST = 64


def plan_task(
    task: Task,
    root: BoardSpec,
    links: Sequence[Link] = (),
    *,
    vocab: int = 0,
    data_bytes: int = 0,
    data_at: str = "",
    chips: Mapping[ChipClassId, ChipClass] | None = None,
    learned: Mapping[tuple[str, str], Belief] | None = None,
    samples: int = 0,
    samples_per_s: Mapping[str, float] | None = None,
) -> Plan:
    """Plan a task on a tree of boards.  `samples` that a stage's script prepares or takes at `samples_per_s` (chip class -> of one device) say how long it runs.  `chips`: catalogue facts, for pools that were never probed.  `vocab` is used when the model takes it from its data; `data_bytes` (0: as its
    tokens usually take) lie at the site `data_at` ("": the one whose storage an address names, else wherever the task runs)."""
    if task.kind not in ("train", "finetune", "batch") and not task.is_service:
        why = f"kind {task.kind} is not yet runnable"
        return Plan(task.name, (), (Refused("everywhere", "any", task.name, why),), "", None)
    regions = {board.board: board.region for board in root.walk()}
    model = replace(task.model, vocab=task.model.vocab or vocab) if task.model is not None else None
    size = data_bytes or usual_bytes(task)
    at = data_at or lies_at(task.data, root)
    scene = Scene(
        task, model, root, regions, chips or {}, links, size, at, learned or {}, samples, samples_per_s or {}
    )
    refused: list[Refused] = []
    raw: list[Raw] = []
    for pool in sorted(
        (pool for board in root.walk() for pool in board.pools), key=lambda pool: pool.pool_id
    ):
        why = _not_allowed(task, pool, regions[pool.site], scene.chips.get(pool.chip_class))
        if why:
            refused.append(Refused(pool.site, pool.chip_class, format_devices(pool.devices), why))
            continue
        found, no = _points(scene, pool)
        raw += found
        refused += no
    if not raw:
        return Plan(
            task.name, (), tuple(refused), "", None, vocab if task.model and not task.model.vocab else 0
        )
    best = max(point.rate for _, _, _, point, *_ in raw)
    curve = _curve(scene, raw, best)
    every_s = _checkpoint_every_s(task, raw)
    curve = _with_storage(curve, task, model, every_s)
    options = [
        _option(scene, pool, label, point, step, layout, every_s)
        for pool, _, label, point, step, layout in raw
    ]
    kept = [option for option in options if not _over_limits(task, option)]
    refused += _out_of_limits(task, [option for option in options if _over_limits(task, option)])
    if not kept:
        return Plan(task.name, (), tuple(refused), "", None)
    used = {option.point_id for option in kept}
    curve = replace(curve, points=tuple(point for point in curve.points if point.point_id in used))
    ranked = _choose(task, kept)
    assumed = vocab if task.model is not None and not task.model.vocab else 0
    every_s = ranked[0].checkpoint_every_s
    mixed = _mixed(scene, ranked)
    return Plan(task.name, ranked, tuple(refused), ranked[0].option_id, curve, assumed, every_s, mixed)


def _mixed(scene: Scene, options: Sequence[Option]) -> tuple[Option, ...]:
    """An option for each pair of unlike pools at one site that ends within the limits."""
    task, model, chips, regions = scene.task, scene.model, scene.chips, scene.regions
    if model is None or not task.work.tokens or task.devices.max:
        return ()
    rows, steps = (
        task.work.global_batch_tokens // task.work.seq,
        task.work.tokens // task.work.global_batch_tokens,
    )
    found = []
    for board in scene.root.walk():
        sides = [
            Side(pool, chips[pool.chip_class])
            for pool in board.pools
            if pool.probe is None and pool.chip_class in chips and known(chips[pool.chip_class])
            and not _not_allowed(task, pool, regions[pool.site])
        ]  # fmt: skip
        for one, other in combinations(sides, 2):
            if one.pool.chip_class == other.pool.chip_class:
                continue
            pair = (
                best_mixed(model, one, other, rows, task.work.seq, task.work.seed),
                best_groups(model, (one, other), rows, task.work.seq, task.work.seed),
            )
            for mixed in pair:
                if mixed is None:
                    continue
                option = _mixed_option(scene, model, mixed, regions[board.board], max(1, steps))
                if not _over_limits(task, option):
                    front = not any(
                        kept.cost_p50_micro_cny <= option.cost_p50_micro_cny
                        and kept.finish_p50_s <= option.finish_p50_s
                        for kept in options
                    )
                    found.append(replace(option, on_front=front))
    return tuple(sorted(found, key=lambda option: (option.finish_p50_s, option.option_id)))


def _mixed_option(scene: Scene, model: Model, mixed: Mixed, region: str, steps: int) -> Option:
    task = scene.task
    bands = [band(side.chip) for side in mixed.sides]
    failing = sum(failures_per_s(side.pool, side.pool.devices) for side in mixed.sides)
    site = mixed.sides[0].pool.site
    name = "+".join(side.pool.pool_id for side in mixed.sides)
    store = scene.store(site)
    saved = saving(model, mixed.sides[0].chip, mixed.devices, store, SAVE_S)
    every_s = task.checkpoint.every_s or young_s(saved.save_s, failing)
    restart_s = START_S + saved.load_s + mixed.step_s
    ends = finish(
        task.work.seed, name, mixed.step_s * steps, (min(low for low, _ in bands), max(high for _, high in bands)),
        START_S, BAND_START, every_s, saved.save_s, restart_s, failing, task.limits.deadline_s,
    )  # fmt: skip
    price = sum(side.pool.tariff_micro_cny_per_device_hour * side.pool.devices for side in mixed.sides) / 3600
    run = nearest(mixed.sides[0].pool.chip_class, parameter_count(model), mixed.devices, task.work.seq)
    slow = max(mixed.parts_s, key=lambda part: mixed.parts_s[part] if part != "compute" else 0.0)
    useful = useful_share(every_s, saved.save_s, restart_s, failing)
    kept = kept_micro_cny(store, stored_bytes(scene.data_bytes, saved), ends.p50_s)
    kind = "stages" if mixed.rows is None else "rows"
    return Option(
        f"{name}:{mixed.devices}:{kind}", site, region, " + ".join(side.pool.chip_class for side in mixed.sides),
        mixed.devices,
        mixed.label(),
        mixed.step_s, START_S, restart_s + saved.save_s, ends.p10_s, ends.p50_s, ends.p90_s, round(ends.p50_s * price) + kept,
        round(ends.p90_s * price) + kept, 0, 0.0, useful, "catalogue + model fitted to published runs", "",
        why_not="boards give no lease over unlike chips yet", deadline_odds=ends.odds, limit=slow,
        parts_s=mixed.parts_s, memory_bytes=round(mixed.memory_bytes), evidence=str(run), storage_micro_cny=kept,
        save_s=saved.save_s, checkpoint_every_s=every_s,
    )  # fmt: skip


def _not_allowed(task: Task, pool: Pool, region: str, chip: ChipClass | None = None) -> str:
    limits = task.limits
    named = any(fnmatchcase(pool.chip_class, pattern) for pattern in limits.chips if pattern.strip("*"))
    if chip is not None and chip.on_request and pool.probe is None and not named:
        return (
            f"{pool.chip_class} is the site's own model and was never measured; `qipan chips measure --as "
            f"{pool.chip_class}` on its nodes, or name it in limits.chips"
        )
    if limits.chips and not any(fnmatchcase(pool.chip_class, pattern) for pattern in limits.chips):
        return f"limits.chips is {', '.join(limits.chips)}; add {pool.chip_class} to use it"
    if limits.vendors and pool.chip_class.split("/")[0] not in limits.vendors:
        return f"limits.vendors is {', '.join(limits.vendors)}; add {pool.chip_class.split('/')[0]} to use it"
    if limits.regions and not any(
        fnmatchcase(region, pattern) or fnmatchcase(pool.site, pattern) for pattern in limits.regions
    ):
        return (
            f"limits.regions is {', '.join(limits.regions)}, this is {region or pool.site}; add it to use it"
        )
    return ""


#: pool, devices, label, point with its rate in tasks per second, seconds of a step, layout on catalogue chips
Raw = tuple[Pool, int, str, Point, float, Best | None]


def _points(scene: Scene, pool: Pool) -> tuple[list[Raw], list[Refused]]:
    task, model, chip = scene.task, scene.model, scene.chips.get(pool.chip_class)
    if pool.probe is None and chip is not None and model is not None and task.work.tokens and known(chip):
        return _catalogue_points(scene, model, pool, chip)
    return _script_points(scene, pool) if task.run else _trainer_points(scene, pool)


def _catalogue_points(
    scene: Scene, model: Model, pool: Pool, chip: ChipClass
) -> tuple[list[Raw], list[Refused]]:
    """A model that is stated is planned for a script too: the script is given the strategy."""
    task, belief = scene.task, scene.belief(pool)
    seq = task.work.seq
    rows = task.work.global_batch_tokens // seq
    steps = max(1, task.work.tokens // task.work.global_batch_tokens)
    least, most = max(1, task.devices.min), min(task.devices.max or pool.devices, pool.devices)
    found: list[Raw] = []
    for best in best_layouts(
        model, pool, chip, rows, seq, task.work.seed, least, most, fp8=task.work.precision == "fp8"
    ):
        low = best.strategy.sites[0].precision == "fp8"
        faster, slower = band(chip, fp8=low)
        low_s, high_s = best.step_s * faster, best.step_s * slower
        if belief is not None:
            low_s, middle_s, high_s = corrected_s(belief, best.parts_s)
            parts = scaled_parts(belief, best.parts_s)
            best = replace(best, step_s=middle_s, parts_s=parts, before_s=best.parts_s)
        saved = saving(model, chip, best.devices, scene.store(pool.site), SAVE_S)
        point = Point(
            f"{pool.chip_class}:{best.devices}", (Need(pool.chip_class, best.devices, pool.devices_per_node),),
            1.0 / (best.step_s * steps), 1.0 / (high_s * steps), 1.0 / (low_s * steps), start_s=START_S,
            stop_s=best.step_s + saved.save_s,
            strategy=best.strategy, memory_margin=best.memory_margin,
            reshape_s=_reshape_s(task, best.strategy, saved.save_s + saved.load_s),
        )  # fmt: skip
        label = best.strategy.label() + (" fp8" if low else "")
        found.append((pool, best.devices, label, point, best.step_s, best))
    if not found:
        why = why_none(model, chip, rows, seq, pool, least, most)
        return [], [Refused(pool.site, pool.chip_class, format_devices(pool.devices), why)]
    return found, []


def _reshape_s(task: Task, strategy: Strategy, disk_s: float) -> float | None:
    """How long the built-in trainer stands still to go on at another point in its processes, by way of the disk (`disk_s`) where
    no rank holds the whole model; None: it is started again."""
    if task.run or task.part is not None or strategy.outer is not None:
        return None
    site = strategy.sites[0]
    first = site.stages[0]
    whole = len(site.stages) == 1 and not site.zero and first.tp == first.ep == 1
    return RESHAPE_S if whole else RESHAPE_S + disk_s


def _script_points(scene: Scene, pool: Pool) -> tuple[list[Raw], list[Refused]]:
    """A script is opaque: its own shape, and its time limit as duration.  Elastic scripts are taken to speed up
    with the square root of their devices until their progress tells; samples that are prepared apart from each other, in proportion."""
    task = scene.task
    feeds = task.stage is not None and task.stage.feeds
    least = max(1, task.devices.min)
    most = max(least, task.devices.max) if task.elastic or feeds else least
    if feeds and not task.devices.max:
        most = max(least, min(pool.devices, WORKERS_MOST))
    if pool.devices < least:
        why = f"needs {format_devices(least)}, the pool has {pool.devices}; lower `devices`"
        return [], [Refused(pool.site, pool.chip_class, "own script", why)]
    limit_s, start_s, band = task.limits.time_limit_s or 3600.0, 1.0, 2.0
    if task.forecast is not None:  # a replica's cost and duration are those of its `time`, else of a period
        number = task.replica.number if task.replica is not None else 1
        periods = (task.limits.time_limit_s or task.forecast.every_s) / task.forecast.every_s
        limit_s = task.forecast.hours_of(number).asked_s_of_period() * periods
        start_s, band = task.forecast.start_s, 1.0
    per_node, nodes = pool.devices_per_node, pool.devices // max(1, pool.devices_per_node)
    if task.devices.per_node and nodes > 1:  # a pool of one node runs it there, once
        per_node = task.devices.per_node
        wanted = least // per_node
        if per_node > pool.devices_per_node or wanted > nodes:
            why = (
                f"needs {wanted} nodes with {format_devices(per_node)} each, the pool has {nodes} with {pool.devices_per_node};"
                " change `devices: per_node`"
            )
            return [], [Refused(pool.site, pool.chip_class, "own script", why)]
        most = min(most, nodes * per_node)
    per_device = scene.samples_per_s.get(pool.chip_class, 0.0)
    found: list[Raw] = []
    for devices in range(least, min(most, pool.devices) + 1, task.devices.per_node or 1):
        rate = math.sqrt(devices / most) / limit_s
        if scene.samples and per_device:
            rate = devices * per_device / scene.samples
        need = Need(pool.chip_class, devices, per_node)
        point = Point(
            f"{pool.chip_class}:{devices}",
            (need,),
            rate,
            rate / band,
            rate * band,
            start_s=start_s,
            stop_s=1.0,
        )
        found.append((pool, devices, "own script", point, 0.0, None))
    return found, []


def _trainer_points(scene: Scene, pool: Pool) -> tuple[list[Raw], list[Refused]]:
    task, model, belief = scene.task, scene.model, scene.belief(pool)
    assert model is not None, "the task file was checked: the built-in trainer has a model"
    if pool.probe is None:
        why = "its speed was not measured here; run `qipan up` or `qipan plan` once without --no-probe"
        return [], [Refused(pool.site, pool.chip_class, format_devices(pool.devices), why)]
    probe, seq = pool.probe, task.work.seq
    rows = task.work.global_batch_tokens // seq
    steps = task.work.tokens // task.work.global_batch_tokens
    found: list[Raw] = []
    best_s = math.inf
    least, most = task.devices.min or 1, min(task.devices.max or pool.devices, pool.devices)
    for devices in range(least, most + 1):
        chosen = best_layout(devices, model, pool, rows, seq)
        if chosen is None:
            continue
        layout, seconds = chosen
        band = MODEL_BAND + probe.spread / math.sqrt(10)
        low_s, high_s = seconds / (1 + band), seconds / (1 - band)
        if belief is not None:
            low_s, seconds, high_s = corrected_s(belief, parts_s(layout, model, probe, rows, seq))
        if seconds >= best_s:
            continue  # more devices that do not help are no point
        best_s = seconds
        strategy = strategy_of(layout, model, pool.chip_class, rows, seq, task.work.seed, pool.site)
        start_s = probe.start_s + probe.save_s
        point = Point(
            f"{pool.chip_class}:{devices}", (Need(pool.chip_class, devices, pool.devices_per_node),),
            1.0 / (seconds * steps), 1.0 / (high_s * steps), 1.0 / (low_s * steps), start_s=start_s,
            stop_s=seconds + 2 * probe.save_s + 1.0,
            strategy=strategy, host_memory_bytes=memory_bytes(layout, model) * devices,
            reshape_s=_reshape_s(task, strategy, 2 * probe.save_s),
        )  # fmt: skip
        found.append((pool, devices, strategy.label(), point, seconds, None))
    if not found:
        why = f"no layout of {rows} rows and {model.heads} heads fits {least} to {pool.devices} devices"
        return [], [Refused(pool.site, pool.chip_class, format_devices(pool.devices), why)]
    return found, []


def _curve(scene: Scene, raw: Sequence[Raw], best: float) -> Curve:
    task = scene.task
    points = {
        point.point_id: replace(
            point, rate=point.rate / best, rate_p10=point.rate_p10 / best, rate_p90=point.rate_p90 / best
        )
        for _, _, _, point, *_ in raw
    }
    source = ("time limit" if task.limits.time_limit_s else "declared") if task.run else "planner"
    if scene.samples and scene.samples_per_s:
        source = "declared"
    return Curve(tuple(points[key] for key in sorted(points)), 1.0 / best, source)  # type: ignore[arg-type]


def _with_storage(curve: Curve, task: Task, model: Model | None, every_s: float) -> Curve:
    """What its checkpoints take of a site's storage.  A script that does not state their size takes nothing."""
    size = task.checkpoint.size_bytes
    if size is None:
        size = CHECKPOINT_BYTES * parameter_count(model) if model is not None else 0
    points = [
        replace(point, storage_bytes=size * task.checkpoint.keep, storage_bytes_per_s=size / every_s)
        for point in curve.points
    ]
    return replace(curve, points=tuple(points))


def _checkpoint_every_s(task: Task, raw: Sequence[Raw]) -> float:
    """On probed devices: Young's interval sqrt(2 * save * mean time between failures) (Young 1974), within 5 s and 30 min."""
    if task.checkpoint.every_s is not None:
        return task.checkpoint.every_s
    save_s = max((pool.probe.save_s if pool.probe else 1.0) for pool, *_ in raw)
    devices = max(devices for _, devices, *_ in raw)
    between_s = 3600.0 / (FAILURES_PER_DEVICE_HOUR * devices)
    return min(1800.0, max(5.0, math.sqrt(2 * save_s * between_s)))


def _option(
    scene: Scene, pool: Pool, label: str, point: Point, step: float, layout: Best | None, every_s: float
) -> Option:
    if layout is not None:
        return _risked(scene, pool, label, point, layout)
    task, store = scene.task, scene.store(pool.site)
    work_s = 1.0 / point.rate
    save_s = 2.0 * pool.probe.save_s if pool.probe and not task.run else 0.0
    useful = every_s / (every_s + save_s)
    move_bytes, move_s, egress = move(scene.links, scene.data_at, pool.site, scene.data_bytes)
    p50 = move_s + point.start_s + work_s / useful
    p10 = move_s + point.start_s * (1 - BAND_START) + 1.0 / point.rate_p90 / useful
    p90 = move_s + point.start_s * (1 + BAND_START) + 1.0 / point.rate_p10 / useful
    devices = point.devices
    price = pool.tariff_micro_cny_per_device_hour * devices / 3600
    kept = kept_micro_cny(store, scene.data_bytes, p50)
    parts, belief = _trained_parts(scene, pool, point), scene.belief(pool)
    return Option(
        f"{pool.pool_id}:{devices}", pool.site, scene.regions[pool.site], pool.chip_class, devices, label, step, point.start_s,
        point.stop_s + point.start_s, p10, p50, p90, round((p50 - move_s) * price) + kept + egress,
        round((p90 - move_s) * price) + kept + egress, move_bytes, move_s, useful,
        _source(scene, layout, belief), point.point_id,
        deadline_odds=_odds(task.limits.deadline_s, p10, p50, p90), parts_s=parts if belief is None else scaled_parts(belief, parts),
        storage_micro_cny=kept, egress_micro_cny=egress, save_s=save_s, checkpoint_every_s=every_s,
        before_s={} if belief is None else parts,
    )  # fmt: skip


def _trained_parts(scene: Scene, pool: Pool, point: Point) -> dict[str, float]:
    """Where the seconds of a step of the built-in trainer go."""
    task, model = scene.task, scene.model
    if point.strategy is None or pool.probe is None or model is None:
        return {}
    site = point.strategy.sites[0]
    layout = Layout(site.stages[0].tp, site.stages[0].dp, site.zero)
    return parts_s(layout, model, pool.probe, point.strategy.global_batch_rows, task.work.seq)


def _risked(scene: Scene, pool: Pool, label: str, point: Point, layout: Best) -> Option:
    """On catalogue chips: the model's error, the start and failures drawn together."""
    task, model, chip = scene.task, scene.model, scene.chips[pool.chip_class]
    assert model is not None, "a layout was worked out for it"
    deadline, store = task.limits.deadline_s, scene.store(pool.site)
    name = f"{pool.pool_id}:{layout.devices}"
    failing = failures_per_s(pool, layout.devices)
    saved = saving(model, chip, layout.devices, store, SAVE_S)
    every_s = task.checkpoint.every_s or young_s(saved.save_s, failing)
    restart_s = START_S + saved.load_s + layout.step_s
    useful = useful_share(every_s, saved.save_s, restart_s, failing)
    move_bytes, move_s, egress = move(scene.links, scene.data_at, pool.site, scene.data_bytes)
    ends = finish(
        task.work.seed, name, 1.0 / point.rate, (point.rate / point.rate_p90, point.rate / point.rate_p10),
        point.start_s, BAND_START, every_s, saved.save_s, restart_s, failing,
        None if deadline is None else deadline - move_s,
    )  # fmt: skip
    price = pool.tariff_micro_cny_per_device_hour * layout.devices / 3600
    kept = kept_micro_cny(store, stored_bytes(scene.data_bytes, saved), ends.p50_s)
    run = nearest(pool.chip_class, parameter_count(model), layout.devices, task.work.seq)
    unknown = (
        ""
        if run.chip_class == pool.chip_class
        else "no run was published on this chip, the band is twice as wide; "
    )
    return Option(
        name, pool.site, scene.regions[pool.site], pool.chip_class, layout.devices, label, layout.step_s, point.start_s,
        point.stop_s + point.start_s + saved.load_s, move_s + ends.p10_s, move_s + ends.p50_s, move_s + ends.p90_s,
        round(ends.p50_s * price) + kept + egress, round(ends.p90_s * price) + kept + egress, move_bytes, move_s, useful,
        _source(scene, layout, scene.belief(pool)), point.point_id, deadline_odds=ends.odds, limit=layout.limit,
        parts_s=layout.parts_s, memory_bytes=round(layout.memory_bytes), memory_parts=layout.memory_parts,
        memory_odds=layout.memory_odds, evidence=f"{unknown}{run}", storage_micro_cny=kept, egress_micro_cny=egress,
        save_s=saved.save_s, checkpoint_every_s=every_s, before_s=layout.before_s,
    )  # fmt: skip


def _source(scene: Scene, layout: Best | None, belief: Belief | None) -> str:
    if layout is None and scene.task.run:
        return "samples at their rate" if scene.samples and scene.samples_per_s else "time limit"
    source = "catalogue + model fitted to published runs" if layout is not None else "probe + closed form"
    return source if belief is None else f"{source} + steps of tasks that ended here"


def _odds(deadline_s: float | None, p10_s: float, p50_s: float, p90_s: float) -> float | None:
    """Chance to end in time: a lognormal on each side of the median, through p10 and p90 (1.2816 deviations)."""
    if deadline_s is None:
        return None
    side = p90_s if deadline_s > p50_s else p10_s
    deviation = abs(math.log(side / p50_s)) / 1.2816
    return 0.5 * math.erfc(-math.log(deadline_s / p50_s) / (deviation * math.sqrt(2)))


def _out_of_limits(task: Task, options: Sequence[Option]) -> list[Refused]:
    """A pool's options that break the same limit are one refusal, that of the option which breaks it least."""
    groups: dict[tuple[str, str, bool], list[Option]] = {}
    for option in options:
        deadline = task.limits.deadline_s
        late = deadline is not None and option.finish_p50_s > deadline
        groups.setdefault((option.place, option.chip_class, late), []).append(option)
    refused = []
    for (place, chip, late), group in groups.items():
        least = min(group, key=lambda option: option.finish_p50_s if late else option.cost_p50_micro_cny)
        counts = sorted(option.devices for option in group)
        what = f"{least.devices} x {least.strategy}"
        if len(group) > 1:
            what += f", and {len(group) - 1} more from {counts[0]} to {counts[-1]} devices"
        refused.append(Refused(place, chip, what, _over_limits(task, least)))
    return refused


def _over_limits(task: Task, option: Option) -> str:
    limits = task.limits
    if limits.deadline_s is not None and option.finish_p50_s > limits.deadline_s:
        return (
            f"ends after {format_duration(option.finish_p50_s)} (p50), limits.deadline is"
            f" {format_duration(limits.deadline_s)}; give it more time or fewer tokens"
        )
    if limits.max_cost_micro_cny is not None and option.cost_p50_micro_cny > limits.max_cost_micro_cny:
        return (
            f"costs {format_money(option.cost_p50_micro_cny)} (p50), limits.max_cost is"
            f" {format_money(limits.max_cost_micro_cny)}; raise it"
        )
    return ""


def _choose(task: Task, options: Sequence[Option]) -> tuple[Option, ...]:
    """Ranked by the objective alone."""
    least = min(option.cost_p50_micro_cny for option in options) or 1
    soonest = min(option.finish_p50_s for option in options)

    def score(option: Option) -> float:
        cost, time = option.cost_p50_micro_cny / least, option.finish_p50_s / soonest
        return {"cost": cost + 0.01 * time, "time": time + 0.01 * cost}.get(task.objective, cost + time)

    return rank(options, score)


def rank(options: Sequence[Option], score: Callable[[Option], float]) -> tuple[Option, ...]:
    """The option with the lowest score first; each other says why not.  A board ranks by what its scheduler would
    choose, so that the plan shows what will happen."""
    ranked = sorted(options, key=lambda option: (score(option), option.option_id))
    first = ranked[0]
    done = []
    for option in ranked:
        front = not any(
            other.cost_p50_micro_cny <= option.cost_p50_micro_cny
            and other.finish_p50_s <= option.finish_p50_s
            and other.option_id != option.option_id
            and (other.cost_p50_micro_cny, other.finish_p50_s)
            != (option.cost_p50_micro_cny, option.finish_p50_s)
            for other in options
        )
        dearer = option.cost_p50_micro_cny - first.cost_p50_micro_cny
        later = option.finish_p50_s - first.finish_p50_s
        end = f"{format_duration(abs(later))} {'later' if later >= 0 else 'sooner'}"
        why = (
            ""
            if option is first
            else (
                f"{'dearer' if dearer >= 0 else 'cheaper'} by {format_money(abs(dearer))}, ends"
                f" {end if abs(later) >= 0.5 else 'at the same time'}"
            )
        )
        done.append(replace(option, on_front=front, why_not=why))
    return tuple(done)
