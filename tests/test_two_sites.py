"""One task over two data centres with unlike chips in one of them, under the real boards: its parts start together, a
site dies and comes back, one receipt has both sites' shares."""

import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qipan.cli.tables import print_submitted
from qipan.engines.probing import probe_tree
from qipan.errors import Infeasible, InvalidInput
from qipan.hardware import Probe
from qipan.host import Host
from qipan.planner.sites import plan_sites, rounds_of
from qipan.planning import plan_on
from qipan.rounds import Rules
from qipan.strategy import Outer
from qipan.workload import Limits
from qipan.workload.parse import load_task, parse_task
from qipan.workload.site import load_site

EXAMPLES = Path(__file__).parent.parent / "examples"


def measured(board, **speeds: float):
    """As if probed."""
    pools = tuple(
        replace(
            pool,
            probe=Probe(speeds[pool.chip_class.split("/")[1].replace("-", "")], 3.0, 1e9, 1e-4, 0.05, 0.0),
        )
        for pool in board.pools
    )
    return replace(board, pools=pools, children=tuple(measured(child, **speeds) for child in board.children))


def plan(task=None, **changes):
    task = replace(task or load_task(EXAMPLES / "two-sites.yaml"), **changes)
    site = load_site(EXAMPLES / "sites" / "two-sites.yaml")
    root = measured(site.root, yan1=2e9, tai3=1e9, heng2=1e9)
    return plan_sites(task, "t-1", root, site.links, "h:1", {"shanghai": "h:2", "ningxia": "h:3"})


def test_a_submission_names_every_site_and_what_they_cost_together(capsys):
    one = {
        "place": "a",
        "devices": 1,
        "chip_class": "sim/a",
        "finish_p50_s": 30.0,
        "cost_p50_micro_cny": 1_000_000,
    }
    other = {**one, "place": "b", "devices": 2, "finish_p50_s": 40.0}
    plan = {"options": [one, other], "meetings": {"text": "2 sites meet"}}
    print_submitted({"task_id": "t-1", "directives": [], "plan": plan}, Path("two"))
    said = capsys.readouterr().out.splitlines()[0]
    assert "planned at a on 1 x sim/a, b on 2 x sim/a, about 40s, 2.00 CNY" in said
    assert said.endswith("follow it with: qipan logs -f t-1 --store two")


def test_rows_go_to_sites_and_ranks_by_measured_speed():
    made = plan()
    by_site = {site.id: site.stages[0].rows_per_dp for site in made.strategy.sites}
    assert by_site == {"shanghai": (8, 4), "ningxia": (4,)}
    assert list(made.parts) == ["t-1.shanghai.sim-yan-1", "t-1.shanghai.sim-tai-3", "t-1.ningxia.sim-heng-2"]
    yan, tai, heng = (part.part for part in made.parts.values())
    assert (yan.node_rank, tai.node_rank, yan.nodes, heng.nodes) == (0, 1, 2, 1)
    assert yan.gang == tuple(made.parts)
    assert heng.link_bytes_per_s == 25e6


@given(st.integers(1, 40), st.integers(0, 12), st.integers(0, 500))
def test_rounds_are_planned_as_the_coordinator_makes_them(every, ramp, steps):
    rules, done, made = Rules(every, ramp=ramp, batch_tokens=7), 0, []
    while done < steps:
        made.append(min(rules.every_after(done * 7), steps - done))
        done += made[-1]
    planned = rounds_of(Outer(every, ramp=ramp), steps)
    assert [length for length, count in planned for _ in range(count)] == made


def test_a_plan_says_what_sites_exchange_and_what_that_costs_them():
    site = load_site(EXAMPLES / "sites" / "two-sites.yaml")
    site = replace(site, root=measured(site.root, yan1=2e9, tai3=1e9, heng2=1e9))
    task = replace(load_task(EXAMPLES / "two-sites.yaml"), limits=Limits())
    slow = tuple(replace(link, bytes_per_s=link.bytes_per_s / 1000) for link in site.links)

    def planned(links=site.links, **changes):
        return plan_on(replace(site, links=links), replace(task, sites=replace(task.sites, **changes)))

    quick, lean, late = planned(), planned(moments=False), planned(links=slow)
    assert quick.meetings.sent_bytes == pytest.approx(3 * lean.meetings.sent_bytes, abs=2)
    assert lean.meetings.sent_bytes == pytest.approx(planned(codec="fp32").meetings.sent_bytes / 12, rel=0.01)
    assert planned(fragments=4).meetings.sent_bytes == pytest.approx(quick.meetings.sent_bytes / 4, abs=2)
    assert "differences and Adam's moments, int8" in quick.meetings.text
    assert late.meetings.exchange_s > 10 * late.meetings.inner_s
    assert late.meetings.use_share < 0.5 < quick.meetings.use_share
    longer = late.options[0].finish_p50_s - quick.options[0].finish_p50_s
    assert longer == pytest.approx(late.meetings.extra_s - quick.meetings.extra_s)
    assert planned(links=()).meetings is None, "no link is stated"


@pytest.mark.parametrize("limit", ["deadline", "max_cost"])
def test_what_sites_exchange_counts_against_the_limits_of_a_task(limit):
    site = load_site(EXAMPLES / "sites" / "two-sites.yaml")
    site = replace(site, root=measured(site.root, yan1=2e9, tai3=1e9, heng2=1e9))
    slow = tuple(replace(link, bytes_per_s=link.bytes_per_s / 1000) for link in site.links)
    task = load_task(EXAMPLES / "two-sites.yaml")
    alone = plan_on(replace(site, links=()), task).options
    enough = {
        "deadline": ("deadline_s", 1.5 * max(option.finish_p50_s for option in alone)),
        "max_cost": ("max_cost_micro_cny", 2 * sum(option.cost_p50_micro_cny for option in alone)),
    }
    task = replace(task, limits=Limits(**dict([enough[limit]])))
    assert plan_on(site, task).meetings is not None
    with pytest.raises(Infeasible, match=f"with what its sites exchange it .* limits.{limit} is"):
        plan_on(replace(site, links=slow), task)


def test_chips_that_are_not_there_are_refused_by_name():
    text = (EXAMPLES / "two-sites.yaml").read_text()
    with pytest.raises(Infeasible, match=r"shanghai has 1 device of sim/yan-1, sites.parts wants 3"):
        plan(parse_task(text.replace("sim/yan-1: 1", "sim/yan-1: 3")))
    with pytest.raises(Infeasible, match=r"names 'beijing'; the sites here are shanghai, ningxia"):
        plan(parse_task(text.replace("at: ningxia", "at: beijing")))
    with pytest.raises(InvalidInput, match="two or more sites, each once"):
        parse_task(text.replace("at: ningxia", "at: shanghai"))


def test_the_site_file_says_where_other_hosts_reach_the_coordinator(tmp_path):
    text = (EXAMPLES / "sites" / "two-sites.yaml").read_text()
    (tmp_path / "site.yaml").write_text(text.replace("  lease: 60s", "  lease: 60s\n  address: 127.0.0.2"))
    host = Host(load_site(tmp_path / "site.yaml"), tmp_path / "store")
    try:
        assert host.intake.coordinator.server().address.startswith("127.0.0.2:")
        assert host.intake.coordinator.key("a") != host.intake.coordinator.key("b")
        assert (tmp_path / "store" / "rounds.key").stat().st_mode & 0o77 == 0
        host.intake.coordinator.server().open("over-1", Rules(1))
        host.sweep()
        assert host.intake.coordinator.server().tasks() == [], "no part of it is live"
    finally:
        host.close()


@pytest.mark.slow
def test_one_task_over_two_sites_with_unlike_chips_survives_the_loss_of_one(tmp_path):
    site = load_site(EXAMPLES / "sites" / "two-sites.yaml")
    site = replace(
        site, root=probe_tree(site.root, tmp_path / "probes.json", time.time(), lambda _text: None)
    )
    task = load_task(EXAMPLES / "two-sites.yaml")
    task = replace(task, work=replace(task.work, tokens=80_000))
    host = Host(site, tmp_path / "store")

    def until(condition, limit_s: float = 240.0) -> None:
        ends_s = time.monotonic() + limit_s
        while not condition():
            assert time.monotonic() < ends_s, (
                host.queries.tasks(),
                host.queries.logs(task_id)["text"][-2000:],
            )
            host.step()
            time.sleep(0.05)

    def rounds(part: str) -> int:
        found = (tmp_path / "store" / "engines").glob(f"*/attempts/{part}-*/events.jsonl")
        return sum(path.read_text().count('"event": "round"') for path in found)

    try:
        task_id, made = host.intake.submit(task)
        assert [option.place for option in made.options] == ["shanghai", "shanghai", "ningxia"]
        lost = f"{task_id}.ningxia.sim-heng-2"
        until(lambda: rounds(lost) >= 1)
        host.sweep()
        assert host.intake.coordinator.server().tasks() == [task_id]
        [(_, attempt)] = [found for found in host.engines["ningxia"].running() if found[0] == lost]
        os.kill(int((attempt / "rank-0").read_text()), signal.SIGKILL)
        until(lambda: host.queries.task(lost).attempt == 2 and rounds(lost) >= 2)
        until(lambda: host.queries.task(task_id).state == "done")
        receipt = host.queries.bill(task_id)
    finally:
        host.close()
    shares = {(line.usage.board, line.usage.chip_class, line.usage.attempt) for line in receipt.lines}
    assert shares == {
        ("shanghai", "sim/yan-1", 1), ("shanghai", "sim/tai-3", 1), ("ningxia", "sim/heng-2", 1), ("ningxia", "sim/heng-2", 2),
    }  # fmt: skip
    assert receipt.cost_micro_cny == sum(line.cost_micro_cny for line in receipt.lines)
    assert receipt.outcome == "done"
