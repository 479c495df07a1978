"""The parent of benchmarks.grid in a process of its own: serves a board, answers "measure" on standard input with one line
of JSON, and to "submit" submits a task for each child's place.  python -m benchmarks.grid_parent STORE"""

import json
import os
import resource
import sys
import threading
import time
from pathlib import Path

from qipan.grid import GridHost
from qipan.hardware import BoardId, BoardSpec
from qipan.scheduler.state import RUNS
from qipan.workload.parse import parse_task
from qipan.workload.site import Site, Tenant

TASK = """\
kind: train
name: hold-{name}
tenant: poets
run: sleep 3600
devices: 1
limits: {{time: 1h, max_cost: 2 CNY, regions: [{name}]}}
"""


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def submit(host: GridHost) -> None:
    for name in sorted(host.children):
        text = TASK.format(name=name)
        host.intake.submit(parse_task(text, "task.yaml"))


def main() -> None:
    resource.setrlimit(
        resource.RLIMIT_NOFILE, (min(8192, resource.getrlimit(resource.RLIMIT_NOFILE)[1]),) * 2
    )
    site = Site(BoardSpec(BoardId("cn")), lease_s=60.0, tenants=(Tenant("poets", 10**13),))
    host = GridHost(site, Path(sys.argv[1]))
    port = host.listen("127.0.0.1", 0)
    threading.Thread(target=host.run, daemon=True).start()
    print(json.dumps({"port": port}), flush=True)
    for line in sys.stdin:
        if line.strip() == "submit":
            submit(host)
        with host.lock:
            running = sum(task.phase in RUNS for task in host.tree.root.state.tasks.values())
            offered = sum(bool(engine.offers) for engine in host.tree.root.state.engines.values())
        told = {
            "at_s": time.monotonic(), "cpu_s": time.process_time(), "resident_bytes": resident_bytes(),
            "connected": sum(child.carrier.connected for child in host.children.values()), "offered": offered,
            "bytes": host.network.bytes_in + host.network.bytes_out, "ticks": host.tree.root.state.tick,
            "running": running,
        }  # fmt: skip
        print(json.dumps(told), flush=True)
    host.stop()


if __name__ == "__main__":
    main()
