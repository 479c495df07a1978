"""Counts to STEPS, a checkpoint each step; a signal to stop ends it cleanly.  Standard library only."""

import json
import os
import signal
import sys
import time
from pathlib import Path

steps = int(os.environ.get("TINY_STEPS", "100"))
checkpoint = Path(os.environ.get("QIPAN_CHECKPOINT_DIR", ".")) / "count"
events = os.environ.get("QIPAN_EVENTS", "/dev/stdout")
stopping = False


def stop(_number, _frame):
    global stopping
    stopping = True


def say(**event):
    with open(events, "a") as file:
        file.write(json.dumps(event) + "\n")


def log(what):
    """An own record of when this process lived, for whoever compares it with the bill."""
    if "TINY_LOG" in os.environ:
        with open(os.environ["TINY_LOG"], "a") as file:
            name = f"{os.environ.get('QIPAN_TASK_ID')} {os.environ.get('QIPAN_ATTEMPT')}"
            file.write(f"{what} {name} {os.getpid()} {time.time():.3f}\n")


signal.signal(signal.SIGTERM, stop)
log("begin")
count = int(checkpoint.read_text()) if checkpoint.exists() else 0
say(event="ready", step=count, steps=steps)
while count < steps and not stopping:
    time.sleep(float(os.environ.get("TINY_STEP_S", "0.1")))
    count += 1
    part = checkpoint.with_suffix(".part")
    part.write_text(str(count))
    part.rename(checkpoint)
    say(event="progress", step=count, steps=steps)
    say(event="checkpoint", step=count)
say(event="parked" if count < steps else "done", step=count)
log("end")
sys.exit(0)
