"""What moving small tasks out of a node for a gang is worth: python -m benchmarks.blocks --json OUT

One leaf board of 6 nodes of 8 devices in the twin, topology counted; 150 tasks of 1, 2, 4 and 8 devices (50, 15, 20 and 15 in a hundred) and 20 minutes to 10
hours of work, arriving evenly at `--load` times the capacity; starts take 60 s, stops 15 s.  What lies over two nodes though one could hold it runs at 0.75 of its
rate, as the scheduler assumes.  Each world with defragmentation against without.
"""

from statistics import fmean

from benchmarks.form import Figure, arguments, write
from qipan.clock import named_random
from qipan.curves import Curve, Need, Point
from qipan.engines.simulated import Behaviour
from qipan.hardware import BoardId, BoardSpec, ChipClassId, Pool, PoolId
from qipan.leases import Order, TaskId
from qipan.scheduler import Settings
from qipan.twin import arrivals, build_world, check_end

CHIP, DC = ChipClassId("sim/x"), BoardId("dc")
NODES, PER_NODE, TASKS = 6, 8, 150
SIZES = [1] * 50 + [2] * 15 + [4] * 20 + [8] * 15
WORK_S = (1200.0, 3600.0, 14_400.0, 36_000.0)


def main() -> None:
    given = arguments("blocks", worlds=4, load=0.6)
    rows = []
    for seed in range(given.worlds):
        moved, stayed = (run(seed, given.load, on) for on in (True, False))
        ratios = {
            f"{name}_ratio": moved[name] / stayed[name] for name in ("mean_jct_s", "gangs_jct_s", "device_s")
        }
        rows.append({"seed": seed, "moved": moved["moved"], "gangs": moved["gangs"], **ratios})
    names = {
        "mean_jct_s_ratio": "mean_jct_ratio",
        "gangs_jct_s_ratio": "gangs_jct_ratio",
        "device_s_ratio": "device_hours_ratio",
    }
    figures = [Figure(told, fmean(row[name] for row in rows), "ratio") for name, told in names.items()]
    figures.append(Figure("moved", sum(row["moved"] for row in rows), "tasks"))
    write(given.json, figures, rows, load=given.load)


def run(seed: int, load: float, defragment: bool) -> dict[str, float]:
    rng = named_random(seed, "blocks")
    pool = Pool(PoolId("dc/x"), DC, CHIP, NODES * PER_NODE, PER_NODE, 1_000_000)
    world = build_world(
        BoardSpec(DC, pools=(pool,), region="r", engine="simulated"), seed=seed, topology=True,
        settings=Settings(defragment=defragment), behaviour=Behaviour(straddled=0.75, speed_spread=0.0, start_spread=0.0),
    )  # fmt: skip
    shapes = [(rng.choice(SIZES), rng.choice(WORK_S)) for _ in range(TASKS)]
    span_s = sum(devices * work_s for devices, work_s in shapes) / (NODES * PER_NODE * load)
    orders = []
    for number, (devices, work_s) in enumerate(shapes):
        point = Point("p", (Need(CHIP, devices),), 1.0, 1.0, 1.0, start_s=60.0, stop_s=15.0)
        name = f"t{number:03}"
        orders.append(
            Order(
                TaskId(name),
                "me",
                name,
                Curve((point,), work_s),
                2_000_000,
                rng.uniform(0, span_s),
                elastic=True,
            )
        )
    world.happenings = arrivals(orders)
    world.run(until_s=4 * span_s)
    check_end(world, {order.task_id for order in orders})
    lives = world.simulated(DC).lifetimes
    ended: dict[TaskId, float] = {}
    for life in lives:
        ended[life[0]] = max(ended.get(life[0], 0.0), life[5])
    took = {order.task_id: ended[order.task_id] - order.submitted_s for order in orders}
    gangs = [order.task_id for order, (devices, _) in zip(orders, shapes, strict=True) if devices > 1]
    verdicts = [
        verdict for order in orders for _, verdict, _ in world.tree.root.store.reasons_of(order.task_id)
    ]
    return {
        "mean_jct_s": fmean(took.values()), "gangs_jct_s": fmean(took[name] for name in gangs), "gangs": len(gangs),
        "device_s": sum(devices * (end_s - start_s) for _, _, _, devices, start_s, end_s in lives),
        "moved": verdicts.count("moved aside"),
    }  # fmt: skip


if __name__ == "__main__":
    main()
