"""The protocol between boards, searched whole at small size over the real decision code."""

from dataclasses import replace

import pytest

from qipan.twin.protocol import MODEL, search

pytestmark = pytest.mark.computes


def test_no_cut_and_no_crash_come_to_an_end():
    found = search(cuts=0, crashes=0)
    assert found.violation == ""
    assert found.states > 20


def test_every_way_of_one_cut_is_without_a_violation():
    found = search(crashes=0)
    assert found.violation == "", "\n".join(found.path)
    assert found.states > 5_000


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_way_of_one_cut_and_one_crash_is_without_a_violation():
    """Three boards, two tasks: some hundred thousand states, in half a minute of CPU."""
    found = search()
    assert found.violation == "", "\n".join(found.path)
    assert found.states > 100_000


def test_a_seeded_mistake_in_the_lease_margin_is_found():
    """A parent that places anew two units before the lease is over."""
    found = search(replace(MODEL, margin_s=-2.0), crashes=0)
    assert "runs at both engines" in found.violation
    assert any("cut" in step for step in found.path)


def test_the_margin_is_beyond_what_the_search_needs():
    """A renewal counts from the moment the holder asked, so a parent's count is late even without a margin; the margin is
    for clocks that run unlike each other, which the model has not."""
    assert search(replace(MODEL, margin_s=0.0), crashes=0).violation == ""
