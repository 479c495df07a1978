"""What Prometheus reads from a real board: parsed by the library's own parser, named as its conventions say."""

import re
import time

import httpx
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse

from api_site import TINY, TOKEN, caller, served, submit
from qipan.api import tenant_token
from qipan.events import DevicesBusy
from qipan.leases import EngineId, TaskId

#: of a name's end, by the conventions of Prometheus: base units, and totals of counters
UNITS = ("_seconds", "_bytes", "_ratio", "_info", "_balance", "_messages", "_connected", "_leads")
COUNTS = ("qipan_devices", "qipan_tasks", "qipan_attempts_running", "qipan_engines_lost")


def scraped(api: httpx.Client, **query: object) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
    """name -> labels -> value"""
    answer = api.get("http://qipan/metrics", params=query)
    assert answer.status_code == 200, answer.text
    found: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
    for family in parse(answer.text):
        for sample in family.samples:
            found.setdefault(sample.name, {})[tuple(sorted(sample.labels.items()))] = sample.value
    return found


def of(found: dict, name: str, **labels: str) -> float:
    return found[name][tuple(sorted(labels.items()))]


def test_a_board_tells_its_devices_tasks_ticks_and_money(tmp_path):
    with served(tmp_path) as host, caller(host) as api:
        before = scraped(api)
        assert of(before, "qipan_devices", board="dc1", chip_class="sim/a", state="free") == 2
        submit(api, TINY)
        for _ in range(100):
            host.step()
            if host.queries.task("tiny-1").state == "running":
                break
            time.sleep(0.05)
        now = scraped(api)
        where = host.queries.task("tiny-1").place.split("/")[-2]
        chip = {"dc1": "sim/a", "dc2": "sim/b"}[where]
        assert of(now, "qipan_devices", board=where, chip_class=chip, state="busy") == 1
        assert of(now, "qipan_devices_busy_ratio", board=where, chip_class=chip) in (0.5, 1.0)
        assert of(now, "qipan_tasks", board="cn", state="running") == 1
        host.tree.controllers[where].accept(
            DevicesBusy(TaskId("tiny-1"), EngineId(f"{where}-local"), 1, 0.25, 0.0, 1.0)
        )
        host.step()
        assert of(scraped(api), "qipan_devices_worked_ratio", board=where) == 0.25
        assert of(now, "qipan_attempts_running", board=where) == 1
        assert of(now, "qipan_task_wait_seconds_count") == 1
        for board in ("cn", "east", where):
            assert of(now, "qipan_facts_total", board=board) > of(before, "qipan_facts_total", board=board)
            assert of(now, "qipan_tick_duration_seconds_count", board=board) > 0
            assert of(now, "qipan_store_bytes", board=board) > 0
        assert of(now, "qipan_ledger_balance", account_type="tenant", currency="CNY") <= 1000
        assert sum(now["qipan_ledger_balance"].values()) == pytest.approx(0.0, abs=1e-6)
        host.intake.cancel("tiny-1", "test")
        for _ in range(200):
            host.step()
            if host.queries.task("tiny-1").state == "cancelled":
                break
            time.sleep(0.05)
        over = scraped(api)
        assert ("board", where) not in [
            label for labels in over.get("qipan_devices_worked_ratio", {}) for label in labels
        ]
        assert of(over, "qipan_tasks", board="cn", state="cancelled") == 1
        assert of(over, "qipan_devices", board=where, chip_class=chip, state="busy") == 0
        assert of(over, "qipan_attempts_ended_total", outcome="cancelled") == 1


def test_names_labels_and_both_forms_are_as_prometheus_wants_them(tmp_path):
    with served(tmp_path) as host, caller(host) as api:
        plain = api.get("http://qipan/metrics")
        assert plain.headers["content-type"].startswith("text/plain; version=")
        families = list(parse(plain.text))
        for family in families:
            assert re.fullmatch(r"qipan_[a-z_]+", family.name)
            assert family.documentation.endswith(".")
            if family.type == "counter":
                assert all(sample.name.endswith(("_total", "_created")) for sample in family.samples)
            elif not family.name.endswith("_created"):
                assert family.name.endswith(UNITS) or family.name in COUNTS, family.name
            for sample in family.samples:
                assert set(sample.labels) <= {"board", "chip_class", "state", "peer", "direction", "account_type", "currency", "le", "outcome", "version"}  # fmt: skip
        openly = api.get(
            "http://qipan/metrics", headers={"accept": "application/openmetrics-text; version=1.0.0"}
        )
        assert openly.headers["content-type"].startswith("application/openmetrics-text")
        assert {family.name for family in parse_openmetrics(openly.text)} >= {"qipan_devices", "qipan_facts"}


def test_tenants_are_labels_only_when_asked_for_and_metrics_are_not_a_tenants(tmp_path):
    with served(tmp_path) as host, caller(host) as api:
        assert "poets" not in api.get("http://qipan/metrics").text
        assert (
            of(scraped(api, by_tenant=True), "qipan_tenant_balance", tenant="poets", currency="CNY") == 1000
        )
        with caller(host, tenant_token(TOKEN, "poets")) as poets:
            assert poets.get("http://qipan/metrics").status_code == 403
        with caller(host, "guess") as stranger:
            assert stranger.get("http://qipan/metrics").status_code == 401
