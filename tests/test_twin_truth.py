"""The twin is true: the same scenario in the twin and under `qipan up` with real processes."""

import pytest
from benchmarks.twin_truth import both


def assert_agree(folder, minutes: float, *, trained: bool = False) -> None:
    twin, live = both(folder, minutes, seed=7, trained=trained)
    told = [verdict for verdicts in live.verdicts.values() for verdict in verdicts]
    assert {"shrunk", "grown", "lost"} <= set(told), "the scenario did what it is for"
    print(
        f"makespan {twin.makespan_s:.1f} s in the twin, {live.makespan_s:.1f} s live;"
        f" mean JCT {twin.mean_jct_s:.1f} s and {live.mean_jct_s:.1f} s"
    )
    assert twin.makespan_s == pytest.approx(live.makespan_s, rel=0.15)
    assert twin.mean_jct_s == pytest.approx(live.mean_jct_s, rel=0.15)


@pytest.mark.slow
def test_a_live_scenario_and_its_twin_agree_within_15_percent(tmp_path):
    assert_agree(tmp_path, 0.75)


@pytest.mark.endurance
@pytest.mark.timeout(3000)
def test_twenty_minutes_live_with_models_that_train_and_their_twin_agree_within_15_percent(tmp_path):
    assert_agree(tmp_path, 20, trained=True)
