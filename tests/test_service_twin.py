"""Services in the twin: scenario files, storms with faults, and what lending is worth."""

from dataclasses import replace

import pytest

from qipan.clock import named_random
from qipan.errors import InvalidInput
from qipan.forecast import MONDAY_S, Forecast
from qipan.leases import TaskId
from qipan.twin import arrivals
from qipan.twin.scenario import run_scenario, why_in_scenario
from qipan.twin.services import Service, replicas_of, service_row
from test_scenario import scenario
from test_twin import check_done, stormy_world
from worlds import FAST, SLOW, TARIFF

pytestmark = pytest.mark.computes

SERVICES = "  tasks: 12\n  services: [{name: chat, chips: [sim/b], forecast: {every: 2h, replicas: {0h: 2, 30m: 8, 1h: 3}, start: 1m, notice: 2m}}]\n"


def test_a_scenario_with_a_service_tells_what_stood_in_time_and_what_was_lent(tmp_path):
    path = scenario(tmp_path, SERVICES)
    lent, held = run_scenario(path, 1), run_scenario(path, 1, lends=False)
    [row] = lent["services"]
    assert row["served_share"] > 0.98
    assert lent["figures"]["service_hours_served"] == row["served_share"]
    assert row["device_hours_lent"] > 10
    assert held["services"][0]["device_hours_lent"] == 0
    assert lent["figures"]["tasks"] == lent["figures"]["done"] == 12, (
        "a service is none of the tasks that are counted"
    )
    told = why_in_scenario(path, 1, None, "chat.r5", 5400.0)
    assert (told["state"], told["waiting"][0]["constraint"]) == ("lent", "forecast")
    assert told["waiting"][0]["text"] == "lent until 02:27: the forecast asks for replica 5 at 02:30"


def test_a_wrong_service_of_a_scenario_is_answered(tmp_path):
    with pytest.raises(InvalidInput, match="no pool has sim/z"):
        run_scenario(scenario(tmp_path, SERVICES.replace("[sim/b]", "[sim/z]")), 1)


def run_tidal_storm(seed: int) -> None:
    """Forty tasks and two services on three levels, with lost messages, a crash and kills."""
    try:
        rng = named_random(seed, "tides")
        world, submitted = stormy_world(seed)
        orders = []
        for name, chip, most in (("chat", FAST, 3), ("code", SLOW, 2)):
            steps = ((0.0, rng.randint(0, most)), (40.0, most), (100.0, rng.randint(0, most)))
            service = Service(name, (chip,), 1, Forecast(150.0, steps, 8.0, 2.0, MONDAY_S))
            orders += replicas_of(service, TARIFF, rng.uniform(300, 900), lends=True)
        orders = [replace(order, submitted_s=rng.uniform(0, 50)) for order in orders]
        world.services = {order.task_id: order.hours for order in orders if order.hours is not None}
        world.happenings += arrivals(orders)
        world.run(until_s=50_000)
        check_done(world, submitted | {order.task_id for order in orders})
    except BaseException as error:
        error.add_note(f"seed {seed}: repeat with `pytest tests/test_service_twin.py -k 'storm and {seed}'`")
        raise


@pytest.mark.parametrize("seed", range(3))
def test_tidal_storm(seed):
    run_tidal_storm(seed)


@pytest.mark.endurance
@pytest.mark.timeout(3000)
def test_tidal_storms_by_the_hundred():
    for seed in range(1000, 1300):
        run_tidal_storm(seed)


def test_what_stood_in_time_is_counted_from_the_planned_start_within_what_is_asked():
    service = Service("chat", (FAST,), 1, Forecast(100.0, ((0.0, 0), (50.0, 1)), 5.0, 5.0, MONDAY_S))
    late = [("dc", TaskId("chat.r1"), 1, FAST, 1, 60.0, 200.0)]
    row = service_row(service, late, 100.0)
    assert row["served_share"] == 0.7, "asked for from 50 to 100, up from 65"
    assert row["device_hours_held"] == round(40 / 3600, 2)
