"""What the trainer reaches on unlike chips, over a slow link, and when it changes its shape.  Needs root for the link
(two network namespaces, 20 ms one way, 200 Mbit/s), about three minutes.

Against plain torchrun DistributedDataParallel over the same link in the same run.  torchft is not compared: without Triton
it sends fp32 where int8 is asked for, and it knows no weights for unlike sites.
"""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from benchmarks.form import Figure, arguments, write
from benchmarks.trainer_site import DATA
from benchmarks.wan import Wan
from qipan.hardware import BoardId
from qipan.network import Link
from qipan.planner.sites import exchange_s, mixed_step_s, round_s
from qipan.strategy import Outer, SiteStrategy, Stage, Strategy

LATENCY_S, BYTES_PER_S = 0.020, 25e6
LAYERS, HIDDEN, SEQ, ROWS = 4, 128, 64, 4  # rows a site; 1.2 M parameters with the poems' characters
LINK_SEQ, LINK_ROWS = 32, 2  # little real computation in a paced step, so that a busy machine has time for it
LOSS_LAYERS, LOSS_HIDDEN, LOSS_SEQ, LOSS_ROWS = (
    4,
    128,
    64,
    8,
)  # early in a training, and with small batches, sites lag more
LOSS_STEPS = 300
RAMP = 10
#: outer steps as `sites:` has them, and as they were
WAYS = {"default": {"ramp": RAMP, "moments": True}, "all alike": {"ramp": 0, "moments": False}}
STEP_S = 0.1  # of the paced chip, plain DDP's and the sites' alike
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "GLOO_SOCKET_IFNAME": "lo",
}  # fmt: skip


LINK = Link(BoardId("east"), BoardId("west"), BYTES_PER_S, LATENCY_S)


def main() -> None:
    signal.signal(
        signal.SIGTERM, lambda _number, _frame: sys.exit(1)
    )  # the link and its programs are taken down
    given = arguments(
        "trainer", parts="mixed,link,kill,loss", seeds="1,2,3", ways="default,all alike", steps=LOSS_STEPS, text=DATA[0]
    )  # fmt: skip
    figures: list[Figure] = []
    rows: list[dict[str, Any]] = []
    parts = given.parts.split(",")
    if "mixed" in parts:
        mixed(figures, rows)
    if "link" in parts:
        link(figures, rows)
    if "kill" in parts:
        kill(figures, rows)
    if "loss" in parts:
        seeds = [int(seed) for seed in given.seeds.split(",")]
        loss(figures, rows, seeds, given.ways.split(","), given.steps, given.text)
    write(
        given.json, figures, rows, latency_s=LATENCY_S, bytes_per_s=BYTES_PER_S, layers=LAYERS, hidden=HIDDEN, seq=SEQ,
        rows_per_site=ROWS, link_seq=LINK_SEQ, link_rows_per_site=LINK_ROWS, link_step_s=STEP_S, loss_layers=LOSS_LAYERS, loss_hidden=LOSS_HIDDEN, loss_seq=LOSS_SEQ, loss_rows_per_site=LOSS_ROWS, loss_steps=given.steps, loss_text=given.text, torchft="not compared",
    )  # fmt: skip


def start(role: str, plan: dict[str, Any], *before: str, **environment: str) -> "subprocess.Popen[str]":
    common = {"layers": LAYERS, "hidden": HIDDEN, "seq": SEQ}
    command = [*before, sys.executable, "-m", "benchmarks.trainer_site", role, json.dumps({**common, **plan})]
    return subprocess.Popen(
        command, env={**os.environ, **ENVIRONMENT, **environment}, stdout=subprocess.PIPE, text=True
    )


def answers(process: "subprocess.Popen[str]", limit_s: float = 300.0) -> list[dict[str, Any]]:
    out, _ = process.communicate(timeout=limit_s)
    return [json.loads(line) for line in out.splitlines() if line.startswith("{")]


# ---- unlike chips, reshape -------------------------------------------------------------------------------------------


def mixed(figures: list[Figure], rows: list[dict[str, Any]]) -> None:
    plan = {"rows": 64, "row_s": 0.02, "steps": 24, "layers": 2, "hidden": 32, "seq": 16, "bytes": True}
    port = str(20_000 + os.getpid() % 10_000)
    ranks = [
        start("mixed", plan, RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        for rank in range(2)
    ]
    [found] = answers(ranks[0])
    answers(ranks[1])
    changed, times = found["changed_at"], found["times"]
    settled_s = float(np.median(times[-6:]))
    after = times[changed:]
    absorbed = next((i for i, s in enumerate(after) if s <= 1.15 * settled_s), len(after))
    figures += [
        Figure("mixed_dp_share_of_ideal", found["reached"] / found["ideal"], "share", ">= 0.95"),
        Figure("mixed_dp_even_share_of_ideal", found["even"] / found["ideal"], "share"),
        Figure("speed_change_absorbed_steps", float(absorbed), "steps", "<= 3"),
        Figure(
            "planner_error_mixed",
            abs((64 / found["reached"]) / mixed_step_s(found["rows"], found["rates"]) - 1),
            "share",
            "<= 0.15",
        ),
        Figure("reshape_s", max(one["seconds"] for one in found["reshape_s"]), "s", "<= 3"),
    ]
    rows.append({"part": "mixed", **found})


# ---- over a slow link ------------------------------------------------------------------------------------------------


def strategy(
    every: int, *, overlap: bool = False, seq: int = SEQ, rows: int = ROWS, layers: int = LAYERS
) -> Strategy:
    sites = tuple(
        SiteStrategy(name, (Stage("bench", ((0, layers),), rows_per_dp=(rows,)),))
        for name in ("east", "west")
    )
    return Strategy(
        0, seq, 2 * rows, sites, Outer(every, codec="int8", grace_s=3.0, overlap=overlap, moments=True)
    )


@dataclass(frozen=True, slots=True)
class LinkRun:
    task: str
    every: int
    steps: int  # of both sites together: global batches
    overlap: bool
    ramp: int = 0


def two_sites(wan: Wan, runs: Sequence[LinkRun], *, kill: bool = False) -> list[dict[str, Any]]:
    """Both sites' answers, run after run.  With `kill`, the second is killed when it has done some rounds, and started again."""
    asked = [
        {
            "task": run.task, "tokens": run.steps * 2 * LINK_ROWS * LINK_SEQ,
            "strategy": msgspec.to_builtins(strategy(run.every, overlap=run.overlap, seq=LINK_SEQ, rows=LINK_ROWS)),
        }
        for run in runs
    ]  # fmt: skip
    desk = start(
        "coordinator",
        {
            "host": wan.address(0), "grace_s": 3.0, "sites": ["east", "west"], "batch_tokens": 2 * LINK_ROWS * LINK_SEQ,
            "runs": {run.task: [run.every, run.ramp] for run in runs},
        },
        *wan.command(0),
    )  # fmt: skip
    assert desk.stdout is not None
    address = json.loads(desk.stdout.readline())["address"]
    begun: list[subprocess.Popen[str]] = []

    def begin(i: int, name: str) -> "subprocess.Popen[str]":
        plan = {"runs": asked, "site": name, "desk": address, "host": wan.address(i), "step_s": STEP_S}
        begun.append(start("site", plan, *wan.command(i)))
        return begun[-1]

    try:
        east, west = begin(0, "east"), begin(1, "west")
        extra: list[dict[str, Any]] = []
        if kill:
            commits = 0
            while commits < 4:
                commits += json.loads(desk.stdout.readline()).get("command") == "Commit"
            killed_s = time.time()
            west.send_signal(signal.SIGKILL)
            west.wait()
            west = begin(1, "west")
            extra = [{"killed_at_s": killed_s}]
        return [*extra, *answers(east), *answers(west)]
    finally:
        for process in (*begun, desk):
            process.kill()
            process.wait()


def link(figures: list[Figure], rows: list[dict[str, Any]]) -> None:
    runs = (
        LinkRun("h10", 10, 120, True),
        LinkRun("h50", 50, 250, True),
        LinkRun("h10_without_overlap", 10, 60, False),
        LinkRun("h10_ramp", 10, 120, True, RAMP),
    )
    with Wan(2, LATENCY_S, BYTES_PER_S) as wan:
        plain = ddp(wan)
        found = [one for one in two_sites(wan, runs) if "site" in one]
    speed: dict[str, float] = {}
    use: dict[str, float] = {}
    errors: dict[str, float] = {}
    for run in runs:
        both = [one for one in found if one["task"] == run.task]
        sequences = [[one["digest"] for one in site["rounds"]] for site in both]
        assert sequences[0] == sequences[1], f"digests differ in {run.task}"
        speed[run.task] = sum(site["tokens"] / site["seconds"] for site in both) / 2
        use[run.task] = min(site["computed_s"] / site["seconds"] for site in both)
        rows += [
            {"part": "link", "every": run.every, "ramp": run.ramp, "overlap": run.overlap, **site}
            for site in both
        ]
        if run.ramp:
            continue  # its rounds are not alike
        inner_s = max(site["computed_s"] / site["steps"] for site in both)
        whole = [b["at_s"] - a["at_s"] for site in both for a, b in itertools.pairwise(site["rounds"])]
        outer, values = strategy(run.every, overlap=run.overlap).outer, both[0]["parameters"]
        assert outer is not None
        planned_s = round_s(outer, values, inner_s, exchange_s(outer, 2, values, LINK))
        errors[run.task] = abs(float(np.median(whole)) / planned_s - 1)
    figures += [
        Figure("cross_site_speed_vs_ddp", speed["h10"] / plain["tokens_per_s"], "times", ">= 3"),
        Figure("cross_site_use_h10", use["h10"], "share", ">= 0.90"),
        Figure("cross_site_use_h10_without_overlap", use["h10_without_overlap"], "share"),
        Figure("cross_site_use_h50", use["h50"], "share", ">= 0.97"),
        Figure("cross_site_use_h10_first_120_steps", use["h10_ramp"], "share"),
        *(Figure(f"planner_error_round_{name}", error, "share", "<= 0.15") for name, error in errors.items()),
        Figure("planner_error_cross_site", max(errors.values()), "share", "<= 0.15"),
    ]
    rows.append({"part": "ddp", **plain})


def kill(figures: list[Figure], rows: list[dict[str, Any]]) -> None:
    with Wan(2, LATENCY_S, BYTES_PER_S) as wan:
        lost = two_sites(wan, [LinkRun("kill", 5, 250, False)], kill=True)
    east = next(one for one in lost if one.get("site") == "east")
    west = next(one for one in lost if one.get("site") == "west")
    killed_s = lost[0]["killed_at_s"]
    times = [one["at_s"] for one in east["rounds"]]
    after = next(i for i, at in enumerate(times) if at > killed_s)
    usual_s = float(np.median(np.diff(times[:after]))) if after > 2 else 0.0
    joined = next(one for one in lost if one.get("event") == "joined" and one.get("fresh"))
    figures += [
        Figure("site_loss_s", max(0.0, times[after] - times[after - 1] - usual_s), "s"),
        Figure("site_rejoin_over_wire", joined["seconds"], "s"),
    ]
    rows.append(
        {
            "part": "kill", "usual_round_s": usual_s, "round_of_the_loss_s": times[after] - times[after - 1],
            "rounds_of_the_one_that_came_back": len(west["rounds"]),
        }
    )  # fmt: skip


def ddp(wan: Wan) -> dict[str, Any]:
    plan = {
        "strategy": msgspec.to_builtins(strategy(10, seq=LINK_SEQ, rows=LINK_ROWS)),
        "steps": 20,
        "step_s": STEP_S,
        "layers": LAYERS,
        "hidden": HIDDEN,
        "seq": LINK_SEQ,
    }
    runs = []
    for i in range(2):
        command = [
            *wan.command(i), sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", f"--node-rank={i}",
            f"--master-addr={wan.address(0)}", "--master-port=29555", "-m", "benchmarks.trainer_site", "ddp", json.dumps(plan),
        ]  # fmt: skip
        environment = {**os.environ, **ENVIRONMENT, "GLOO_SOCKET_IFNAME": "wan0"}
        runs.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    [found] = [one for run in runs for one in answers(run)]
    return {**found, "tokens_per_s": found["tokens"] / found["seconds"]}


def loss(
    figures: list[Figure],
    rows: list[dict[str, Any]],
    seeds: list[int],
    ways: list[str],
    steps: int,
    data: str,
) -> None:
    """After equal tokens, text as bytes; each seed in a process of its own."""
    stage = Stage("bench", ((0, LOSS_LAYERS),), rows_per_dp=(2 * LOSS_ROWS,))
    exactly = Strategy(0, LOSS_SEQ, 2 * LOSS_ROWS, (SiteStrategy("one", (stage,)),))
    apart = strategy(10, seq=LOSS_SEQ, rows=LOSS_ROWS, layers=LOSS_LAYERS)
    plan = {
        "exact": msgspec.to_builtins(exactly), "outer": msgspec.to_builtins(apart), "ways": {way: WAYS[way] for way in ways}, "bytes": True, "data": [data],
        "layers": LOSS_LAYERS, "hidden": LOSS_HIDDEN, "seq": LOSS_SEQ, "tokens": steps * 2 * LOSS_ROWS * LOSS_SEQ,
    }  # fmt: skip
    runs = [start("losses", {**plan, "seed": seed}) for seed in seeds]
    found = [one for run in runs for one in answers(run, 7200.0)]
    exact = {one["seed"]: one["loss"] for one in found if one["every"] == 0}

    for way in ways:
        gaps = [one["loss"] - exact[one["seed"]] for one in found if one.get("way") == way]
        name, goal = ("", "<= 0.02") if way == "default" else ("_" + way.replace(" ", "_"), "")
        figures.append(Figure(f"cross_site_loss_gap{name}", float(np.mean(gaps)), "nat per token", goal))
    rows += [{"part": "loss", **one} for one in found]


if __name__ == "__main__":
    main()
