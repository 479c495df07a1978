"""`qipan balance`: what limits a task, or a site and its last tasks."""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from qipan.errors import Infeasible, InvalidInput, NotFound

if TYPE_CHECKING:
    from qipan.planner.balance import Balance, RoomBalance
    from qipan.planner.machine import Job
    from qipan.workload import Task
    from qipan.workload.site import Site

LAST = 20


def balance(
    tasks: Annotated[Optional[list[Path]], typer.Argument(help="task files; none: the last tasks of the store")] = None,  # noqa: UP045
    site: Annotated[Optional[Path], typer.Option("--site", help="The site file (default: qipan.yaml here).")] = None,  # noqa: UP045
    store: Annotated[Optional[Path], typer.Option("--store", help="The folder of the boards' stores.")] = None,  # noqa: UP045
    chip: Annotated[str, typer.Option(help="only pools of this chip class (part of its name)")] = "",
    devices: Annotated[int, typer.Option(help="devices of a pool; 0: all")] = 0,
    prices: Annotated[Optional[Path], typer.Option(help="JSON with prices of parts, over the built-in estimates")] = None,  # noqa: UP045
    json_: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
) -> None:  # fmt: skip
    """Which part limits: FLOPs, HBM, links, network, storage, failures; what more of each brings; the cheapest way to the deadline."""
    import msgspec

    from qipan.cli.app import site_of
    from qipan.planner.balance import Prices
    from qipan.workload.files import read_file

    here = site_of(site)
    known = Prices()
    if prices is not None:
        try:
            known = msgspec.json.decode(prices.read_bytes(), type=Prices)
        except (OSError, msgspec.MsgspecError) as error:
            raise InvalidInput(
                f'{prices}: {error}; give a JSON object such as {{"nic_per_gbyte_s": 60000000}}'
            ) from None
    given = [read_file(path)[0] for path in tasks or ()] or last_tasks(here, store)
    if len(given) == 1 and tasks:
        found = of_task(given[0], here, chip, devices, known)
        _tell([plain(one) for one in found], json_, lambda: show_task(given[0].name, found))
    else:
        rooms = of_site(given, here, chip, devices, known)
        _tell([plain(one) for one in rooms], json_, lambda: show_site(rooms))


def last_tasks(site: "Site", store: Path | None) -> "list[Task]":
    """The newest training tasks that the top board of the store was given."""
    import msgspec

    from qipan.client import default_store
    from qipan.store.folder import StoreFolder
    from qipan.workload import Task

    folder = store or default_store()
    if not folder.is_dir():
        raise NotFound(
            f"{folder}: no such store, and no task file was given; name task files, or --store DIR"
        )
    board = StoreFolder(folder).open(site.root.board, writer=False)
    found = []
    for task_id, _ in board.submissions()[-LAST:]:
        body = board.submission(task_id)
        if body is not None:
            found.append(msgspec.json.decode(body[1], type=Task))
    usable = [task for task in found if task.model is not None and task.work.tokens]
    if not usable:
        raise NotFound(f"{folder} holds no training task with a model; name task files instead")
    return usable


def job_of(task: "Task") -> "Job":
    from dataclasses import replace

    from qipan.planner.machine import BYTES_PER_TOKEN, Job, modality

    if task.model is None or not task.work.tokens:
        raise InvalidInput(
            f"{task.name}: balance needs `model` and `work.tokens`; a bare script says neither"
        )
    rows = max(1, task.work.global_batch_tokens // task.work.seq)
    model = replace(task.model, vocab=task.model.vocab or 32000)
    return Job(model, task.work.tokens, rows, task.work.seq, BYTES_PER_TOKEN[modality(task.data)])


def of_task(task: "Task", site: "Site", chip: str, devices: int, prices: Any) -> "list[Balance]":
    from qipan.planner.balance import balance as balanced

    job = job_of(task)
    return [
        balanced(job, room, task.limits.deadline_s, prices)
        for room in _rooms(site, chip, devices or task.devices.max)
    ]


def of_site(tasks: "list[Task]", site: "Site", chip: str, devices: int, prices: Any) -> "list[RoomBalance]":
    from qipan.planner.balance import balance_room

    jobs = [(task.name, job_of(task)) for task in tasks]
    return [balance_room(jobs, room, prices) for room in _rooms(site, chip, devices)]


def _rooms(site: "Site", chip: str, devices: int) -> list[Any]:
    from qipan.catalogue import site_catalogue
    from qipan.planner.cluster import known
    from qipan.planner.machine import room_of

    chips = site_catalogue().chips
    found = []
    for board in site.root.walk():
        for pool in board.pools:
            there = chips.get(pool.chip_class)
            if there is not None and known(there) and chip in pool.chip_class:
                storage = board.stores[0] if board.stores else None
                found.append(room_of(there, pool, storage, min(devices, pool.devices)))
    if not found:
        raise Infeasible(
            f"no pool of {site.root.board} has a chip{f' like {chip}' if chip else ''} whose figures the catalogue knows;"
            " see `qipan chips ls`"
        )
    return found


def plain(value: Any) -> Any:
    """As JSON: what never ends is null."""
    import msgspec

    def finite(found: Any) -> Any:
        if isinstance(found, float):
            return found if math.isfinite(found) else None
        if isinstance(found, dict):
            return {key: finite(one) for key, one in found.items()}
        return [finite(one) for one in found] if isinstance(found, list | tuple) else found

    return finite(msgspec.to_builtins(value))


def show_task(name: str, found: "list[Balance]") -> None:
    from qipan.cli.tables import table
    from qipan.quantities import format_devices, format_duration, format_money

    rows = [
        [
            one.place, one.chip_class, str(one.devices),
            format_duration(one.outcome.finish_s) if math.isfinite(one.outcome.finish_s) else "cannot run",
            format_money(one.outcome.cost_micro_cny) if one.outcome.cost_micro_cny else "-",
            one.limit, one.remedy, one.then,
            f"{format_devices(one.cheapest.devices)}, {format_duration(one.cheapest.finish_s)}, {format_money(one.cheapest.cost_micro_cny)}"
            if one.cheapest else "none in time",
        ]
        for one in found
    ]  # fmt: skip
    table(
        f"平衡 balance of {name}",
        [
            "place",
            "chip",
            "devices",
            "ends after",
            "cost",
            "limited by",
            "until there is",
            "then by",
            "cheapest in time",
        ],
        rows,
    )
    in_time = [(one.cheapest.cost_micro_cny, one.place, one) for one in found if one.cheapest]
    if in_time:
        _, _, best = min(in_time, key=lambda entry: entry[:2])
        assert best.cheapest is not None
        print(
            f"  cheapest in time: {best.cheapest.devices} x {best.chip_class} at {best.place},"
            f" {format_duration(best.cheapest.finish_s)}, {format_money(best.cheapest.cost_micro_cny)}"
        )
    for one in found:
        if not math.isfinite(one.outcome.finish_s):
            print(f"\n{one.place} {one.chip_class}: {one.why}")
            continue
        rows = [
            [
                part.name, part.have, format_duration(max(0.0, part.limits_s)), format_duration(max(0.0, part.saved_s)),
                format_money(part.price_micro_cny) if part.price_micro_cny else "-",
                f"{part.saved_s_per_cny * 1000:.3g} s" if part.price_micro_cny else "-",
            ]
            for part in one.parts
        ]  # fmt: skip
        print()
        table(
            f"{one.place} {one.chip_class} x {one.devices}: useful time {one.outcome.useful_share:.1%}, a checkpoint takes"
            f" {format_duration(one.outcome.save_s)}, a restart {format_duration(one.outcome.restart_s)}",
            ["part", "there is", "plenty saves", "a tenth more saves", "and costs", "saved per 1000 CNY"],
            rows,
        )


def show_site(found: "list[RoomBalance]") -> None:
    from qipan.cli.tables import table

    rows = []
    for room in found:
        shares = (
            ", ".join(f"{name} {share:.0%}" for name, share in room.share_by_limit.items()) or "nothing runs"
        )
        first = next(iter(room.share_by_limit), "")
        remedy = next((one.remedy for _, one in room.tasks if one.limit == first), "-")
        no = "; ".join(f"{name}: {why}" for name, why in room.impossible) or "-"
        rows.append([room.place, room.chip_class, str(len(room.tasks)), shares, remedy, no])
    table(
        "平衡 balance of the site (by device-seconds of its tasks)",
        ["place", "chip", "tasks", "limited by", "until there is", "cannot run"],
        rows,
    )


def _tell(value: Any, json_: bool, show: Any) -> None:
    if json_:
        print(json.dumps(value, ensure_ascii=False), flush=True)
    else:
        show()
