"""The system's clock under a wall clock that jumps."""

import time

from qipan.clock import SystemClock


def test_time_goes_on_when_the_wall_clock_was_set_back():
    """Timers are set by it: a clock that stood still for ten minutes would stop a board for so long."""
    jump_s = 0.0
    clock = SystemClock(0.0, lambda: time.time() + jump_s)
    before_s = clock.now_s()
    jump_s = -600.0
    began_s, first_s = time.monotonic(), clock.now_s()
    assert first_s >= before_s
    time.sleep(0.05)
    went_s, asked_s = clock.now_s() - first_s, time.monotonic() - began_s
    assert 0.03 < went_s <= asked_s, "it goes on, a tenth slower"


def test_a_store_that_has_seen_a_later_time_is_not_gone_behind():
    clock = SystemClock(time.time() + 600.0)
    assert clock.now_s() > time.time() + 500.0
