"""Stages: how long a trainer waits for its samples with the planned number of preparing workers, and with one fewer.

A task of two stages under real boards and processes, three times: once to measure how fast a worker prepares and the trainer takes
samples, then with the workers that the plan chooses from that, then with one fewer.  A sample of four kinds (text, picture, sound, film) costs a
fetch (a sleep, as from far storage) and its encoding; a step costs its decoding, a product on this CPU and what a device would take (a sleep).

python -m benchmarks.stages --json OUT
"""

import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.form import Figure, arguments, write
from qipan.host import Host
from qipan.planner.option import Flow
from qipan.planner.stages import told_of_stream
from qipan.workload.parse import parse_task
from qipan.workload.site import load_site
from qipan.workload.task import Shape, Task

SITE = """
site:
  lease: 60s
  board: {name: dc, pools: [{chip: sim/a, devices: 1, tariff: 1 CNY}, {chip: cpu/core, devices: 6, tariff: 0.1 CNY}]}
  tenants: [{name: me, balance: 1000 CNY}]
"""
TASK = """
kind: train
name: waits
stages:
  - {{name: prepare, run: exec {python} prepare.py, chips: cpu, feeds: learn, samples: {samples}, ahead: 4MB}}
  - {{name: learn, kind: train, run: exec {python} learn.py, chips: sim/a}}
"""
PREPARE = """
import io, struct, time, wave
import numpy as np
from qipan.trainer import feed

FETCH_S = {fetch_s}

def prepare(position):
    time.sleep(FETCH_S)
    rng = np.random.default_rng(position)
    picture = rng.integers(0, 256, (32, 32, 3), np.uint8)
    sound = io.BytesIO()
    with wave.open(sound, "wb") as file:
        file.setnchannels(1); file.setsampwidth(2); file.setframerate(8000)
        file.writeframes(struct.pack("<800h", *rng.integers(-9999, 9999, 800)))
    frame = b"FRAME\\n" + rng.integers(0, 256, 16 * 16 + 128, np.uint8).tobytes()
    return {{
        "txt": f"sample {{position}}".encode(), "ppm": b"P6 32 32 255\\n" + picture.tobytes(), "wav": sound.getvalue(),
        "y4m": b"YUV4MPEG2 W16 H16 F25:1 C420\\n" + frame * 4,
    }}

feed(prepare)
"""
LEARN = """
import time
import numpy as np
from qipan.trainer import fed

ROWS, DEVICE_S = {rows}, {device_s}
weights = np.random.default_rng(1).standard_normal((3072, 64), np.float32)
with fed("prepare") as stream:
    for step in range(stream.samples // ROWS):
        rows = list(stream.rows(range(step * ROWS, (step + 1) * ROWS)))
        assert [row["text"] for row in rows] == [f"sample {{position}}" for position in range(step * ROWS, (step + 1) * ROWS)]
        pictures = np.stack([row["image"] for row in rows]).reshape(ROWS, -1).astype(np.float32)
        (pictures @ weights).sum()
        time.sleep(DEVICE_S)
        stream.saved((step + 1) * ROWS)
"""


def main() -> None:
    given = arguments("stages", samples=1600, repeats=3)
    fetch_s, rows, device_s = 0.020, 16, 0.090
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "site.yaml").write_text(SITE)
        (folder / "prepare.py").write_text(PREPARE.format(fetch_s=fetch_s))
        (folder / "learn.py").write_text(LEARN.format(rows=rows, device_s=device_s))
        text = TASK.format(python=sys.executable, samples=given.samples)
        task = parse_task(text, "task.yaml", str(folder))
        host = Host(load_site(folder / "site.yaml"), folder / "store")
        try:
            found = [measured(host, task)]
            [flow] = host.intake.plan(task).flows
            for _ in range(given.repeats):
                found.append(measured(host, task))
                found.append(measured(host, with_workers(task, found[-1]["workers"] - 1)))
        finally:
            host.close()
    rows_of = {name: found[1 + at :: 2] for at, name in enumerate(("planned", "fewer"))}
    planned, fewer = (median(one["wait_share"] for one in rows_of[name]) for name in ("planned", "fewer"))
    told = median(one["expected_wait_share"] for one in rows_of["fewer"])
    figures = [
        Figure("workers_planned", flow.workers, "workers"),
        Figure("wait_share_planned", round(planned, 4), "of the trainer's time", "<= 0.02"),
        Figure("wait_share_one_fewer", round(fewer, 4), "of the trainer's time"),
        Figure("wait_share_one_fewer_expected", round(told, 4), "of the trainer's time"),
        Figure("wait_share_error", round(abs(fewer - told), 4), "of the trainer's time", "<= 0.05"),
    ]
    write(
        given.json,
        figures,
        found,
        samples=given.samples,
        fetch_s=fetch_s,
        rows_per_step=rows,
        device_s=device_s,
        repeats=given.repeats,
    )


def with_workers(task: Task, workers: int) -> Task:
    prepare, learn = task.stages
    return replace(task, stages=(replace(prepare, devices=Shape(workers, workers)), learn))


def measured(host: Host, task: Task) -> dict[str, Any]:
    """Runs it to its end.  `wait_share` as the reader told it last, `expected_wait_share` as the plan did."""
    task_id, plan = host.intake.submit(task)
    flow: Flow = plan.flows[0]
    ends_s = time.monotonic() + 300
    while host.queries.task(task_id).state not in ("done", "failed", "cancelled"):
        if time.monotonic() > ends_s:
            sys.exit(f"{task_id} did not end in 300 s: {host.queries.logs(task_id)['text'][-2000:]}")
        host.step()
        time.sleep(0.02)
    if host.queries.task(task_id).state != "done":
        sys.exit(
            f"{task_id} {host.queries.task(task_id).state}: {host.queries.logs(task_id)['text'][-2000:]}"
        )
    reader = told(host, f"{task_id}.learn")
    writer = told(host, f"{task_id}.prepare")
    return {
        "task": task_id, "workers": flow.workers, "workers_needed": flow.workers_needed, "expected_wait_share": flow.wait_share,
        "wait_share": reader["wait_share"], "taken_per_s": reader["samples_per_s"], "first_s": reader["first_s"],
        "made_per_s_per_worker": writer["samples_per_s_per_device"], "held_share": writer["held_share"],
    }  # fmt: skip


def told(host: Host, task_id: str) -> dict[str, Any]:
    found = [told_of_stream(fact.detail) for _, fact in host.queries.progress(task_id)]
    return [one for one in found if one is not None][-1]


if __name__ == "__main__":
    main()
