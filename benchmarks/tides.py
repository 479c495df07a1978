"""What lending gains: python -m benchmarks.tides --data DIR --json OUT

The tasks, centres and inference tides of `benchmarks.utilisation` on its board (three levels, six data centres), twice with the same arrivals and devices:

hold  each service holds the devices of its busiest hour, day and night
lend  each service is replicas by a forecast (the hourly demand of ServeGen's rates), known as it comes; what it does not ask for is lent to
      tasks that park within its notice (`--notice`, seconds)

`--peak`: what services need at most, as a share of the other devices where they are; `--sample N`: every N-th task.

Training: useful device-hours until the end of the span (work done, at the devices it takes at a task's most efficient point).  Served: the share of the
replica-hours that the forecasts ask for in which the replica had started.
"""

import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from benchmarks.form import Figure, arguments, data_folder, write
from benchmarks.utilisation import (
    CHIP_OF,
    FIRST_DAY,
    PEAK,
    REGIONS,
    SERVICE_BID,
    SERVICES,
    START_S,
    Setting,
    efficient_device_s,
    tree,
)
from qipan.engines.simulated import Behaviour
from qipan.forecast import MONDAY_S, Forecast
from qipan.hardware import ChipClassId
from qipan.leases import TaskId
from qipan.scheduler import Settings
from qipan.twin import arrivals, build_world, check_world
from qipan.twin.services import STOP_S, Service, replicas_of, service_row


def main() -> None:
    given = arguments(
        "tides", days=1.0, seed=0, elastic=0.7, policy="revenue", loads="0.8,1.2", notice=120.0, peak=PEAK, sample=1
    )  # fmt: skip
    data = data_folder(
        given.data,
        "Philly 2017, ServeGen's client rates (alibaba/ServeGen), Gavel's throughputs (stanford-futuredata/gavel)",
    )
    setting = Setting.read(data, FIRST_DAY, given.days, given.seed, given.elastic)
    setting = replace(setting, jobs=setting.jobs[:: given.sample])
    rows, figures = [], []
    for load in map(float, given.loads.split(",")):
        devices, peaks = sized(setting, load, given.peak)
        services = services_of(setting, peaks, given.notice)
        hold = run(setting, devices, services, given.policy, lends=False)
        lend = run(setting, devices, services, given.policy, lends=True)
        rows += [{"load": load, "devices": sum(devices.values()), **one} for one in (hold, lend)]
        print(*rows[-2:], sep="\n", file=sys.stderr)
        at = f"at_load_{load:g}"
        gained = lend["training_device_hours"] / hold["training_device_hours"] - 1
        figures += [
            Figure(f"training_gained_by_lending_{at}", round(gained, 4), "share"),
            Figure(f"served_when_lending_{at}", lend["served_share"], "share"),
            Figure(f"served_when_holding_{at}", hold["served_share"], "share"),
        ]
    write(
        given.json, figures, rows, days=given.days, seed=given.seed, elastic=given.elastic, policy=given.policy,
        notice=given.notice, peak=given.peak, sample=given.sample, jobs=len(setting.jobs),
    )  # fmt: skip


def sized(setting: Setting, load: float, peak: float) -> tuple[dict[str, int], dict[str, int]]:
    """Site -> devices, and of them those that its service needs at most: `peak` of the others."""
    devices, peaks = setting.devices(load), {}
    for site in SERVICES:
        base = devices[site] - setting.peak(site, devices[site])
        peaks[site] = max(1, round(base * peak))
        devices[site] = base + peaks[site]
    return devices, peaks


def services_of(setting: Setting, peaks: Mapping[str, int], notice_s: float) -> list[Service]:
    found = []
    for site, peak in peaks.items():
        steps = tuple(
            (hour * 3600.0, math.ceil(share * peak)) for hour, share in enumerate(setting.tide[site])
        )
        forecast = Forecast(len(steps) * 3600.0, steps, notice_s, START_S, MONDAY_S)
        region = next(name for name, own in REGIONS.items() if site in own)
        found.append(
            Service(f"serve-{site}", (ChipClassId(f"nvidia/{CHIP_OF[site]}"),), 1, forecast, (region,))
        )
    return found


def run(
    setting: Setting, devices: Mapping[str, int], services: Sequence[Service], policy: str, *, lends: bool
) -> dict[str, Any]:
    began_s, span_s = time.process_time(), setting.span_s
    world = build_world(
        tree(devices),
        seed=0,
        settings=Settings(lease_s=6 * 3600.0, policy=policy),
        behaviour=Behaviour(checkpoint_s=600.0),
    )
    serving = [
        order for service in services for order in replicas_of(service, SERVICE_BID, span_s, lends=lends)
    ]
    world.services = {order.task_id: order.hours for order in serving if order.hours is not None}
    world.after_step.append(check_world)
    world.happenings = arrivals([*serving, *(one.order for one in setting.jobs)])
    world.run(until_s=span_s, most_steps=10**9)
    done: dict[TaskId, float] = {}
    for board in world.tree.engines:
        for task_id, work_s in world.simulated(board).done().items():
            done[task_id] = max(work_s, done.get(task_id, 0.0))
    world.run(until_s=span_s + STOP_S + 1, most_steps=10**9)  # the services have ended
    lives = [
        (board, *life) for board in sorted(world.tree.engines) for life in world.simulated(board).lifetimes
    ]
    rows = [service_row(service, lives, span_s) for service in services]
    useful_s = sum(
        done.get(one.order.task_id, 0.0) / one.order.curve.work_s * efficient_device_s(one.order)
        for one in setting.jobs
    )
    asked_h = sum(row["replica_hours_asked"] for row in rows)
    return {
        "services": "lend" if lends else "hold",
        "training_device_hours": round(useful_s / 3600, 1),
        "served_share": round(sum(row["replica_hours_served"] for row in rows) / asked_h, 4),
        "service_device_hours_held": round(sum(row["device_hours_held"] for row in rows), 1),
        "service_device_hours_asked": round(asked_h, 1),
        "ended_attempts_of_training": sum(1 for life in lives if not str(life[1]).startswith("serve-")),
        "cpu_s": round(time.process_time() - began_s, 1),
    }


if __name__ == "__main__":
    main()
