"""Budgets: a task parks with its checkpoint before its budget is overrun, and goes on when it is raised."""

import time
from dataclasses import replace
from pathlib import Path

import pytest

from api_site import caller, served
from qipan.curves import Curve
from qipan.engines.simulated import Behaviour
from qipan.events import BudgetRaised, TaskSubmitted
from qipan.hardware import BoardId
from qipan.leases import TaskId
from qipan.scheduler import Phase
from qipan.store import Store
from qipan.twin.check import check_end, check_world
from qipan.twin.world import Happening, build_world, crash
from qipan.views import cost
from worlds import TARIFF, leaf, nation, order

HOUR_CNY = TARIFF  # one device for an hour


def world_of(spec, seed=1, report_s=0.0, stores=None):
    world = build_world(
        spec, seed=seed, behaviour=Behaviour(report_s=report_s),
        make_store=stores.__getitem__ if stores else lambda _: Store(None),
    )  # fmt: skip
    world.after_step.append(check_world)
    return world


def submit(world, task, budget):
    world.tree.root.accept(TaskSubmitted(task, budget, budget))


def charged(world, name="a"):
    rows = world.tree.root.store.postings_about(name)
    return sum(amount for _, account, amount, _ in rows if account.startswith("provider/"))


def raise_to(name, budget):
    return lambda world: world.tree.root.accept(BudgetRaised(TaskId(name), budget, "alice"))


@pytest.mark.parametrize("report_s", [0.0, 20.0])
@pytest.mark.parametrize("spec", [leaf("dc"), nation()])
def test_a_task_parks_before_its_budget_is_overrun_and_ends_once_it_is_raised(spec, report_s):
    world = world_of(spec, report_s=report_s)
    task = order("a", work_s=3000.0, counts=(1,), elastic=False)
    budget = HOUR_CNY * 1000 // 3600  # a thousand seconds of one device
    submit(world, task, budget)
    world.run(20_000.0)
    state = world.tree.root.state.tasks[TaskId("a")]
    assert state.phase is Phase.PARKED
    assert state.saved_s > 850, "it was parked with its work"
    assert 0.9 * budget < charged(world) <= budget
    assert any("budget" in text for _, _, text in world.tree.root.store.reasons_of("a"))
    world.happenings.append(Happening(20_000.0, "raise", raise_to("a", HOUR_CNY)))
    world.run(60_000.0)
    assert world.tree.root.state.over == {TaskId("a"): "done"}
    assert charged(world) < HOUR_CNY
    check_end(world, {TaskId("a")})


def test_a_budget_that_is_too_small_to_begin_parks_again_and_spends_little():
    world = world_of(leaf("dc"))
    submit(world, order("a", work_s=3000.0, counts=(1,), elastic=False), 500)  # 1.8 s of one device
    world.run(5000.0)
    assert world.tree.root.state.tasks[TaskId("a")].phase is Phase.PARKED
    assert charged(world) < 2000


def test_without_a_budget_nothing_is_parked():
    world = world_of(leaf("dc"))
    world.tree.root.accept(TaskSubmitted(order("a", work_s=3000.0, counts=(1,), elastic=False), 500))
    world.run(20_000.0)
    assert world.tree.root.state.over == {TaskId("a"): "done"}


def test_a_cancelled_task_that_is_parked_for_its_budget_gives_its_hold_back():
    from qipan.events import CancelRequested

    world = world_of(leaf("dc"))
    submit(world, order("a", work_s=3000.0, counts=(1,), elastic=False), HOUR_CNY // 10)
    world.run(5000.0)
    world.happenings.append(
        Happening(
            5000.0, "cancel", lambda world: world.tree.root.accept(CancelRequested(TaskId("a"), "alice"))
        )
    )
    world.run(6000.0)
    assert world.tree.root.state.over == {TaskId("a"): "cancelled"}
    check_end(world, {TaskId("a")})


@pytest.mark.parametrize("crash_s", [200.0, 400.0, 5000.0])
def test_a_board_that_dies_still_knows_the_budget(crash_s):
    stores = {BoardId("dc"): Store(None)}
    world = world_of(leaf("dc"), stores=stores)
    budget = HOUR_CNY // 10  # 360 s
    submit(world, order("a", work_s=3000.0, counts=(1,), elastic=False), budget)
    world.happenings.append(Happening(crash_s, "crash", crash(BoardId("dc"))))
    world.run(20_000.0)
    assert world.tree.root.state.tasks[TaskId("a")].phase is Phase.PARKED
    assert charged(world) <= budget


def test_two_tasks_park_each_at_its_own_budget():
    world = world_of(leaf("dc"))
    for name, budget in (("a", HOUR_CNY // 10), ("b", HOUR_CNY // 5)):
        submit(world, replace(order(name, work_s=3000.0, counts=(1,), elastic=False)), budget)
    world.run(20_000.0)
    assert charged(world, "a") <= HOUR_CNY // 10 < charged(world, "b") <= HOUR_CNY // 5
    assert isinstance(order("a").curve, Curve)


def stepped_until(host, true, limit_s=60.0):
    end_s = time.monotonic() + limit_s
    while not true():
        assert time.monotonic() < end_s
        host.step()
        time.sleep(0.05)


@pytest.mark.slow
def test_a_real_process_is_parked_for_its_budget_and_goes_on(tmp_path):
    text = f"kind: train\nname: slow\ntenant: poets\nrun: exec python3 -S {Path('examples/tiny.py').resolve()}\ndevices: 1\n"
    text += 'limits: {time: 3s, max_cost: 0.0015 CNY}\nenv: {TINY_STEPS: "90"}\n'  # 5.4 s of one device
    with served(tmp_path) as host, caller(host) as api:
        assert api.post("/tasks", json={"text": text}).status_code == 201
        stepped_until(host, lambda: host.queries.task("slow-1").state == "parked")
        assert 0 < host.queries.charged("slow-1") <= 1500
        assert host.queries.task("slow-1").saved > 0
        too_little = api.post("/tasks/slow-1/budget", params={"max_cost": "0.001 CNY"})
        assert too_little.status_code == 400
        assert api.post("/tasks/slow-1/budget", params={"max_cost": "1 CNY"}).status_code == 200
        stepped_until(host, lambda: host.queries.task("slow-1").state == "done")
        assert host.queries.bill("slow-1").cost_micro_cny == host.queries.charged("slow-1")
        assert host.balances()["hold/slow-1"] == 0
        assert api.post("/tasks/slow-1/budget", params={"max_cost": "2 CNY"}).status_code == 400
        exits = host.queries.exits("slow-1")
        last = exits[-1]
        longer = replace(last.usage, device_s=last.usage.device_s + 3600)
        host.tree.root.accept(replace(last, usage=longer))  # told again, and otherwise
        host.step()
        assert len(host.queries.exits("slow-1")) == len(exits) + 1
        charged = host.queries.charged("slow-1")
        assert host.queries.bill("slow-1").cost_micro_cny == cost(host, "slow-1").spent_micro_cny == charged
