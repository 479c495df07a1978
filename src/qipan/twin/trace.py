"""Submissions from a recorded trace: a CSV or Parquet file with `job_id, vc, submit_s, duration_s, num_accelerators`."""

import csv
import random
from pathlib import Path
from typing import Any

from qipan.curves import Curve, Need, Point
from qipan.errors import InvalidInput, NotFound
from qipan.hardware import ChipClassId
from qipan.leases import Order, TaskId
from qipan.workload.site import Site

COLUMNS = ("job_id", "vc", "submit_s", "duration_s", "num_accelerators")


def trace_orders(
    path: Path, site: Site, speeds: dict[str, float], most: int, rng: random.Random
) -> list[Order]:
    """The first `most` rows.  A row's duration is taken as that on the fastest chip class, its devices as its one shape;
    the bid is the mean tariff.  Rows that no pool can hold are left out.  Raises NotFound, InvalidInput."""
    largest: dict[ChipClassId, int] = {}
    for pool in site.pools():
        largest[pool.chip_class] = max(largest.get(pool.chip_class, 0), pool.devices)
    tariffs = [pool.tariff_micro_cny_per_device_hour for pool in site.pools()]
    orders: list[Order] = []
    for row in _rows(path):
        if len(orders) == most:
            break
        devices, duration_s = round(float(row["num_accelerators"] or 0)), float(row["duration_s"] or 0.0)
        chips = sorted(chip for chip, count in largest.items() if count >= devices)
        if devices < 1 or duration_s <= 0 or not chips:
            continue
        best = max(speeds[chip] for chip in chips)
        points = tuple(
            Point(
                f"{chip}:{devices}", (Need(chip, devices),), rate := speeds[chip] / best, rate * 0.9,
                min(1.0, rate * 1.1), 60.0, 20.0,
            )
            for chip in chips
        )  # fmt: skip
        submitted_s = float(row["submit_s"])
        orders.append(
            Order(
                TaskId(f"job-{row['job_id']}"), str(row["vc"] or "all"), str(row["job_id"]),
                Curve(points, duration_s, "history"), round(sum(tariffs) / len(tariffs)), submitted_s, None,
                elastic=False, objective=rng.choice(("cost", "balanced", "time")),
            )
        )  # fmt: skip
    if not orders:
        raise InvalidInput("has no row that a pool of the site can hold", str(path))
    return orders


def _rows(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise NotFound(f"{path}: no such trace; name a CSV or Parquet file with {', '.join(COLUMNS)}")
    if path.suffix == ".parquet":
        import pyarrow.parquet as parquet

        found: list[dict[str, Any]] = parquet.read_table(path, columns=list(COLUMNS)).to_pylist()
        return found
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    missing = [name for name in COLUMNS if rows and name not in rows[0]]
    if missing:
        raise InvalidInput(f"has no column {', '.join(missing)}", str(path))
    return rows
