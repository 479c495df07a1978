"""The parent of benchmarks.grid in a process of its own: serves a board, answers "measure" on standard input with one line
of JSON.  python -m benchmarks.grid_parent STORE"""

import json
import os
import resource
import sys
import threading
import time
from pathlib import Path

from qipan.grid import GridHost
from qipan.hardware import BoardId, BoardSpec
from qipan.workload.site import Site


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    resource.setrlimit(
        resource.RLIMIT_NOFILE, (min(8192, resource.getrlimit(resource.RLIMIT_NOFILE)[1]),) * 2
    )
    host = GridHost(Site(BoardSpec(BoardId("cn")), lease_s=60.0), Path(sys.argv[1]))
    port = host.listen("127.0.0.1", 0)
    threading.Thread(target=host.run, daemon=True).start()
    print(json.dumps({"port": port}), flush=True)
    for _ in sys.stdin:
        with host.lock:
            offered = sum(bool(engine.offers) for engine in host.tree.root.state.engines.values())
        told = {
            "at_s": time.monotonic(), "cpu_s": time.process_time(), "resident_bytes": resident_bytes(),
            "connected": sum(child.carrier.connected for child in host.children.values()), "offered": offered,
            "bytes": host.network.bytes_in + host.network.bytes_out, "ticks": host.tree.root.state.tick,
        }  # fmt: skip
        print(json.dumps(told), flush=True)
    host.stop()


if __name__ == "__main__":
    main()
