"""A host that kills itself with SIGKILL when its top board has stored a given number of facts: before or after the
commit, by turns.  Driven by test_kill.py: python kill_host.py STORE SITE FACTS WHEN; FACTS 0 never kills."""

import os
import signal
import sys
import threading
from pathlib import Path

from qipan.cli.run import Running
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


Store.record = deadly
running = Running(load_site(site), folder)
running.start()
print("up", flush=True)
ended = threading.Event()
signal.signal(signal.SIGTERM, lambda *_: ended.set())
ended.wait()
running.end(park=False)
