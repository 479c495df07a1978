"""How often a node that cheats is caught and an honest one refused, on engines of two real speeds: worker processes whose
groups have CPU quotas.  `--trials` of each kind, seeded:

- twice the devices: one process answers as two devices;
- twice the speed: two slow processes are declared at the rate of the fast ones;
- honest: two fast processes, each answer delayed by chance with a standard deviation of 10 %, declared at their mean rate.
"""

import os
import random
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.form import Figure, arguments, write
from qipan.engines import devices as chips
from qipan.measure import Claim, judge
from qipan.measure.session import Device, LocalDevice, ask, examine

FAST, SLOW = 0.3, 0.15  # of a core
SIZE, GO_S = 160, 0.1
JITTER, DELAY = 0.1, 0.25


class Shared:
    """One process behind two names: it serves them in turn."""

    def __init__(self, worker: LocalDevice) -> None:
        self.worker, self.lock = worker, threading.Lock()
        self.held: dict[int, list[dict[str, Any]]] = {0: [], 1: []}

    def receive(self, slot: int) -> dict[str, Any]:
        while True:
            with self.lock:
                if self.held[slot]:
                    return self.held[slot].pop(0)
                answer = self.worker.receive()
                self.held[answer["slot"]].append(answer)


class Named:
    def __init__(self, shared: Shared, slot: int) -> None:
        self.shared, self.slot = shared, slot

    def send(self, **command: Any) -> None:
        self.shared.worker.send(slot=self.slot, **command)

    def receive(self) -> dict[str, Any]:
        return self.shared.receive(self.slot)


class Noisy:
    """Answers later than it could: by DELAY on the mean, of its own time, with a deviation of JITTER."""

    def __init__(self, worker: LocalDevice, chance: random.Random) -> None:
        self.worker, self.chance, self.sent_s, self.verb = worker, chance, 0.0, ""

    def send(self, **command: Any) -> None:
        self.sent_s, self.verb = time.perf_counter(), command["verb"]
        self.worker.send(**command)

    def receive(self) -> dict[str, Any]:
        answer = self.worker.receive()
        if self.verb == "go":
            time.sleep(
                (time.perf_counter() - self.sent_s) * max(0.0, self.chance.gauss(DELAY, JITTER * (1 + DELAY)))
            )
        return answer


def slowest(together: Sequence[Sequence[float]]) -> float:
    """By time, of the slower device: what an honest owner declares."""
    return min(len(rates) / sum(1 / rate for rate in rates) for rates in together)


def bound(group: str) -> LocalDevice:
    return LocalDevice("cpu", 1, ("sh", "-c", f'echo $$ > {group}/cgroup.procs; exec "$@"', "worker"))


def trials(
    kind: str, nodes: Sequence[Device], claim: Claim, steps: int, count: int, rounds: int
) -> list[dict[str, Any]]:
    rows = []
    for seed in range(count):
        chance = np.random.default_rng([seed, len(kind)])
        verdict, asked = examine(nodes, claim, SIZE, steps, rounds, chance=chance)
        unclaimed = judge(replace(claim, flops_per_s=0.0), asked.alone, asked.together, asked.wrong)
        rows.append({
            "kind": kind, "seed": seed, "holds": verdict.holds, "holds_without_a_rate": unclaimed.holds, "declared": claim.flops_per_s, "measured": verdict.flops_per_s,
            "real_devices": verdict.real_devices, "rounds": len(asked.together[0]), "reasons": list(verdict.reasons),
        })  # fmt: skip
    return rows


def main() -> None:
    given = arguments("measurement", trials=100, rounds=8)
    if not chips.quotas_available():
        print(
            "this benchmark gives processes a share of a core: it needs a writable cpu cgroup (v1)",
            file=sys.stderr,
        )
        sys.exit(2)
    whole, groups = chips.make_group(f"qipan-measure-{os.getpid()}", (FAST, FAST, SLOW, SLOW, FAST))
    Path(whole, "cpu.shares").write_text("65536")  # what else this machine does must not blur the two speeds
    workers = [bound(group) for group in groups]
    try:
        fast, slow, one = workers[:2], workers[2:4], Shared(workers[4])
        steps = 8
        while SIZE**3 * 2 * steps / min(ask(fast, SIZE, steps, rounds=2).together[0]) < GO_S:
            steps = round(steps * 1.4)
        rate = slowest(ask(fast, SIZE, steps, rounds=12).together)
        real = slowest(ask(slow, SIZE, steps, rounds=8).together)
        noisy = [Noisy(worker, random.Random(index)) for index, worker in enumerate(fast)]
        plans = [
            ("twice the devices", [Named(one, 0), Named(one, 1)], Claim(2, rate)),
            ("twice the speed", list(slow), Claim(2, 2 * real)),
            ("honest", noisy, Claim(2, rate / (1 + DELAY))),
        ]
        with ThreadPoolExecutor(3) as pool:
            both = pool.submit(
                lambda: [trials(*plan, steps, given.trials, given.rounds) for plan in plans[:2]]
            )
            rest = [pool.submit(trials, *plan, steps, given.trials, given.rounds) for plan in plans[2:]]
            results = [*both.result(), *(future.result() for future in rest)]
    finally:
        for worker in workers:
            worker.close()
        for _ in range(50):
            if chips.remove_group(whole):
                break
            time.sleep(0.1)
    refused = [sum(not row["holds"] for row in rows) for rows in results]
    unit = f"of {given.trials}"
    write(
        given.json,
        [
            Figure("twice_the_devices_caught", refused[0], unit, f">= {0.99 * given.trials:g}"),
            Figure("twice_the_devices_caught_without_a_rate", sum(not row["holds_without_a_rate"] for row in results[0]), unit),
            Figure("twice_the_speed_caught", refused[1], unit, f">= {0.99 * given.trials:g}"),
            Figure("honest_refused", refused[2], unit, f"<= {0.01 * given.trials - 1e-9:g}"),
        ],
        [row for rows in results for row in rows],
        steps=steps, size=SIZE, fast_flops_per_s=rate, slow_flops_per_s=real, jitter=JITTER, rounds=given.rounds,
    )  # fmt: skip


if __name__ == "__main__":
    main()
