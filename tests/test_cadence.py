"""When a policy is asked: tiny clusters of the published settings, worked out by hand."""

from collections.abc import Sequence

import pytest

pytest.importorskip("scipy")
pytest.importorskip("pyarrow")

from benchmarks.settings.gavel import GavelSetting
from benchmarks.settings.sia import MODELS, POOLS, Model, SiaSetting, Speed, Tables

from qipan.scheduler.policies.contender import Choice, Contender
from qipan.scheduler.policies.fifo import Fifo
from qipan.twin.rounds import Cadence, run_rounds

START_S = MODELS["cifar10"][1]


def sia_setting(*submitted_s: float) -> SiaSetting:
    """Tasks that start for 50 s and then make a hundred epochs of a second each, on one device of any class."""
    epochs, slowdown = MODELS["cifar10"][0], MODELS["cifar10"][3]
    validation = [
        {"batch_size": 128, "iteration": n, "grad_sqr": 1.0, "grad_var": 1.0, "progress": float(n + 1)}
        for n in range(epochs)
    ]
    placed = [{"placement": 1, "local_bsz": 128, "step_time": 1.0 / slowdown, "sync_time": 0.0}]
    tables = Tables(
        {"cifar10": Model("cifar10", validation)},
        {("cifar10", pool): Speed("cifar10", pool, placed, []) for pool in POOLS},
    )
    rows = [
        {"job_id": f"t{n}", "model": "cifar10", "submit_s": at_s, "batch_size": 128}
        for n, at_s in enumerate(submitted_s)
    ]
    return SiaSetting(tables, rows)


def ends_s(cadence: Cadence, policy: object, *submitted_s: float) -> list[float]:
    return [one.ended_s for one in run_rounds(sia_setting(*submitted_s), policy, cadence)]  # type: ignore[arg-type]


def gavel_ends_s(cadence: Cadence) -> list[float]:
    """Two devices, a step a second: tasks of 100, 1,000 and 100 steps, and one of 100 steps that comes at 150 s."""
    rows = [
        {"job_id": f"t{n}", "submit_s": at_s, "num_accelerators": 1, "model": "m", "extra_total_steps": steps}
        for n, (at_s, steps) in enumerate(((0.0, 100), (0.0, 1000), (0.0, 100), (150.0, 100)))
    ]
    setting = GavelSetting({("m", 1): {"a": 1.0}}, rows, {"a": 2})
    return [one.ended_s for one in run_rounds(setting, Fifo(), cadence)]


class Swap:
    """All that are there run on the pool whose turn it is, so each choice moves all that run."""

    def __init__(self) -> None:
        self.found: dict[float, list[str | None]] = {}  # when it was asked -> where each ran

    def choose(self, contenders: Sequence[Contender], capacity: object, now_s: float) -> Choice:
        self.found[now_s] = [one.current for one in contenders]
        pool = sorted(POOLS)[len(self.found) % 2]
        return {one.task_id: f"{pool}:1" for one in contenders}


def test_in_rounds_a_newcomer_waits_for_the_minute_and_at_starts_it_does_not():
    assert ends_s(Cadence.ROUNDS, Fifo(), 30.0) == [60.0 + START_S + 100.0]
    assert ends_s(Cadence.STARTS, Fifo(), 30.0) == [30.0 + START_S + 100.0]


def test_a_minute_in_parts_gives_what_the_whole_minute_gives():
    whole = ends_s(Cadence.ROUNDS, Fifo(), 0.0, 60.0, 120.0)
    parts = ends_s(Cadence.STARTS, Fifo(), 0.0, 60.0, 120.0)
    assert whole == [60.0 + 150.0, 60.0 + 150.0, 120.0 + 150.0]
    assert parts == whole


def test_a_choice_that_moves_somebody_in_the_middle_of_a_minute_is_put_off():
    first, second = (f"{pool}:1" for pool in (sorted(POOLS)[1], sorted(POOLS)[0]))
    found = {}
    for cadence in Cadence:
        policy = Swap()
        run_rounds(sia_setting(0.0, 90.0), policy, cadence)
        found[cadence] = {at_s: policy.found.get(at_s) for at_s in (60.0, 90.0, 120.0)}
    assert found[Cadence.ROUNDS] == {60.0: [None], 90.0: None, 120.0: [first, None]}
    assert found[Cadence.STARTS] == {60.0: [None], 90.0: [first, None], 120.0: [first, None]}
    assert found[Cadence.EVENTS] == {60.0: [None], 90.0: [first, None], 120.0: [second, second]}


def test_what_a_task_measures_is_told_at_the_end_of_the_minute_only():
    """It starts at 60 s and runs from 110 s on: who is asked at 115 s knows no more than at 60 s, and at 120 s that it was measured."""
    setting = sia_setting(0.0, 115.0)
    seen = {}
    while setting.now_s < 120.0:
        now_s = setting.advance(to_event=True)
        seen[now_s] = next(one for one in setting.contenders() if one.task_id == "t0")
        setting.apply({"t0": "aws:1"})
    assert [seen[at_s].measured for at_s in (60.0, 115.0, 120.0)] == [False, False, True]
    assert [seen[at_s].done for at_s in (60.0, 115.0)] == [0.0, 0.0]
    assert seen[120.0].done == pytest.approx(10.0 * 128)


def test_gavels_devices_are_idle_to_the_rounds_end_and_taken_at_once_at_events():
    assert gavel_ends_s(Cadence.ROUNDS) == [100.0, 1000.0, 360.0 + 100.0, 720.0 + 100.0]
    assert gavel_ends_s(Cadence.EVENTS) == [100.0, 1000.0, 200.0, 300.0]
