"""A gang of three ranks that really compute: every step each makes the same products, and all wait for the slowest.  Says how fast each
was, as the built-in trainer does, and notes its ranks' process numbers, so that one of them can be slowed."""

import json
import multiprocessing
import os
import time
from pathlib import Path

RANKS, STEP_S = 3, 0.1
folder, steps = Path(os.environ["QIPAN_ATTEMPT_DIR"]), int(os.environ["GANG_STEPS"])


def compute(rank, order, done):
    (folder / f"gang-{rank}").write_text(str(os.getpid()))
    while order.recv():
        began_s = time.perf_counter()
        total = 0
        for number in range(400_000):
            total += number * number
        done.send(time.perf_counter() - began_s)


def say(**event):
    with open(os.environ["QIPAN_EVENTS"], "a") as file:
        file.write(json.dumps(event) + "\n")


if __name__ == "__main__":
    pipes = [(multiprocessing.Pipe(), multiprocessing.Pipe()) for _ in range(RANKS)]
    ranks = [
        multiprocessing.Process(target=compute, args=(rank, order[1], done[1]), daemon=True)
        for rank, (order, done) in enumerate(pipes)
    ]
    for rank in ranks:
        rank.start()
    for step in range(1, steps + 1):
        for order, _ in pipes:
            order[0].send(True)
        seconds = [done[0].recv() for _, done in pipes]
        say(event="progress", step=step, steps=steps, forward_rows_per_s=[round(1 / s, 2) for s in seconds])
        time.sleep(STEP_S)
    say(event="done", step=steps)
