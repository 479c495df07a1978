"""What onlookers cost a board: python -m benchmarks.console --json OUT

Decision latency (a fact to its decision, stored) with and without 200 console tabs and 1,000 followers of one task,
in ten pairs; the run without stands half before and half after the one with, so that a machine that gets faster or
slower meanwhile is not told as theirs.  The figure is the median of the ratios with its upper 95 % bound (bootstrap)."""

import asyncio
import itertools
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx

from benchmarks.form import Figure, arguments, write
from qipan.api import Server
from qipan.client import Client, Task, socket_path
from qipan.console.serve import ConsoleProcess
from qipan.events import ParkRequested
from qipan.host import Host
from qipan.workload.site import load_site

SITE = """site:
  lease: 60s
  board: {name: cn, children: [{name: dc1, region: cn-east, pools: [{chip: sim/a, devices: 2, tariff: 1 CNY}]}]}
  tenants: [{name: poets, balance: 1000 CNY}]
"""
TASK = "kind: train\nname: watched\nrun: sleep 3000\ndevices: 1\nlimits: {time: 1h, max_cost: 5 CNY}\n"
TABS, FOLLOWERS, PAIRS, TICKS, SETTLE_S = 200, 1000, 10, 250, 1.0
TOKEN = "benchmark"


def main() -> None:
    if sys.argv[1:2] == ["--look-on"]:
        asyncio.run(look_on(Path(sys.argv[2]), *sys.argv[3].split("/enter#")))
        return
    given = arguments("console")
    folder = Path(tempfile.mkdtemp(prefix="qipan-onlookers-"))
    (folder / "site.yaml").write_text(SITE)
    (folder / "token").write_text(TOKEN)
    host = Host(load_site(folder / "site.yaml"), folder)
    server = Server(host, socket_path(folder), TOKEN)
    server.start()
    console = ConsoleProcess(folder)
    try:
        rows = measured(host, folder, console.address())
    finally:
        console.end()
        host.park(10)
        server.stop()
        host.close()
    ratios = [row["watched_ms"] / row["alone_ms"] for row in rows]
    cpu = [row["watched_cpu_ms"] / row["alone_cpu_ms"] for row in rows]
    figures = [
        Figure("decision_latency_ratio", statistics.median(ratios), "watched over alone"),
        Figure("decision_latency_ratio_upper_95", upper_95(ratios), "watched over alone", "<= 1.05"),
        Figure("decision_cpu_ratio", statistics.median(cpu), "watched over alone"),
        Figure("decision_cpu_ratio_upper_95", upper_95(cpu), "watched over alone"),
        Figure("server_cpu_share_more", statistics.median(row["watched_cpu"] - row["alone_cpu"] for row in rows), "of a core"),
    ]  # fmt: skip
    write(given.json, figures, rows, tabs=TABS, followers=FOLLOWERS, ticks=TICKS, pairs=PAIRS)


def measured(host: Host, folder: Path, address: str) -> list[dict[str, Any]]:
    host.step()
    Client(folder).submit(Task.from_text(TASK))
    latency(host)
    rows = []
    for _ in range(PAIRS):
        time.sleep(SETTLE_S)
        before = latency(host)
        crowd = start_crowd(folder, address)
        time.sleep(SETTLE_S)
        watched = latency(host)
        crowd.kill()
        crowd.wait()
        time.sleep(SETTLE_S)
        after = latency(host)
        names = ("ms", "cpu_ms", "cpu")
        rows.append(
            {f"watched_{name}": value for name, value in zip(names, watched, strict=True)}
            | {f"alone_{name}": (one + two) / 2 for name, one, two in zip(names, before, after, strict=True)}
            | {"before_ms": before[0], "after_ms": after[0]}
        )
    return rows


def latency(host: Host) -> tuple[float, float, float]:
    """Of a decision, medians over TICKS: milliseconds by the wall, and of processor time; and the processor share of this
    process meanwhile."""
    wall, own, cpu_s, began_s = [], [], time.process_time(), time.monotonic()
    for _ in range(TICKS):
        host.tree.root.accept(ParkRequested(False, "benchmark"))
        before_s, before_own_s = time.perf_counter(), time.thread_time()
        host.step()
        own.append(time.thread_time() - before_own_s)
        wall.append(time.perf_counter() - before_s)
        time.sleep(0.01)
    share = (time.process_time() - cpu_s) / (time.monotonic() - began_s)
    return statistics.median(wall) * 1000, statistics.median(own) * 1000, share


def upper_95(ratios: list[float]) -> float:
    chance = random.Random(0)
    medians = sorted(statistics.median(chance.choices(ratios, k=len(ratios))) for _ in range(10_000))
    return medians[9_500]


def start_crowd(folder: Path, address: str) -> "subprocess.Popen[str]":
    crowd = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.console", "--look-on", str(folder), address], stdout=subprocess.PIPE, text=True
    )  # fmt: skip
    assert crowd.stdout is not None
    if crowd.stdout.readline().strip() != "all see":
        raise SystemExit("the onlookers did not get through; raise the limit of open files (ulimit -n 4096)")
    return crowd


async def look_on(folder: Path, address: str, key: str) -> None:
    """Followers of the task and tabs on the board, until killed."""
    many = httpx.Limits(max_connections=None)
    api = httpx.AsyncClient(
        transport=httpx.AsyncHTTPTransport(uds=str(socket_path(folder)), limits=many),
        base_url="http://qipan/v1", headers={"authorization": f"Bearer {TOKEN}"}, timeout=None,
    )  # fmt: skip
    async with httpx.AsyncClient(
        base_url=address
    ) as door:  # its connection is not kept: the server may close it any time
        await door.post("/enter", data={"key": key})
    browser = httpx.AsyncClient(base_url=address, limits=many, timeout=None, cookies=door.cookies)
    seen = itertools.count(1)
    all_see = asyncio.Event()

    async def watch(client: httpx.AsyncClient, path: str) -> None:
        async with client.stream("GET", path) as stream:
            pieces = stream.aiter_raw()
            await anext(pieces)
            if next(seen) == TABS + FOLLOWERS:
                all_see.set()
            async for _ in pieces:
                pass

    watching = [asyncio.create_task(watch(api, "/tasks/watched-1/stream")) for _ in range(FOLLOWERS)]
    watching += [asyncio.create_task(watch(browser, "/live/board?")) for _ in range(TABS)]
    await asyncio.wait_for(all_see.wait(), 60)
    print("all see", flush=True)
    await asyncio.gather(*watching)


if __name__ == "__main__":
    main()
