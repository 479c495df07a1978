"""An elastic script whose pace is stated, whatever else this machine does: PACED_S seconds on PACED_MOST devices, by the square root
of its devices on fewer.  It sleeps through each of its steps, checkpoints every PACED_SAVE_S, and goes on from there.  Standard library only."""

import json
import os
import signal
import sys
import time
from pathlib import Path

STEPS = 100

devices = len(os.environ["QIPAN_DEVICES"].split(","))
step_s = float(os.environ["PACED_S"]) / STEPS * (int(os.environ["PACED_MOST"]) / devices) ** 0.5
checkpoint = Path(os.environ["QIPAN_CHECKPOINT_DIR"]) / "step"
told: list[int] = []
signal.signal(signal.SIGTERM, lambda number, _frame: told.append(number))


def say(**event: object) -> None:
    with open(os.environ["QIPAN_EVENTS"], "a") as file:
        file.write(json.dumps(event) + "\n")


def save(step: int) -> None:
    part = checkpoint.with_suffix(".part")
    part.write_text(str(step))
    part.rename(checkpoint)
    say(event="checkpoint", step=step)


step = int(checkpoint.read_text()) if checkpoint.exists() else 0
say(event="ready", step=step, steps=STEPS)
began_s = saved_s = time.monotonic()
first = step
while step < STEPS and not told:
    time.sleep(max(0.0, began_s + (step + 1 - first) * step_s - time.monotonic()))
    step += 1
    say(event="progress", step=step, steps=STEPS)
    if time.monotonic() - saved_s >= float(os.environ["PACED_SAVE_S"]):
        saved_s = time.monotonic()
        save(step)
save(step)
say(event="parked" if step < STEPS else "done", step=step)
sys.exit(0)
