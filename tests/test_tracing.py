"""Spans of a task from the facts of its boards, where what the task itself wrote is wrong."""

import json

import pytest

from qipan.events import TaskProgress, TaskStarted
from qipan.hardware import ChipClassId
from qipan.leases import EngineId, LeaseId, TaskId, Usage
from qipan.tracing import AtBoard, Context, Span, otlp, spans_of

TASK, ENGINE = TaskId("poems-1"), EngineId("local")


def spans_when_it_wrote(*details: str) -> list[Span]:
    usage = Usage(TASK, 1, "dc1", ENGINE, ChipClassId("sim/yan-1"), 1, "p", 101.0, 110.0, 9.0, False)
    started = TaskStarted(TASK, LeaseId("l"), ENGINE, 1, 1, "p", (), "local")
    told = [(102.0, TaskProgress(TASK, ENGINE, 1, 0.0, 0.0, detail, usage)) for detail in details]
    seen = AtBoard("dc1", "", ((100.0, started), *told), ())
    return spans_of(TASK, Context("a" * 32, 99.0), [seen])


@pytest.mark.parametrize("at_s", ["Infinity", "-Infinity", "NaN", "1e12", "-1", "1" + "0" * 400, '"now"'])
def test_a_time_that_is_none_is_not_in_the_trace(at_s):
    spans = spans_when_it_wrote(
        f'{{"event": "ready", "at_s": {at_s}}}',
        f'{{"event": "first_step", "at_s": {at_s}, "step": 1}}',
        f'{{"event": "first_step", "at_s": 103.0, "step": 1, "step_s": {at_s}}}',
    )
    json.dumps(otlp(spans, "1"), allow_nan=False)
    assert {span.end_s for span in spans if span.name in ("submit to first step", "first step")} == {103.0}
    assert "trainer start" not in {span.name for span in spans}


def test_a_number_of_a_step_that_otlp_cannot_hold_is_no_step():
    spans = spans_when_it_wrote(f'{{"event": "first_step", "at_s": 103.0, "step": {2**63}}}')
    assert "first step" not in {span.name for span in spans}
