"""A light task: appends a line with its fence twice a second, on the machine's one clock.  An own record of when it lived."""

import os
import signal
import sys
import time

log, ticks = os.environ["LIGHT_LOG"], int(os.environ["LIGHT_TICKS"])
name = (
    f"{os.environ['QIPAN_TASK_ID']} {os.environ['QIPAN_ATTEMPT']} {os.environ['QIPAN_FENCE']} {os.getpid()}"
)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
with open("/proc/self/stat") as stat:  # when its supervisor made it
    born_s = int(stat.read().rsplit(")", 1)[1].split()[19]) / os.sysconf("SC_CLK_TCK")
with open(log, "a") as file:
    file.write(f"born {name} {born_s:.3f}\n")
    for i in range(ticks + 1):
        what = "begin" if i == 0 else "end" if i == ticks else "tick"
        file.write(f"{what} {name} {time.clock_gettime(time.CLOCK_BOOTTIME):.3f}\n")
        file.flush()
        time.sleep(0.5)
