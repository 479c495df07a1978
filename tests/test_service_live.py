"""A service under real boards and processes: its replicas come and go by a forecast of seconds, and a training borrows."""

import re
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from qipan.errors import InvalidInput
from qipan.host import Host
from qipan.workload.parse import load_task, parse_task
from qipan.workload.reader import read_yaml
from qipan.workload.site import load_site, parse_site
from test_staged_task import kill, until

pytestmark = pytest.mark.timeout(180)
ROOT = Path(__file__).parent.parent
SITE = """
lease: 30s
board: {name: cn, children: [{name: east, children: [{name: dc1, region: cn-east, pools: [{chip: sim/a, devices: 3, tariff: 1 CNY}]}]}]}
tenants: [{name: poets, balance: 1000 CNY}]
"""
SERVICE = """
kind: serve
name: tides
run: exec PYTHON -S service.py
limits: {max_cost: 5 CNY, time: 1h}
forecast: {every: 24s, replicas: {0s: 1, 12s: 2}, notice: 4s, start: 1s}
"""
TRAINING = """
kind: train
name: borrower
run: exec PYTHON -S paced.py
devices: {min: 1, max: 2}
elastic: true
limits: {time: 300s}
env: {PACED_S: "300", PACED_MOST: "2", PACED_SAVE_S: "2.0"}
"""


def replaced(text: str) -> str:
    return text.replace("PYTHON", sys.executable)


def answer(host: Host, replica: str) -> str:
    found = re.findall(r"serves at (\S+)", host.queries.logs(replica)["text"])
    with urllib.request.urlopen(found[-1], timeout=5) as page:
        return page.read().decode()


@pytest.mark.slow
def test_a_service_grows_and_shrinks_by_its_forecast_and_a_training_has_its_devices_meanwhile(tmp_path):
    host = Host(parse_site(read_yaml(SITE, "site")), tmp_path)
    service = parse_task(replaced(SERVICE), "s.yaml", str(ROOT / "examples"))
    training = parse_task(replaced(TRAINING), "t.yaml", str(ROOT / "benchmarks"))
    try:
        service_id, plan = host.intake.submit(service)
        assert plan.options[0].devices == 2
        first, second = host.queries.parts(service_id)
        training_id, _ = host.intake.submit(training)
        until(host, service_id, lambda: host.queries.task(first).state == "running")
        asked_s = stood_s = 0.0
        held: dict[int, set[int]] = {}
        began_s = before_s = time.time()
        forecast = service.forecast
        while time.time() < began_s + 60:
            host.step()
            time.sleep(0.05)
            now_s = time.time()
            asked = forecast.asked_at(now_s)
            up = sum(host.queries.task(name).state == "running" for name in (first, second))
            if now_s > began_s + 24:  # the first period is that of the training's start, too
                asked_s += (now_s - before_s) * asked
                stood_s += (now_s - before_s) * min(up, asked)
            held.setdefault(up, set()).add(host.queries.task(training_id).devices)
            before_s = now_s
        assert "replica 1 of" in answer(host, first)
        told = host.queries.why(service_id)
        texts = [entry["text"] for entry in told["decisions"]]
        assert any(
            re.match(r"lent until \d\d:\d\d:?\d*: the forecast asks for replica 2 at", text) for text in texts
        ), texts
        assert any(
            "the forecast asks for replica 2 at" in text and "devices from now on" in text for text in texts
        )
        exits = [one["fact"] for one in host.queries.events(service_id) if one["kind"] == "task_exited"]
        assert any(fact["why"].startswith("lent until") for fact in exits), exits
        verdicts = {entry["verdict"] for entry in host.queries.why(training_id)["decisions"]}
        print(
            f"stood {stood_s / asked_s:.3f} of the asked time; the training held {held} by replicas up; {sorted(verdicts)}"
        )
        assert stood_s / asked_s > 0.9
        assert 2 in held[1], "the training has what the second replica does not need"
        assert 1 in held[2]
        assert {"grown", "shrunk"} <= verdicts
        assert host.queries.task(service_id).waiting.startswith(("1 replicas run", "2 replicas run"))
        with pytest.raises(InvalidInput):
            host.intake.wake(service_id, "poets")
        host.intake.cancel(service_id, "poets")
        until(host, service_id, lambda: host.queries.task(service_id).state == "cancelled")
        receipt = host.queries.bill(service_id)
        assert {line.usage.task_id for line in receipt.lines} == {first, second}
        assert receipt.cost_micro_cny == host.queries.charged(service_id)
    finally:
        host.park(10)
        host.close()


@pytest.mark.slow
def test_the_example_serves_and_a_replica_that_ends_by_itself_is_started_again(tmp_path):
    host = Host(load_site(ROOT / "tests" / "tiny_site.yaml"), tmp_path)
    try:
        service_id, _ = host.intake.submit(load_task(ROOT / "examples" / "service.yaml"))
        first = host.queries.parts(service_id)[0]
        until(host, service_id, lambda: "serves at" in host.queries.logs(first)["text"])
        assert answer(host, first) == f"replica 1 of {service_id}\n"
        kill(host, first)
        until(
            host,
            service_id,
            lambda: host.queries.task(first).attempt == 2 and host.queries.task(first).state == "running",
        )
    finally:
        host.park(10)
        host.close()
