from hypothesis import given, settings
from hypothesis import strategies as st

from qipan.channel import FaultyCarrier, Link, carrier_pair
from qipan.clock import named_random
from qipan.engines.board import BoardEngine, ParentLink
from qipan.events import Renew, TakeCensus
from qipan.leases import EngineId


@given(st.integers(0, 10_000), st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_messages_arrive_once_and_in_order_over_a_bad_carrier(seed, count):
    left, right = carrier_pair()
    bad = [
        FaultyCarrier(end, named_random(seed, name), 0.3, 0.3, 0.3)
        for end, name in ((left, "l"), (right, "r"))
    ]
    here, there = Link(bad[0], 1), Link(bad[1], 1)
    for i in range(count):
        here.push(str(i).encode())
    arrived = []
    for second in range(2000):
        here.flush(second)
        arrived += [body for _, body in there.receive()]
        there.flush(second)
        here.receive()
        if not here.unacknowledged:
            break
    assert arrived == [str(i).encode() for i in range(count)]


def test_a_restarted_sender_is_heard_from_its_first_unacknowledged_message():
    left, right = carrier_pair()
    here, there = Link(left, 1), Link(right, 1)
    here.push(b"a", 1)
    here.flush(0)
    assert there.receive() == [(1, b"a")]
    again = Link(left, 2)
    again.push(b"b", 2)
    again.flush(1)
    assert there.receive() == [(2, b"b")]


def test_numbers_that_are_left_out_cost_no_wait():
    left, right = carrier_pair()
    here, there = Link(left, 1), Link(right, 1)
    for body, number in ((b"a", 1), (b"b", 1000), (b"c", 1001)):
        here.push(body, number)
    arrived = []
    for _ in range(3):
        here.flush(0.0)
        arrived += there.receive()
        there.flush(0.0)
        here.receive()
    assert arrived == [(1, b"a"), (1000, b"b"), (1001, b"c")]


def test_a_damaged_frame_is_a_lost_frame():
    left, right = carrier_pair()
    left.send(b"\xff\x00 not a frame")
    assert Link(right, 1).receive() == []


def test_a_slow_child_is_dropped_to_a_snapshot_at_the_bound(monkeypatch):
    monkeypatch.setattr("qipan.engines.board.COMMANDS_MAX", 3)
    above, below = carrier_pair()
    engine, child = BoardEngine(EngineId("dc1"), above, 1), ParentLink(below, 1)
    for i in range(5):
        engine.renew(Renew((), 1, float(i)))
        engine.flush(0.0)
    assert engine.started_again(), "its commands are gone: it is asked what it holds"
    assert not engine.started_again()
    engine.census(TakeCensus(2, 0.0))
    engine.flush(1.0)
    received = [found.command for found in child.commands()]
    assert isinstance(received[-1], TakeCensus)
    assert [command.term for command in received[-2:]] == [1, 2]
