"""A host that kills itself with SIGKILL when its top board has stored a given number of facts: before or after the
commit, by turns.  Driven by test_kill.py: python kill_host.py STORE SITE FACTS WHEN; FACTS 0 never kills."""

import os
import signal
import sys
import threading
from dataclasses import replace
from pathlib import Path

from qipan.cli.run import Running
from qipan.hardware import BoardSpec, Probe
from qipan.store import Store
from qipan.workload.site import load_site

folder, site, facts, when = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4]
record = Store.record


def deadly(self, stored, tick, reports, reasons, transfers=()):
    due = facts and self.path and self.path.stem == "cn" and self.fact_count() + len(stored) >= facts
    if due and when == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    numbers = record(self, stored, tick, reports, reasons, transfers)
    if due:
        os.kill(os.getpid(), signal.SIGKILL)
    return numbers


PROBE = Probe(
    3e10, 4.0, 1e9, 1e-3, 0.05, 0.0, 0.2, 0.001
)  # so that trainer tasks can be planned without measuring


def with_probes(board: BoardSpec) -> BoardSpec:
    pools = tuple(replace(pool, probe=PROBE) for pool in board.pools)
    return replace(board, pools=pools, children=tuple(with_probes(child) for child in board.children))


Store.record = deadly
read = load_site(site)
running = Running(replace(read, root=with_probes(read.root)), folder)
running.start()
print("up", flush=True)
ended = threading.Event()
signal.signal(signal.SIGTERM, lambda *_: ended.set())
ended.wait()
running.end(park=False)
