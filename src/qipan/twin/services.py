"""The services of a scenario: the orders of their replicas, and what came of them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from qipan.curves import Curve, Need, Point
from qipan.forecast import MONDAY_S, Forecast
from qipan.hardware import ChipClassId
from qipan.leases import Order, TaskId
from qipan.planning import ENDLESS_S
from qipan.workload.parse import read_forecast
from qipan.workload.reader import Value
from qipan.workload.site import Site

STOP_S = 5.0  # a replica writes no checkpoint


@dataclass(frozen=True, slots=True)
class Service:
    """`chips`: classes that a replica may run on, `devices` of one; the time of the scenario begins on a Monday."""

    name: str
    chips: tuple[ChipClassId, ...]
    devices: int
    forecast: Forecast
    regions: tuple[str, ...] = ()


def read_services(value: Value, site: Site) -> tuple[Service, ...]:
    """Raises InvalidInput."""
    there = {pool.chip_class for pool in site.pools()}
    found = []
    for entry in value.items():
        fields = entry.fields(("name", "chips", "devices", "forecast", "regions"))
        for key in ("name", "chips", "forecast"):
            if key not in fields:
                raise entry.error(
                    f"`{key}` is missing; write {{name: chat, chips: [CLASS], forecast: {{replicas: {{0h: 1, 8h: 4}}}}}}"
                )
        chips = tuple(ChipClassId(item.text()) for item in fields["chips"].items())
        for chip in chips:
            if chip not in there:
                raise fields["chips"].error(f"no pool has {chip}; there are {', '.join(sorted(there))}")
        forecast = replace(read_forecast(fields["forecast"]), utc_offset_s=MONDAY_S)
        found.append(
            Service(
                fields["name"].text(), chips, fields["devices"].whole(1, 1000) if "devices" in fields else 1, forecast,
                tuple(item.text() for item in fields["regions"].items()) if "regions" in fields else (),
            )
        )  # fmt: skip
    return tuple(found)


def dearest_tariff(service: Service, site: Site) -> int:
    return max(
        pool.tariff_micro_cny_per_device_hour for pool in site.pools() if pool.chip_class in service.chips
    )


def replicas_of(service: Service, bid_micro_cny: int, span_s: float, *, lends: bool) -> list[Order]:
    """The orders of a span, for so much a device-hour.  A service that does not lend holds its peak all the time."""
    forecast = service.forecast
    if not lends:
        forecast = replace(forecast, steps=((0.0, forecast.most()),))
    points = tuple(
        Point(
            f"{chip}:{service.devices}",
            (Need(chip, service.devices),),
            1.0,
            1.0,
            1.0,
            forecast.start_s,
            STOP_S,
        )
        for chip in sorted(service.chips)
    )
    return [
        Order(
            TaskId(f"{service.name}.r{number}"), f"tenant-{service.name}", service.name, Curve(points, ENDLESS_S), bid_micro_cny, 0.0,
            regions=service.regions, preemptible=False, kind="serve", hours=forecast.hours_of(number, span_s),
        )
        for number in range(1, service.forecast.most() + 1)
    ]  # fmt: skip


def service_row(service: Service, lives: Sequence[tuple[Any, ...]], span_s: float) -> dict[str, Any]:
    """`lives`: (board, task, attempt, chip class, devices, begin, end) of all attempts.  What is asked for counts from the end of the first
    lead, before which nothing can serve; an attempt serves once its planned start has passed."""
    asked_s = served_s = held_s = 0.0
    forecast = service.forecast
    for number in range(1, forecast.most() + 1):
        own = [life for life in lives if life[1] == f"{service.name}.r{number}"]
        held_s += sum(life[4] * max(0.0, min(life[6], span_s) - life[5]) for life in own)
        for from_s, until_s in _asked(forecast, number, span_s):
            asked_s += until_s - from_s
            served_s += sum(
                max(0.0, min(until_s, life[6]) - max(from_s, life[5] + forecast.start_s)) for life in own
            )
    peak_s = forecast.most() * service.devices * span_s
    return {
        "service": service.name,
        "replica_hours_asked": round(asked_s / 3600, 2),
        "replica_hours_served": round(served_s / 3600, 2),
        "served_share": round(served_s / max(asked_s, 1e-9), 4),
        "device_hours_held": round(held_s / 3600, 2),
        "device_hours_lent": round((peak_s - held_s) / 3600, 2),
    }


def _asked(forecast: Forecast, replica: int, span_s: float) -> Iterator[tuple[float, float]]:
    """Spans of the scenario in which the replica is asked for."""
    begins_s = 0.0
    while begins_s < span_s:
        for from_s, end_s, replicas in forecast.spans():
            first_s = max(begins_s + from_s, forecast.start_s + forecast.notice_s)
            last_s = min(begins_s + end_s, span_s)
            if replicas >= replica and first_s < last_s:
                yield first_s, last_s
        begins_s += forecast.every_s
