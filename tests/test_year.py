import pytest
from benchmarks.year import year

pytestmark = pytest.mark.computes


@pytest.mark.slow
def test_a_few_days_of_eight_hubs_are_accounted_for_to_the_last_micro_yuan(tmp_path):
    figures, rows = year(tmp_path, days=10, tasks=3000, seed=7)
    found = {figure.name: figure.value for figure in figures}
    assert (found["ledger_problems"], found["unaccounted_micro_cny"]) == (0, 0)
    assert found["year_tasks"] > 2500
    assert rows[-1]["sold_not_delivered"] > 0, "a provider left, and others failed"
    assert rows[-1]["disputes"] >= 0
    shared = sum(row.get("shared_cny", 0) for row in rows)
    assert shared != 0


@pytest.mark.endurance
def test_a_year_of_a_million_tasks_is_accounted_for(tmp_path):
    figures, _ = year(tmp_path, days=365, tasks=1_050_000, seed=1)
    found = {figure.name: figure.value for figure in figures}
    assert (found["ledger_problems"], found["unaccounted_micro_cny"]) == (0, 0)
    assert found["year_tasks"] >= 1_000_000
