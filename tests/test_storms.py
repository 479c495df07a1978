"""Seeds by the ten thousand, on all cores: `make endurance`.  Every invariant after every step, quota rules counted by code apart.

QIPAN_SEEDS=FIRST:COUNT picks the seeds; a run that was stopped goes on from the last number it printed."""

import multiprocessing
import os
import time
import traceback

import pytest

from qipan.scheduler import Settings
from test_preemptions import run_preemption_storm
from test_quota import run_quota_storm
from test_twin import LARGE, run_cuts, run_loss, run_storm

KINDS = {
    "storm": run_storm,
    "storm on boards that look at what changed": lambda seed: run_storm(seed, LARGE),
    "cuts": run_cuts,
    "a machine lost": run_loss,
    "storm under quota rules": run_quota_storm,
    "storm under limits of preemption": lambda seed: run_preemption_storm(
        seed, LARGE if seed % 4 < 2 else Settings()
    ),
}
EVERY = 100


def run(seed: int) -> tuple[int, str]:
    """(seed, what went wrong)."""
    kind = list(KINDS)[seed % len(KINDS)]
    try:
        KINDS[kind](seed)
    except BaseException:
        return seed, f"seed {seed}, {kind}: repeat with `QIPAN_SEEDS={seed}:1`\n{traceback.format_exc()}"
    return seed, ""


@pytest.mark.endurance
@pytest.mark.timeout(20_000)
def test_ten_thousand_seeds_of_faults():
    first, count = map(int, os.environ.get("QIPAN_SEEDS", "10000:10000").split(":"))
    began_s = time.monotonic()
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        for number, (seed, wrong) in enumerate(pool.imap(run, range(first, first + count), chunksize=5), 1):
            assert not wrong, wrong
            if number % EVERY == 0 or number == count:
                print(f"{number} seeds up to {seed} in {time.monotonic() - began_s:.0f} s", flush=True)
