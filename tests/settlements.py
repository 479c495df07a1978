"""Builders: random periods of deliveries and sales."""

import random
from dataclasses import replace

from qipan.settlement.contracts import Terms
from qipan.settlement.meters import Counters
from qipan.settlement.service import Evidence, Service
from qipan.settlement.settle import Delivery, Period, Ruling, Sale
from qipan.settlement.tariffs import Price, TariffSheet, sign_sheet

HOUR_US = 3_600_000_000
SITES = ("dc1", "dc2")


def sheet(**changes: object) -> TariffSheet:
    prices = tuple(Price("device-hour", site, 10**6 * (i + 1), "sim/fast") for i, site in enumerate(SITES))
    prices += tuple(Price("transfer", site, 0, free=True) for site in SITES)
    made = TariffSheet("2026-11", "owner", 0.0, 0.0, 1e7, prices)
    return sign_sheet(replace(made, **changes), signed)


def signed(body: bytes) -> str:
    import hashlib

    return hashlib.blake2b(body, key=b"test", digest_size=16).hexdigest()


def verified(body: bytes, signature: str) -> bool:
    return signed(body) == signature


def evidence(rng: random.Random, honest: Evidence | None = None) -> Evidence:
    """One party's; from `honest` another's that differs now and then."""
    if honest is not None and rng.random() < 0.7:
        return honest
    return Evidence(
        rng.choice([0.0, 100.0, 900.0]), rng.choice([3600.0, 3590.0, 3000.0]), 3600.0,
        rng.choice([1_000_000, 950_000, 700_000]), rng.choice([None, None, 300.0, 30.0]),
    )  # fmt: skip


def delivery(rng: random.Random, number: int) -> Delivery:
    measured = rng.randrange(0, 8 * HOUR_US)
    saw = evidence(rng)
    return Delivery(
        f"lease-{number:05d}", f"task-{number}", rng.choice(["a", "b", "c"]), rng.choice(["p", "q"]), "east",
        rng.choice(SITES), "sim/fast", 0.0, Counters(measured, moved_bytes=rng.randrange(10**9)),
        rng.choice([measured, measured + HOUR_US, max(0, measured - 1000)]), saw,
        evidence(rng, saw) if rng.random() < 0.9 else None, "elsewhere" if rng.random() < 0.1 else "",
    )  # fmt: skip


def sale(rng: random.Random, number: int) -> Sale:
    fills = tuple((tenant, rng.randint(1, 5)) for tenant in rng.sample(["a", "b", "c"], rng.randint(1, 3)))
    sold = sum(devices for _, devices in fills)
    return Sale(
        f"slot-{number:04d}", rng.choice(["p", "q"]), "east", rng.randrange(10**6, 3 * 10**6), fills,
        sold if rng.random() < 0.7 else rng.randint(0, sold), rng.randrange(10**6, 5 * 10**6),
    )  # fmt: skip


def period(seed: int, deliveries: int = 60, sales: int = 20) -> Period:
    rng = random.Random(seed)
    return Period(
        f"day-{seed}", tuple(delivery(rng, i) for i in range(deliveries)), tuple(sale(rng, i) for i in range(sales)),
        sheet(), Terms(20_000, (("b", 100_000),)), Service(),
    )  # fmt: skip


def later(first: Period, seed: int) -> Period:
    """The same period after its dispute window: late evidence came in, disputes were ruled on."""
    rng = random.Random(seed)
    deliveries = tuple(
        replace(one, claimed_device_us=one.measured.device_us) if rng.random() < 0.2 else one
        for one in first.deliveries
        if rng.random() < 0.97
    )
    rulings = tuple(
        Ruling(one.lease, rng.choice([0, 500_000, 333_333, 1_000_000])) for one in deliveries if rng.random() < 0.8
    )  # fmt: skip
    return replace(first, deliveries=deliveries, rulings=rulings)
