"""Builders with good defaults: small trees, simple curves."""

import random

from qipan.curves import Curve, Need, Point
from qipan.hardware import BoardId, BoardSpec, ChipClassId, Pool, PoolId
from qipan.leases import Order, TaskId

FAST, SLOW = ChipClassId("sim/fast"), ChipClassId("sim/slow")
TARIFF = 1_000_000  # 1 CNY per device-hour


def leaf(
    name: str, devices: int = 4, chip: ChipClassId = FAST, region: str = "east", tariff: int = TARIFF
) -> BoardSpec:
    pool = Pool(PoolId(f"{name}/{chip}"), BoardId(name), chip, devices, devices, tariff)
    return BoardSpec(BoardId(name), pools=(pool,), region=region, engine="simulated")


def nation(*, devices: int = 4) -> BoardSpec:
    """Two regions over three data centres of unlike chips."""
    east = BoardSpec(BoardId("east"), children=(leaf("dc1", devices),))
    west = BoardSpec(
        BoardId("west"), children=(leaf("dc2", devices, SLOW, "west"), leaf("dc3", devices, FAST, "west"))
    )
    return BoardSpec(BoardId("cn"), children=(east, west))


def curve(
    work_s: float = 100.0, counts: tuple[int, ...] = (1, 2, 4), chips: tuple[ChipClassId, ...] = (FAST,)
) -> Curve:
    """Rates grow with the square-root-ish of the devices; slow chips run at half."""
    best = max(counts) ** 0.8
    points = tuple(
        Point(
            f"{chip}:{count}", (Need(chip, count),), rate := count**0.8 / best * (0.5 if chip == SLOW else 1.0),
            rate * 0.9, rate * 1.1, start_s=2.0, stop_s=1.0,
        )
        for chip in chips
        for count in counts
    )  # fmt: skip
    return Curve(points, work_s)


def order(
    name: str,
    *,
    bid: int = 2 * TARIFF,
    work_s: float = 100.0,
    counts: tuple[int, ...] = (1, 2, 4),
    chips: tuple[ChipClassId, ...] = (FAST,),
    elastic: bool = True,
    submitted_s: float = 0.0,
    deadline_s: float | None = None,
    **more: object,
) -> Order:
    return Order(
        TaskId(name),
        "alice",
        name,
        curve(work_s, counts, chips),
        bid,
        submitted_s,
        deadline_s,
        elastic,
        **more,  # type: ignore[arg-type]
    )


def random_orders(rng: random.Random, count: int, over_s: float) -> list[Order]:
    orders = []
    for i in range(count):
        work_s = rng.choice([20.0, 60.0, 200.0])
        submitted_s = rng.uniform(0, over_s)
        orders.append(
            order(
                f"task-{i:03d}",
                bid=rng.choice([1, 2, 4, 8]) * TARIFF,
                work_s=work_s,
                counts=rng.choice([(1,), (2,), (1, 2), (1, 2, 4)]),
                chips=rng.choice([(FAST,), (FAST, SLOW), (SLOW,)]),
                elastic=rng.random() < 0.6,
                submitted_s=submitted_s,
                deadline_s=submitted_s + work_s * rng.uniform(2, 8) if rng.random() < 0.4 else None,
                on_partition=rng.choice(["wait", "restart"]),
            )
        )
    return orders
