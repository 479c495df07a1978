"""The built-in trainer's step on this machine, predicted and measured: `python -m benchmarks.planner_local --json OUT`.

One worker, then two, a thread each.  The pool's own calibration (`qipan.trainer.probe`: 20 steps of three small models) is
taken in the same run, its steps among those that it is to predict, since this machine's speed is not its own; the models, lengths and
batches predicted are none of the calibration's.  A repeat is the least of its windows, which other programs disturbed least."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.form import Figure, arguments, write
from qipan.planner.steps import Layout, parts_s
from qipan.workload.model import Model

WINDOWS, REPEATS = 4, 3
NARROW = Model("narrow", 6, 128, 4, 4, 32, 384, 1024)
BROAD = Model("broad", 3, 256, 8, 8, 32, 768, 1024)
GROUPED = Model("grouped", 4, 192, 6, 2, 32, 640, 2048)
BIG = Model("big", 2, 384, 6, 6, 64, 1024, 512)
Case = tuple[Model, Layout, int, int]  # model, layout, rows, seq
ONE: list[Case] = [
    (NARROW, Layout(1, 1, 0), 4, 128), (NARROW, Layout(1, 1, 0), 2, 256), (BROAD, Layout(1, 1, 0), 8, 96),
    (BROAD, Layout(1, 1, 0, micro_batches=4), 8, 64), (GROUPED, Layout(1, 1, 0), 6, 128), (BIG, Layout(1, 1, 0), 4, 192),
    (GROUPED, Layout(1, 1, 0, recompute="full"), 6, 128), (BIG, Layout(1, 1, 0, recompute="selective"), 6, 96),
]  # fmt: skip
TWO: list[Case] = [
    (NARROW, Layout(1, 2, 0), 8, 128), (BROAD, Layout(1, 2, 0), 8, 96), (GROUPED, Layout(1, 2, 0), 12, 64),
    (BIG, Layout(1, 2, 0, recompute="full"), 8, 96), (NARROW, Layout(1, 2, 3), 8, 128), (BIG, Layout(1, 2, 3), 8, 128),
    (NARROW, Layout(2, 1, 0), 6, 128), (GROUPED, Layout(2, 1, 0), 4, 256), (BIG, Layout(2, 1, 0), 8, 96),
    (BROAD, Layout(1, 1, 0, pp=2, micro_batches=4), 8, 128), (GROUPED, Layout(1, 1, 0, pp=2, micro_batches=2), 8, 128),
]  # fmt: skip


def main() -> None:
    if "--worker" in sys.argv:
        worker(Path(sys.argv[-1]))
        return
    given = arguments("planner_local")
    one, two = measured(1), measured(2)
    rows = [*one["rows"], *two["rows"]]
    errors, spreads = [abs(row["error"]) for row in rows], [row["spread"] for row in rows]
    figures = [
        Figure("layouts", len(rows), "layouts", ">= 12"),
        Figure("median_error", statistics.median(errors), "share", "<= 0.2"),
        Figure("worst_error", max(errors), "share", "<= 0.4"),
        Figure("spread_median", statistics.median(spreads), "(most - least) / median of 3 repeats"),
        Figure("spread_worst", max(spreads), "(most - least) / median of 3 repeats"),
    ]
    write(
        given.json, figures, rows, load_average=os.getloadavg()[0], calibration_steps=20,
        calibration=[*one["calibration"], *two["calibration"]],
    )  # fmt: skip


def measured(workers: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={workers}"]
        subprocess.run(
            [sys.executable, "-W", "ignore", *launch, "-m", "benchmarks.planner_local", "--worker", str(out)],
            check=True, timeout=900, env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        )  # fmt: skip
        return dict(json.loads(out.read_text()))


def worker(out: Path) -> None:
    import torch
    import torch.distributed as dist

    from qipan.trainer.probe import STEPS, Calibration, Stepper

    torch.set_num_threads(1)
    ranks = int(os.environ["WORLD_SIZE"])
    if ranks > 1:
        dist.init_process_group("gloo")
    calibration = Calibration(ranks)
    steppers = [Stepper(case) for case in (ONE if ranks == 1 else TWO)]
    calibration.warm()
    for stepper in steppers:
        stepper.step()
        stepper.times.clear()
    rounds = WINDOWS * REPEATS
    for number in range(rounds):
        for _ in range(STEPS * number // rounds, STEPS * (number + 1) // rounds):
            calibration.turn()
        for stepper in steppers:
            stepper.step()
    probe = calibration.probe(0.0, 0.0)
    rows = []
    for stepper in steppers:
        model, layout, count, seq = stepper.case
        parts = parts_s(layout, model, probe, count, seq)
        predicted = sum(parts.values())
        repeats = [min(stepper.times[i * WINDOWS : (i + 1) * WINDOWS]) for i in range(REPEATS)]
        middle = statistics.median(repeats)
        rows.append({
            "workers": ranks, "threads": 1, "model": model.name, "rows": count, "seq": seq,
            "layout": f"tp{layout.tp} dp{layout.dp} pp{layout.pp} zero{layout.zero}", "micro_batches": layout.micro_batches,
            "recompute": layout.recompute, "predicted_s": predicted, "measured_s": middle, "error": predicted / middle - 1,
            "repeats_s": repeats, "spread": (max(repeats) - min(repeats)) / middle, "parts_s": parts, "probe": asdict(probe),
        })  # fmt: skip
    if not dist.is_initialized() or dist.get_rank() == 0:
        steps = [
            {"workers": ranks, "case": [asdict(part) if index < 2 else part for index, part in enumerate(one.case)], "times_s": one.times}
            for one in calibration.steppers
        ]  # fmt: skip
        out.write_text(
            json.dumps({"rows": rows, "calibration": steps, "collective": probe.collective_bytes_per_s})
        )
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
