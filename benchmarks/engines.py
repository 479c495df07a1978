"""What Qipan adds to a job of another tool's queue: python -m benchmarks.engines --jobs 200 --json OUT

The same short jobs (`true`) through one engine and directly, in one run, on a real cluster of this machine.  CPU is that of the
queue's daemons, of everything they started, and of the caller (its start apart).  Added latency: from asking to running.
Needs Slurm's daemons and Ray; root for the device files and the network namespace.
"""

import contextlib
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from benchmarks.form import Figure, arguments, write

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "engines"))

from driven import Bench
from ray_cluster import RayCluster
from slurm_cluster import SlurmCluster

from qipan.engines.launcher import supervisor
from qipan.engines.shim import Spec
from qipan.events import TaskExited, TaskStarted

SIDE_BY_SIDE = 4
IDLE_S = 10.0
GROUPS = Path("/sys/fs/cgroup/cpuacct")


def main() -> None:
    given = arguments("engines", jobs=200, rays=200, only="")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        root.chmod(0o755)
        for name, cluster, direct, jobs in (
            ("slurm", SlurmCluster(root / "slurm", nodes=1, port=17600), sbatch, given.jobs),
            ("ray", RayCluster(root / "ray", nodes=1, net=47), ray_submit, given.rays),
        ):
            if given.only not in ("", name):
                continue
            cluster.folder.mkdir()
            try:
                cluster.up()
                rows.append(
                    {"engine": name, "jobs": jobs, **compare(cluster, root / f"{name}-board", direct, jobs)}
                )
            finally:
                cluster.down()
    figures = []
    for row in rows:
        figures += [
            Figure(f"{row['engine']}_overhead_cpu_ms_per_job", row["overhead_cpu_ms"], "ms", "<= 50"),
            Figure(f"{row['engine']}_added_latency_s", row["added_latency_s"], "s", "<= 1"),
        ]
    write(given.json, figures, rows)


def compare(cluster: Any, folder: Path, direct: Callable[[Any, int], float], jobs: int) -> dict[str, float]:
    """Per job: what each part of the two ways used, and their difference; `shim_floor` is a supervisor of nothing, alone."""
    cluster.until_idle()
    before, direct_latency_s = measured(cluster, lambda: direct(cluster, jobs))
    cluster.until_idle()
    bench = Bench(cluster, folder)
    through(bench, SIDE_BY_SIDE)  # what a session starts once: Ray's keeper
    ours, ours_latency_s = measured(cluster, lambda: through(bench, jobs))
    parts = {f"direct_{part}_cpu_ms": cpu_s / jobs * 1e3 for part, cpu_s in before.items()}
    parts |= {f"through_{part}_cpu_ms": cpu_s / jobs * 1e3 for part, cpu_s in ours.items()}
    return {
        **parts,
        "direct_cpu_ms": sum(before.values()) / jobs * 1e3,
        "overhead_cpu_ms": (sum(ours.values()) - sum(before.values())) / jobs * 1e3,
        "shim_floor_cpu_ms": shim_floor_ms(folder),
        "direct_latency_s": direct_latency_s,
        "added_latency_s": ours_latency_s - direct_latency_s,
    }


def measured(cluster: Any, run: Callable[[], float]) -> tuple[dict[str, float], float]:
    """(CPU seconds of each part beyond what it uses when idle, what `run` returned)."""
    meter = Meter(cluster)
    idle_before, began_s = meter.cpu_s(), time.monotonic()
    time.sleep(IDLE_S)
    waited_s = time.monotonic() - began_s
    idle = {part: (now - idle_before[part]) / waited_s for part, now in meter.cpu_s().items()}
    before, began_s = meter.cpu_s(), time.monotonic()
    latency_s = run()
    lasted_s = time.monotonic() - began_s
    return {
        part: now - before[part] - idle[part] * lasted_s for part, now in meter.cpu_s().items()
    }, latency_s


class Meter:
    """CPU of the cluster's processes and of all that they start from now on, by a cgroup; of this process; and of the
    commands that it ran."""

    def __init__(self, cluster: Any) -> None:
        self._group = GROUPS / f"qipan-bench-{cluster.engine}"
        self._group.mkdir(exist_ok=True)
        for process in cluster.processes.values():
            for one in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
                with contextlib.suppress(OSError, psutil.Error):
                    (self._group / "cgroup.procs").write_text(str(one.pid))

    def cpu_s(self) -> dict[str, float]:
        return {
            "cluster": int((self._group / "cpuacct.usage").read_text()) / 1e9,
            "caller": sum(os.times()[:2]),
            "commands": sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2]),
        }


def shim_floor_ms(folder: Path, runs: int = 10) -> float:
    """A supervisor that starts, is granted, runs `true` and leaves."""
    hold, attempt = folder / "floor", folder / "floor-attempt"
    for path in (hold, attempt):
        path.mkdir(parents=True, exist_ok=True)
    Spec(["true"], {}, task=str(attempt)).write(str(attempt / "spec"))
    (hold / "go").write_text(str(attempt))
    before = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    for _ in range(runs):
        subprocess.run(supervisor(sys.executable, "--hold", str(hold)), check=True)
    return (sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2]) - before) / runs * 1e3


def through(bench: Bench, jobs: int) -> float:
    """All jobs through the engine, SIDE_BY_SIDE at a time; the median seconds from asking to running."""
    first = bench.generation
    waits, begun, left, running = [], {}, list(range(first, first + jobs)), set[str]()
    while left or running:
        while left and len(running) < SIDE_BY_SIDE:
            task = f"job-{left.pop()}"
            begun[task] = time.monotonic()
            bench.reserve("true", 1, task)
            running.add(task)
        for seq, fact in bench.engine.observe(bench.after):
            bench.after = seq
            if fact.kind == "lease_granted":
                bench.go(fact.task_id)
            elif isinstance(fact, TaskStarted):
                waits.append(time.monotonic() - begun[fact.task_id])
            elif isinstance(fact, TaskExited):
                running.discard(fact.task_id)
            elif fact.kind == "lease_refused":
                running.discard(fact.task_id)
                left.append(int(fact.task_id.split("-")[1]))
        time.sleep(0.05)
    return sorted(waits)[len(waits) // 2]


def sbatch(cluster: SlurmCluster, jobs: int) -> float:
    waits, left, running = [], jobs, dict[str, float]()
    marks = cluster.folder / "marks"
    marks.mkdir(exist_ok=True)
    while left or running:
        while left and len(running) < SIDE_BY_SIDE:
            left -= 1
            mark = marks / str(left)
            began_s = time.monotonic()
            command = [
                "sbatch",
                "--parsable",
                "--gres=gpu:sim:1",
                "-n1",
                "-o/dev/null",
                f"--wrap=touch {mark}",
            ]
            subprocess.run(command, env=cluster.environment(), check=True, capture_output=True)
            running[str(mark)] = began_s
        for mark, began_s in list(running.items()):
            if Path(mark).exists():
                waits.append(time.monotonic() - began_s)
                del running[mark]
        time.sleep(0.05)
    return sorted(waits)[len(waits) // 2]


def ray_submit(cluster: RayCluster, jobs: int) -> float:
    import httpx

    waits, left, running = [], jobs, dict[str, float]()
    marks = cluster.folder / "marks"
    marks.mkdir(exist_ok=True)
    with httpx.Client(base_url=cluster.address, timeout=30) as client:
        while left or running:
            while left and len(running) < SIDE_BY_SIDE:
                left -= 1
                mark = marks / str(left)
                job = {
                    "entrypoint": f"touch {mark}",
                    "entrypoint_num_cpus": 0,
                    "entrypoint_resources": {"sim": 1},
                }
                running[str(mark)] = time.monotonic()
                client.post("/api/jobs/", json=job).raise_for_status()
            for mark, began_s in list(running.items()):
                if Path(mark).exists():
                    waits.append(time.monotonic() - began_s)
                    del running[mark]
            time.sleep(0.05)
    return sorted(waits)[len(waits) // 2]


if __name__ == "__main__":
    main()
