"""One trace of a task, from its submission to its first step: spans built from the facts that its boards stored, so that
nothing is measured twice and nothing is kept beside.  Pure.

The context travels as W3C Trace Context says: headers `traceparent` and `tracestate` of the submission, then, in the order, the
variables TRACEPARENT and TRACESTATE that the task itself sees, so that its own spans hang below its attempt."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from qipan.events import (
    CommandReceived,
    Fact,
    LeaseGranted,
    LeaseRefused,
    Reserve,
    Start,
    TaskExited,
    TaskProgress,
    TaskStarted,
    TaskSubmitted,
)

TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})")
OWN = re.compile(r"c([0-9]{1,12}(?:\.[0-9]{1,9})?);p([0-9a-f]{16})?")
HEADER_CHARACTERS_MAX = 512
SAMPLED = "01"
Kind = Literal["internal", "server", "client", "producer", "consumer"]
NANOSECONDS_MAX = 2**63  # OTLP writes times as 64 bits
KINDS: dict[Kind, int] = {"internal": 1, "server": 2, "client": 3, "producer": 4, "consumer": 5}


@dataclass(frozen=True, slots=True)
class Context:
    """Of one submission.  `span_id`: the caller's own span; `began_s`: when `qipan submit` began, below whose span it hangs then
    (`above_id`); None: another client, whose span is not ours.  `received_s`: when the API heard of it."""

    trace_id: str
    received_s: float
    span_id: str = ""
    flags: str = SAMPLED
    began_s: float | None = None
    above_id: str = ""

    def environment(self) -> dict[str, str]:
        """As the order carries it; `context_in` reads it."""
        began = f"c{self.began_s:.6f};p{self.above_id}" if self.began_s is not None else ""
        return {
            "TRACEPARENT": f"00-{self.trace_id}-{self.span_id or id_of(self.trace_id, 'root')}-{self.flags}",
            "TRACESTATE": f"qipan=r{self.received_s:.6f};h{1 if self.span_id else 0};{began}",
        }


def context_from(traceparent: str, tracestate: str, now_s: float, chance: str) -> Context:
    """Of the headers of a submission; what is not well formed is as if it were not there (W3C Trace Context, 3.2).  `chance`: 32
    hexadecimal digits for a new trace."""
    found = TRACEPARENT.fullmatch(traceparent.strip()) if len(traceparent) < HEADER_CHARACTERS_MAX else None
    if found is None or found[1] == "ff" or set(found[2]) == {"0"} or set(found[3]) == {"0"}:
        return Context(chance, now_s)
    own = OWN.fullmatch(_member(tracestate))
    began_s = float(own[1]) if own is not None else None
    if began_s is not None and not now_s - 3600 < began_s < now_s + 3600:
        began_s = None  # a clock that is an hour off tells nothing
    above = (own[2] or "") if own is not None else ""
    return Context(found[2], now_s, found[3], found[4], began_s, above)


def headers_of(trace_id: str, span_id: str, began_s: float, above_id: str = "") -> dict[str, str]:
    """Of a submission by `qipan` itself."""
    return {
        "traceparent": f"00-{trace_id}-{span_id}-{SAMPLED}",
        "tracestate": f"qipan=c{began_s:.6f};p{above_id}",
    }


def context_in(environment: dict[str, str]) -> Context | None:
    found = TRACEPARENT.fullmatch(environment.get("TRACEPARENT", ""))
    own = re.fullmatch(r"r([0-9.]+);h([01]);(.*)", _member(environment.get("TRACESTATE", "")))
    if found is None or own is None:
        return None
    told = OWN.fullmatch(own[3])
    return Context(
        found[2], float(own[1]), found[3] if own[2] == "1" else "", found[4],
        float(told[1]) if told is not None else None, (told[2] or "") if told is not None else "",
    )  # fmt: skip


def environment_of_attempt(environment: dict[str, str], task_id: str, attempt: int) -> dict[str, str]:
    """What the task sees: its spans hang below its attempt."""
    found = TRACEPARENT.fullmatch(environment.get("TRACEPARENT", ""))
    if found is None:
        return environment
    own = attempt_id(found[2], task_id, attempt)
    return {**environment, "TRACEPARENT": f"00-{found[2]}-{own}-{found[4]}"}


def _member(tracestate: str) -> str:
    """Our own part of the list."""
    for member in tracestate[:HEADER_CHARACTERS_MAX].split(","):
        key, _, value = member.strip().partition("=")
        if key == "qipan":
            return value
    return ""


def id_of(trace_id: str, *what: object) -> str:
    """The same span has the same id whoever builds it."""
    text = "/".join(map(str, (trace_id, *what)))
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def attempt_id(trace_id: str, task_id: str, attempt: int) -> str:
    return id_of(trace_id, task_id, "attempt", attempt)


# ---- spans -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Span:
    """`service` and `instance`: which program of which board or host.  Times are Unix seconds by the clock of that host."""

    trace_id: str
    span_id: str
    parent_id: str
    name: str
    kind: Kind
    service: str
    instance: str
    start_s: float
    end_s: float
    attributes: dict[str, str | int | float]
    error: str = ""


@dataclass(frozen=True, slots=True)
class AtBoard:
    """What one board stored about a task: (Unix time of the tick, fact), and when it placed the task, as its reasons say.
    `parent` "": the top one."""

    board: str
    parent: str
    facts: tuple[tuple[float, Fact], ...]
    placed_s: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class _Visit:
    """The task at one board from one arrival on."""

    seen: AtBoard
    arrived_s: float
    generation: int  # of the Reserve by which it came; 0: submitted here
    facts: tuple[tuple[float, Fact], ...]


def spans_of(task_id: str, context: Context, boards: Sequence[AtBoard]) -> list[Span]:
    """In order of their beginning; one trace with one root.  A board's clock that differs from another's shows as it is: a span
    of nothing where an answer seems to come before its question."""
    tops = [seen for seen in boards if not seen.parent and seen.facts]
    if not tops:
        return []
    made = _Made(context, task_id, list(boards))
    made.build(tops[0])
    return sorted(made.spans, key=lambda span: (span.start_s, -span.end_s, span.span_id))


def joined(traces: Sequence[Sequence[Span]]) -> list[Span]:
    """Those of a task's parts as one: what all share spans all."""
    found: dict[str, Span] = {}
    for span in (span for spans in traces for span in spans):
        other = found.get(span.span_id, span)
        found[span.span_id] = replace(span, start_s=min(span.start_s, other.start_s), end_s=max(span.end_s, other.end_s))  # fmt: skip
    return sorted(found.values(), key=lambda span: (span.start_s, -span.end_s, span.span_id))


class _Made:
    def __init__(self, context: Context, task_id: str, boards: list[AtBoard]) -> None:
        self.context, self.task_id, self.boards = context, task_id, boards
        self.spans: list[Span] = []
        self.above = context.above_id if context.began_s is not None else context.span_id
        self.first_step_s: float | None = None

    def build(self, top: AtBoard) -> None:
        visit = self._visits(top)[0]
        root = id_of(self.context.trace_id, "root")
        began_s = self.context.began_s if self.context.began_s is not None else self.context.received_s
        server_parent = root
        if self.context.began_s is not None:
            server_parent = self.context.span_id
            self._add(
                server_parent, root, "qipan submit", "client", "qipan-cli", "", began_s, visit.arrived_s
            )
        api = id_of(self.context.trace_id, "api")
        self._add(api, server_parent, "POST /v1/tasks", "server", "qipan-board", top.board, self.context.received_s, visit.arrived_s)  # fmt: skip
        self._visit(visit, root)
        last_s = max((span.end_s for span in self.spans), default=began_s)
        end_s = self.first_step_s if self.first_step_s is not None else last_s
        told: dict[str, str | int | float] = {
            "qipan.task_id": self.task_id,
            "qipan.first_step": int(self.first_step_s is not None),
        }
        self._add(root, self.above, "submit to first step", "internal", "qipan-board", top.board, began_s, end_s, told)  # fmt: skip

    def _visit(self, visit: _Visit, parent_id: str) -> float:
        """The task at one board and below; returns when it ended there."""
        own, board = self._id(visit.seen.board, "visit", visit.generation), visit.seen.board
        inside: list[float] = [visit.arrived_s]
        asked_s, granted_s = visit.arrived_s, visit.arrived_s
        for at_s, fact in visit.facts:
            match fact:
                case LeaseGranted() | LeaseRefused():
                    placed = [one for one in visit.seen.placed_s if asked_s <= one <= at_s]
                    sent_s = placed[0] if placed else asked_s
                    if sent_s > asked_s:
                        self._add(self._id(board, "wait", fact.generation), own, "wait for devices", "internal", "qipan-board", board, asked_s, sent_s)  # fmt: skip
                    inside.append(self._reserve(visit, own, fact, sent_s, at_s))
                    asked_s = granted_s = at_s
                case CommandReceived(Start()):
                    granted_s = at_s
                case TaskStarted():
                    inside.append(self._started(visit, own, fact, granted_s, at_s))
                case _:
                    continue
        end_s = max(inside)
        self._add(own, parent_id, f"task at {board}", "consumer" if visit.generation else "internal", "qipan-board", board, visit.arrived_s, end_s)  # fmt: skip
        return end_s

    def _reserve(self, visit: _Visit, own: str, fact: LeaseGranted | LeaseRefused, sent_s: float, at_s: float) -> float:  # fmt: skip
        board, mark = visit.seen.board, self._id(visit.seen.board, "reserve", fact.generation)
        why = fact.why if isinstance(fact, LeaseRefused) else ""
        told: dict[str, str | int | float] = {"qipan.engine": fact.engine, "qipan.generation": fact.generation}  # fmt: skip
        self._add(mark, own, f"reserve at {fact.engine}", "client", "qipan-board", board, sent_s, at_s, told, why)  # fmt: skip
        below = self._below(visit.seen.board, str(fact.engine), fact.generation)
        if below is None:
            return at_s
        self._add(self._id(board, "down", fact.generation), mark, f"channel {board} to {fact.engine}", "producer", "qipan-channel", board, sent_s, below.arrived_s)  # fmt: skip
        answered = [time_s for time_s, one in below.facts if isinstance(one, LeaseGranted | LeaseRefused)]
        if answered:
            self._add(self._id(board, "up", fact.generation), mark, f"channel {fact.engine} to {board}", "producer", "qipan-channel", str(fact.engine), answered[0], at_s)  # fmt: skip
        return max(at_s, self._visit(below, own))

    def _started(self, visit: _Visit, own: str, fact: TaskStarted, from_s: float, at_s: float) -> float:
        leaf = not any(seen.board == fact.engine for seen in self.boards)
        board = visit.seen.board
        mark = attempt_id(self.context.trace_id, self.task_id, fact.attempt) if leaf else self._id(board, "start", fact.attempt)  # fmt: skip
        told: dict[str, str | int | float] = {"qipan.attempt": fact.attempt, "qipan.place": fact.place, "qipan.point": fact.point_id}  # fmt: skip
        if not leaf:
            self._add(mark, own, f"start at {fact.engine}", "client", "qipan-board", board, from_s, at_s, told)  # fmt: skip
            return at_s
        end_s = max(at_s, self._inside(visit, mark, fact, from_s, at_s))
        self._add(mark, own, f"attempt {fact.attempt}", "internal", "qipan-board", board, from_s, end_s, told)
        return end_s

    def _inside(self, visit: _Visit, attempt: str, fact: TaskStarted, from_s: float, at_s: float) -> float:
        """What the supervisor and the trainer tell of one attempt; returns when its first step was done."""
        board, end_s, launched = visit.seen.board, at_s, False
        for _, one in visit.facts:
            if isinstance(one, TaskExited) and one.attempt == fact.attempt and not launched:
                launched = True
                self._launch(attempt, board, from_s, one.usage.started_s)
                end_s = max(end_s, one.usage.started_s)
            if not isinstance(one, TaskProgress) or one.attempt != fact.attempt:
                continue
            if not launched:
                launched = True
                self._launch(attempt, board, from_s, one.usage.started_s)
            said = one.said()
            said_s = _seconds(said.get("at_s"))
            if said_s is None:
                continue
            if said.get("event") == "ready":
                self._add(self._id(board, "ready", fact.attempt), attempt, "trainer start", "internal", "qipan-trainer", board, one.usage.started_s, said_s)  # fmt: skip
                end_s = max(end_s, said_s)
            step = said.get("step")
            if said.get("event") in ("first_step", "progress") and isinstance(step, int) and 0 < step < 2**63:
                took_s = min(_seconds(said.get("step_s")) or 0.0, said_s)
                self._add(self._id(board, "step", fact.attempt), attempt, "first step", "internal", "qipan-trainer", board, said_s - took_s, said_s, {"qipan.step": step})  # fmt: skip
                self.first_step_s = said_s if self.first_step_s is None else self.first_step_s
                return max(end_s, said_s)
        return end_s

    def _launch(self, attempt: str, board: str, from_s: float, began_s: float) -> None:
        self._add(self._id(attempt, "launch"), attempt, "supervisor start", "internal", "qipan-shim", board, from_s, began_s)  # fmt: skip

    def _below(self, board: str, engine: str, generation: int) -> _Visit | None:
        for seen in self.boards:
            if seen.board == engine and seen.parent == board:
                return next((one for one in self._visits(seen) if one.generation == generation), None)
        return None

    def _visits(self, seen: AtBoard) -> list[_Visit]:
        starts: list[tuple[int, float, int]] = []
        for number, (at_s, fact) in enumerate(seen.facts):
            if isinstance(fact, TaskSubmitted):
                starts.append((number, at_s, 0))
            elif isinstance(fact, CommandReceived) and isinstance(fact.command, Reserve):
                starts.append((number, at_s, fact.command.generation))
        if not starts:  # the beginning was forgotten
            return [_Visit(seen, seen.facts[0][0], 0, seen.facts)] if seen.facts else []
        ends = [number for number, _, _ in starts[1:]] + [len(seen.facts)]
        return [
            _Visit(seen, at_s, generation, seen.facts[number:end])
            for (number, at_s, generation), end in zip(starts, ends, strict=True)
        ]

    def _id(self, *what: object) -> str:
        return id_of(self.context.trace_id, self.task_id, *what)

    def _add(
        self, span_id: str, parent_id: str, name: str, kind: Kind, service: str, instance: str, start_s: float, end_s: float,
        attributes: dict[str, str | int | float] | None = None, error: str = "",
    ) -> None:  # fmt: skip
        told = attributes or {}
        self.spans.append(
            Span(self.context.trace_id, span_id, parent_id, name, kind, service, instance, start_s, max(start_s, end_s), told, error)
        )  # fmt: skip


def _seconds(value: object) -> float | None:
    """What a task says of a time; None for what OTLP's 64 bits of nanoseconds cannot hold (JSON here knows Infinity and NaN)."""
    return float(value) if isinstance(value, int | float) and 0 <= value < NANOSECONDS_MAX / 1e9 else None


# ---- OTLP ------------------------------------------------------------------------------------------------------------------


def otlp(spans: Sequence[Span], version: str) -> dict[str, Any]:
    """The body of `POST /v1/traces` (OTLP/HTTP, JSON: ids in hexadecimal, 64-bit numbers as text)."""
    services = sorted({(span.service, span.instance) for span in spans})
    return {"resourceSpans": [
        {
            "resource": {"attributes": [_attribute("service.name", service), _attribute("service.instance.id", instance), _attribute("service.version", version)]},
            "scopeSpans": [{"scope": {"name": "qipan", "version": version}, "spans": [
                _otlp_span(span) for span in spans if (span.service, span.instance) == (service, instance)
            ]}],
        }
        for service, instance in services
    ]}  # fmt: skip


def _otlp_span(span: Span) -> dict[str, Any]:
    made = {
        "traceId": span.trace_id, "spanId": span.span_id, "name": span.name, "kind": KINDS[span.kind],
        "startTimeUnixNano": str(round(span.start_s * 1e9)), "endTimeUnixNano": str(round(span.end_s * 1e9)),
        "attributes": [_attribute(key, value) for key, value in sorted(span.attributes.items())],
        "status": {"code": 2, "message": span.error} if span.error else {},
    }  # fmt: skip
    return {**made, "parentSpanId": span.parent_id} if span.parent_id else made


def _attribute(key: str, value: str | int | float) -> dict[str, Any]:
    if isinstance(value, int):
        return {"key": key, "value": {"intValue": str(value)}}
    return {"key": key, "value": {"doubleValue": value} if isinstance(value, float) else {"stringValue": value}}  # fmt: skip
