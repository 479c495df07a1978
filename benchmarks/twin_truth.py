"""Is the twin true?  python -m benchmarks.twin_truth --minutes 3 --json OUT

One scenario twice: first in the twin, from the site file, the task files and their plans; then live, under `qipan up` with real
processes on this machine.  What the twin knows of real engines is how long starts and stops take and how
fast work goes on, fitted from an earlier, short live run.  Submissions and kills come at the same seconds.  The tasks are scripts with a stated pace (`paced.py`),
so that what is compared is Qipan: who waits for whom, who shrinks and grows, starts, stops, checkpoints, work done again.
`--trained 1` adds models that really train on throttled cores, at the speed that the probe measured.

Each round of about 45 s has, on 4 + 2 devices at two data centres: an elastic task that a dearer one shrinks and that grows back, a task
whose worker is killed with SIGKILL, one that waits behind it, and small ones that may run at either place; lengths and moments by seed.
"""

import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.form import Figure, arguments, write
from qipan.client import Client, Task
from qipan.controller import fact_of
from qipan.engines.simulated import Behaviour
from qipan.events import TaskExited, TaskSubmitted
from qipan.hardware import Probe
from qipan.leases import TaskId
from qipan.planning import order_of, plan_on
from qipan.scheduler import Settings
from qipan.store import Store, StoreFolder
from qipan.twin import Happening, World, arrivals, build_world, check_end, check_world
from qipan.twin.fitted import fitted
from qipan.workload.files import read_text
from qipan.workload.site import Site, load_site

ROUND_S = 45.0
SAVE_S = 2.0
SITE = """\
site:
  lease: 30s
  board:
    name: cn
    children:
      - {name: east, children: [{name: dc1, region: cn-east, pools: [{chip: sim/a, devices: 4, tariff: 1 CNY}]}]}
      - {name: west, children: [{name: dc2, region: cn-west, pools: [{chip: sim/b, devices: 2, tariff: 1 CNY}]}]}
  tenants: [{name: poets, balance: 1000 CNY}]
"""
TRAINING_POOL = "{chip: sim/c, devices: 1, tariff: 1 CNY, core_share: 0.25}"
PACED = """\
kind: train
name: {name}
run: exec {python} -S {script}
devices: {{min: {least}, max: {most}}}
elastic: {elastic}
limits: {{time: {seconds}s, max_cost: {bid:.6f} CNY, chips: [{chips}]}}
env: {{PACED_S: "{seconds}", PACED_MOST: "{most}", PACED_SAVE_S: "2.0"}}
"""
TRAINED = """\
kind: train
name: {name}
model: {{layers: 2, hidden: 32, heads: 4, ffn_hidden: 64, tied_embeddings: true}}
data: fortunes:song100
work: {{tokens: 400k, global_batch: 1000, seq: 50}}
limits: {{max_cost: 1 CNY, chips: [sim/c]}}
checkpoint: {{every: 20s}}
"""


@dataclass(frozen=True, slots=True)
class Entry:
    """`text`: a task file.  `killed_s`: when its worker is killed, None: never.  Seconds from the beginning."""

    at_s: float
    name: str
    text: str
    killed_s: float | None = None


@dataclass(frozen=True, slots=True)
class Run:
    """Task name -> (submitted, ended), seconds from the first submission; task name -> verdicts."""

    times: dict[str, tuple[float, float]]
    verdicts: dict[str, list[str]]

    @property
    def makespan_s(self) -> float:
        return max(ended for _, ended in self.times.values())

    @property
    def mean_jct_s(self) -> float:
        return statistics.fmean(ended - submitted for submitted, ended in self.times.values())


def main() -> None:
    given = arguments("twin_truth", minutes=3.0, seed=0, trained=0)
    with tempfile.TemporaryDirectory() as folder:
        twin, live = both(Path(folder), given.minutes, given.seed, trained=bool(given.trained))
    verdicts = [verdict for told in live.verdicts.values() for verdict in told]
    figures = [
        Figure("makespan_gap", abs(twin.makespan_s / live.makespan_s - 1), "share", "<= 0.15"),
        Figure("mean_jct_gap", abs(twin.mean_jct_s / live.mean_jct_s - 1), "share", "<= 0.15"),
        Figure("worst_task_jct_gap", max(row["jct_gap"] for row in rows_of(twin, live)), "share"),
        Figure("live_makespan_s", live.makespan_s, "s"),
        *(
            Figure(f"live_{word}", float(verdicts.count(word)), "count")
            for word in ("shrunk", "grown", "lost")
        ),
    ]
    write(
        given.json,
        figures,
        rows_of(twin, live),
        minutes=given.minutes,
        seed=given.seed,
        trained=given.trained,
    )


def both(folder: Path, minutes: float, seed: int, *, trained: bool = False) -> tuple[Run, Run]:
    """(twin, live).  The twin is run before anything is live."""
    site_file = folder / "site.yaml"
    site_file.write_text(
        SITE
        if not trained
        else SITE.replace("tariff: 1 CNY}]}]}", f"tariff: 1 CNY}}, {TRAINING_POOL}]}}]}}", 1)
    )
    entries = scenario(max(1, round(minutes * 60 / ROUND_S)), seed, trained=trained)
    site = measured(site_file, folder / "cache", trained=trained)
    live(site_file, practice(trained=trained), folder / "practice")
    behaviour = fitted_to(folder / "practice")
    twin = in_twin(site, entries, seed, behaviour)
    return twin, live(site_file, entries, folder / "live")


def rows_of(twin: Run, live: Run) -> list[dict[str, Any]]:
    rows = []
    for name, (submitted_s, ended_s) in sorted(live.times.items()):
        own = twin.times[name][1] - twin.times[name][0]
        rows.append(
            {
                "task": name, "submitted_s": round(submitted_s, 2), "live_jct_s": round(ended_s - submitted_s, 2),
                "twin_jct_s": round(own, 2), "jct_gap": abs(own / (ended_s - submitted_s) - 1),
                "live": " ".join(live.verdicts[name]), "twin": " ".join(twin.verdicts[name]),
            }
        )  # fmt: skip
    return rows


def practice(*, trained: bool) -> list[Entry]:
    """A few seconds: what has to be seen is a start, a shrink and a growth, and a model that trains."""
    found = [entry(0.0, "first", (1, 4), 5.0, 9.0, "sim/a"), entry(1.5, "second", (2, 2), 2.0, 60.0, "sim/a")]
    return [*found, Entry(2.0, "third", TRAINED.format(name="third"))] if trained else found


def scenario(rounds: int, seed: int, *, trained: bool = False) -> list[Entry]:
    rng = random.Random(seed)
    entries: list[Entry] = []

    def add(at_s: float, name: str, counts: tuple[int, int], seconds: float, bid: float, chips: str, kill_after_s: float | None = None) -> None:  # fmt: skip
        at_s, seconds = round(at_s + rng.uniform(0, 0.5), 2), round(seconds * rng.uniform(0.9, 1.1), 1)
        entries.append(entry(at_s, name, counts, seconds, bid, chips, kill_after_s))

    for number in range(rounds):
        start_s = number * ROUND_S
        add(start_s, f"long{number}", (1, 4), 30.0, 2.0, "sim/a")
        add(start_s + 1, f"victim{number}", (2, 2), 14.0, 3.0, "sim/b", 7.0)
        add(start_s + 5, f"urgent{number}", (2, 2), 9.0, 20.0, "sim/a")
        add(start_s + 7, f"behind{number}", (1, 2), 7.0, 2.5, "sim/b")
        add(start_s + 8, f"small{number}", (1, 1), 6.0, 2.2, "sim/a, sim/b")
        if trained and number % 4 == 0:
            entries.append(Entry(start_s + 2, f"trained{number}", TRAINED.format(name=f"trained{number}")))
    return sorted(entries, key=lambda entry: entry.at_s)


def entry(
    at_s: float, name: str, counts: tuple[int, int], seconds: float, bid: float, chips: str, kill_after_s: float | None = None
) -> Entry:  # fmt: skip
    """`counts`: least and most devices; `bid`: CNY per device-hour where each device does most, which is at the least."""
    least, most = counts
    device_hours = seconds * (least * most) ** 0.5 / 3600
    text = PACED.format(
        name=name, python=sys.executable, script=Path(__file__).with_name("paced.py"), least=least, most=most,
        elastic=str(least < most).lower(), seconds=seconds, bid=bid * device_hours, chips=chips,
    )  # fmt: skip
    return Entry(at_s, name, text, None if kill_after_s is None else at_s + kill_after_s)


def measured(site_file: Path, cache: Path, *, trained: bool) -> Site:
    """The site as `qipan up` will see it.  Where nothing trains no speed is needed, and the cache says so at once."""
    from qipan.cli.app import probed

    os.environ["XDG_CACHE_HOME"] = str(cache)
    site = load_site(site_file)
    if not trained:
        idle = asdict(Probe(1e9, 1.0, 1e9, 1e-3, 0.05, time.time()))
        keys = [
            f"{pool.pool_id} x{pool.devices} share {pool.cpu_share} on {os.cpu_count()} cores"
            for pool in site.pools()
        ]
        (cache / "qipan").mkdir(parents=True)
        (cache / "qipan/probes.json").write_text(json.dumps(dict.fromkeys(keys, idle)))
    found: Site = probed(site, quiet=True)
    return found


# ---- in the twin -------------------------------------------------------------------------------------------------------


def fitted_to(folder: Path) -> Behaviour:
    found = StoreFolder(folder)
    stores = [found.open(board, writer=False) for board in found.boards()]
    try:
        return fitted(stores, Behaviour(checkpoint_s=SAVE_S, report_s=1.0))
    finally:
        for store in stores:
            store.close()


def in_twin(site: Site, entries: Sequence[Entry], seed: int, behaviour: Behaviour) -> Run:
    orders = []
    for entry in entries:
        task, _ = read_text(entry.text, "task.yaml", "")
        curve = plan_on(site, task).curve
        assert curve is not None, entry.text
        orders.append(order_of(site, task, TaskId(f"{entry.name}-1"), curve, entry.at_s))
    world = build_world(site.root, seed=seed, settings=Settings(lease_s=site.lease_s), behaviour=behaviour)
    world.after_step.append(check_world)
    world.happenings = arrivals(orders)
    for entry in entries:
        if entry.killed_s is not None:
            world.happenings.append(
                Happening(entry.killed_s, f"kill {entry.name}", kill(TaskId(f"{entry.name}-1")))
            )
    world.run(until_s=1e6)
    check_end(world, {order.task_id for order in orders})
    return run_of([*world.tree.stores.values()], [entry.name for entry in entries])


def kill(task_id: TaskId) -> Any:
    def act(world: World) -> None:
        for board in world.tree.engines:
            if task_id in world.simulated(board).running():
                world.simulated(board).kill(task_id, "killed by the scenario")

    return act


# ---- live --------------------------------------------------------------------------------------------------------------


def live(site_file: Path, entries: Sequence[Entry], store: Path) -> Run:
    up = subprocess.Popen(
        [sys.executable, "-m", "qipan.cli", "up", "--site", str(site_file), "--store", str(store), "--no-console", "--json"],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert up.stdout is not None
    try:
        assert json.loads(up.stdout.readline())["event"] == "up"
        client = Client(store)
        acts: list[tuple[float, Any]] = [
            (entry.at_s, lambda entry=entry: client.submit(Task.from_text(entry.text))) for entry in entries
        ]
        acts += [
            (entry.killed_s, lambda entry=entry: kill_worker(store, f"{entry.name}-1"))
            for entry in entries
            if entry.killed_s is not None
        ]
        began_s = time.monotonic() - entries[0].at_s
        for at_s, act in sorted(acts, key=lambda one: one[0]):
            time.sleep(max(0.0, began_s + at_s - time.monotonic()))
            act()
        for entry in entries:
            client.job(f"{entry.name}-1").wait(60 + 2 * ROUND_S)
        client.close()
    finally:
        up.terminate()
        up.wait(60)
    found = StoreFolder(store)
    stores = [found.open(board, writer=False) for board in found.boards()]
    try:
        return run_of(stores, [entry.name for entry in entries])
    finally:
        for own in stores:
            own.close()


def kill_worker(store: Path, task_id: str) -> None:
    """SIGKILL to the worker of the newest attempt."""
    attempts = sorted(
        store.glob(f"engines/*/control/{task_id}-*/pid.json"), key=lambda path: path.stat().st_mtime
    )
    os.kill(json.loads(attempts[-1].read_text())["pid"], signal.SIGKILL)


def run_of(stores: Sequence[Store], names: Sequence[str]) -> Run:
    """From the stores of all boards: the topmost's facts, every board's verdicts."""
    top = next(
        store for store in stores if any(store.facts_of(f"{name}-1", ("task_submitted",)) for name in names)
    )
    times, verdicts = {}, {}
    for name in names:
        task_id = f"{name}-1"
        facts = [
            (now_s, fact_of(body))
            for _, now_s, body in top.facts_of(task_id, ("task_submitted", "task_exited"))
        ]
        submitted = next(fact.order.submitted_s for _, fact in facts if isinstance(fact, TaskSubmitted))
        ended = next(
            now_s for now_s, fact in facts if isinstance(fact, TaskExited) and fact.outcome == "done"
        )
        times[name] = (submitted, ended)
        told = {
            (round(now_s, 1), verdict) for store in stores for now_s, verdict, _ in store.reasons_of(task_id)
        }
        verdicts[name] = [verdict for _, verdict in sorted(told)]
    first_s = min(submitted for submitted, _ in times.values())
    return Run({name: (one - first_s, two - first_s) for name, (one, two) in times.items()}, verdicts)


if __name__ == "__main__":
    main()
