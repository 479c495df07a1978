"""What boards ask each other about tasks: up, where a task was submitted, and down, where it runs or ran."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Annotated, Any, TypedDict, TypeVar

import msgspec

from qipan.boards import Boards
from qipan.channel.network import NetworkCarrier
from qipan.errors import InvalidInput, Unreachable
from qipan.events import Fact, TaskExited, TaskProgress, TaskStarted, decode, encode
from qipan.hardware import BoardId
from qipan.host import Host
from qipan.intake import Intake
from qipan.leases import Receipt
from qipan.planner import Plan
from qipan.queries import Queries, TaskView
from qipan.stored import facts_of_kind
from qipan.succession import Below
from qipan.tracing import AtBoard, Context, Span
from qipan.workload import Task

log = logging.getLogger("qipan.grid")
Told = TypeVar("Told")


class GridIntake(Intake):
    """At the top as ever; elsewhere the top is told of tasks, which holds the money and offers them here first."""

    def __init__(
        self, boards: Boards, queries: Queries, up: NetworkCarrier | None, must_lead: Callable[[], None]
    ) -> None:
        super().__init__(boards, queries)
        self._up, self._must_lead = up, must_lead

    def take_up(self) -> None:
        if self._up is None:
            super().take_up()

    def submit(
        self, task: Task, key: str | None = None, trace: Context | None = None, entered_at: str = ""
    ) -> tuple[str, Plan]:
        """At the top as ever; elsewhere the parent is told, with the board where it entered, up to the top."""
        if self._up is None:
            self._must_lead()
            return super().submit(task, key, trace, entered_at)
        here = entered_at or str(self._boards.site.root.board)
        asked = [msgspec.json.encode(task), key, msgspec.to_builtins(trace), here]
        task_id, plan = self._up.ask("submit", asked)
        found = msgspec.json.decode(plan, type=Plan)
        with self._boards.lock:
            if self._boards.store.submission(task_id) is None:
                self._boards.store.save_submission(
                    task_id, key, self._boards.clock.now_s(), msgspec.json.encode(task), plan
                )
        return task_id, found

    def cancel(self, task_id: str, by: str) -> None:
        if self._up is None:
            self._must_lead()
            super().cancel(task_id, by)
        else:
            self._up.ask("cancel", [task_id, by])

    def wake(self, task_id: str, by: str) -> str:
        if self._up is None:
            self._must_lead()
            return super().wake(task_id, by)
        return str(self._up.ask("wake", [task_id, by]))

    def raise_budget(self, task_id: str, budget_micro_cny: int, by: str) -> None:
        if self._up is None:
            self._must_lead()
            super().raise_budget(task_id, budget_micro_cny, by)
        else:
            self._up.ask("budget", [task_id, budget_micro_cny, by])


class GridQueries(Queries):
    """Below the top the parent is asked; what only boards below have, they are asked."""

    def __init__(
        self, boards: Boards, up: NetworkCarrier | None, children: Callable[[], Mapping[BoardId, Below]]
    ) -> None:
        super().__init__(boards)
        self._up, self._children = up, children

    def above(self, question: str, task_id: str) -> Any:
        return self._up.ask(question, [task_id]) if self._up is not None else None

    def task(self, task_id: str) -> TaskView:
        if self._up is None:
            return super().task(task_id)
        return msgspec.convert(self._up.ask("view", [task_id]), type=TaskView)

    def tasks(self) -> list[TaskView]:
        return [self.task(task_id) for task_id in self.task_ids()]

    def why(self, task_id: str) -> dict[str, Any]:
        if self._up is not None:
            answer: dict[str, Any] = self._up.ask("why", [task_id])
            return answer
        answer = super().why(task_id)
        for told in self._told_below("why", task_id, read_reasons):
            answer["decisions"] += told
        answer["decisions"].sort(key=lambda entry: entry["at_s"])
        return answer

    def events(self, task_id: str, after: int = 0, most: int | None = None) -> list[dict[str, Any]]:
        if self._up is None:
            return super().events(task_id, after, most)
        found: list[dict[str, Any]] = self._up.ask("events", [task_id, after, most])
        return found

    def news(self, task_id: str) -> tuple[int, int]:
        if self._up is None:
            return super().news(task_id)
        newest, size = self._up.ask("news", [task_id])
        return int(newest), int(size)

    def progress(self, task_id: str) -> list[tuple[float, TaskProgress]]:
        if self._up is None:
            return super().progress(task_id)
        found = [(float(at_s), decode(body)) for at_s, body in self._up.ask("progress", [task_id])]
        return [(at_s, fact) for at_s, fact in found if isinstance(fact, TaskProgress)]

    def exits(self, task_id: str) -> list[TaskExited]:
        if self._up is None:
            return super().exits(task_id)
        found = [decode(body) for body in self._up.ask("exits", [task_id])]
        return [fact for fact in found if isinstance(fact, TaskExited)]

    def trace(self, task_id: str) -> list[Span]:
        if self._up is None:
            return super().trace(task_id)
        return msgspec.convert(self._up.ask("trace", [task_id]), type=list[Span])

    def seen(self, task_id: str) -> list[AtBoard]:
        found = super().seen(task_id)
        for told in self._told_below("seen", task_id, read_seen):
            found += [replace(one, parent=one.parent or self._boards.site.root.board) for one in told]
        return found

    def logs(self, task_id: str, after: int = 0) -> dict[str, Any]:
        if self._up is None:
            return super().logs(task_id, after)
        told: dict[str, Any] = self._up.ask("logs", [task_id, after])
        return told

    def printed(self, task_id: str, first: int, most: int) -> tuple[bytes, int]:
        """Here and then below, child after child."""
        found, size = super().printed(task_id, first, most)
        for child in self._visited(task_id):
            body = [task_id, max(0, first - size), most - len(found)]
            more, of_child = next(iter(self._told_by(child, "logs", body, read_printed)), (b"", 0))
            found, size = (found + more)[:most], size + of_child
        return found, size

    def printed_bytes(self, task_id: str) -> int:
        """Here and below."""
        return super().printed_bytes(task_id) + sum(self._told_below("log_bytes", task_id, read_bytes))

    def bill(self, task_id: str) -> Receipt:
        if self._up is None:
            return super().bill(task_id)
        return msgspec.json.decode(self._up.ask("bill", [task_id]), type=Receipt)

    def charged(self, task_id: str) -> int:
        return super().charged(task_id) if self._up is None else int(self._up.ask("charged", [task_id]))

    def reasons_below(self, task_id: str) -> list[dict[str, Any]]:
        with self._boards.lock:
            told = self._reasons_here([task_id])
        for below in self._told_below("why", task_id, read_reasons):
            told += below
        return told

    def _told_below(self, question: str, task_id: str, read: Callable[[Any], Told]) -> list[Told]:
        """What the children that ran it answer, in order; one that cannot be reached now, or says what cannot be read, is left out."""
        return [
            told for child in self._visited(task_id) for told in self._told_by(child, question, task_id, read)
        ]

    def _told_by(self, child: BoardId, question: str, body: Any, read: Callable[[Any], Told]) -> list[Told]:
        """One answer, or none."""
        try:
            return [read(self._children()[child].carrier.ask(question, body))]
        except Unreachable as error:
            log.info("%s: %s", child, error)
        except (msgspec.MsgspecError, InvalidInput) as error:
            log.warning("%s says nothing readable to %r about %s: %s", child, question, body, error)
        return []

    def _visited(self, task_id: str) -> list[BoardId]:
        """The children that ran it, in order."""
        with self._boards.lock:
            started = facts_of_kind(self._boards.store, [task_id], TaskStarted)
        engines = dict.fromkeys(BoardId(fact.engine) for _, fact in started)
        return [engine for engine in engines if engine in self._children()]


#: board, parent, (when, fact) of each, when it placed the task
SEEN = tuple[str, str, list[tuple[float, bytes]], tuple[float, ...]]


class Reason(TypedDict):
    at_s: float
    board: str
    verdict: str
    text: str
    task_id: str


def read_reasons(told: Any) -> list[dict[str, Any]]:
    return [dict(reason) for reason in msgspec.convert(told, type=list[Reason])]


def read_printed(told: Any) -> tuple[bytes, int]:
    return msgspec.convert(told, type=tuple[bytes, Annotated[int, msgspec.Meta(ge=0)]])


def read_bytes(told: Any) -> int:
    return msgspec.convert(told, type=int)


def read_seen(told: Any) -> list[AtBoard]:
    found = []
    for board, parent, facts, placed_s in msgspec.convert(told, type=list[SEEN]):
        read = [(at_s, decode(body)) for at_s, body in facts]
        kept = tuple((at_s, fact) for at_s, fact in read if isinstance(fact, Fact))
        found.append(AtBoard(board, parent, kept, placed_s))
    return found


def tell(host: Host, question: str, body: Any) -> Any:
    """Questions of a child's people about their tasks."""
    task_id = str(body[0]) if isinstance(body, list) and body else ""
    match question:
        case "view":
            return msgspec.to_builtins(host.queries.task(task_id))
        case "why":
            return host.queries.why(task_id)
        case "trace":
            return msgspec.to_builtins(host.queries.trace(task_id))
        case "beside":
            return host.beside(*body)
        case "news":
            return list(host.queries.news(task_id))
        case "logs":
            return host.queries.logs(task_id, int(body[1]))
        case "events":
            return host.queries.events(task_id, int(body[1]), body[2])
        case "cancel":
            return host.intake.cancel(task_id, str(body[1]))
        case "budget":
            return host.intake.raise_budget(task_id, int(body[1]), str(body[2]))
        case "wake":
            return host.intake.wake(task_id, str(body[1]))
        case "bill":
            return msgspec.json.encode(host.queries.bill(task_id))
        case "charged":
            return host.queries.charged(task_id)
        case "progress":
            return [[at_s, encode(fact)] for at_s, fact in host.queries.progress(task_id)]
        case "exits":
            return [encode(fact) for fact in host.queries.exits(task_id)]
    if question in host.answers:
        return msgspec.to_builtins(host.answers[question](task_id))
    raise InvalidInput(f"{question[:40]!r} is no question to a parent")


def tell_parent(queries: GridQueries, question: str, body: Any) -> Any:
    """Questions of the parent about a task that ran here: what only this side has."""
    if question == "logs":
        return queries.printed(str(body[0]), int(body[1]), int(body[2]))
    task_id = str(body)
    match question:
        case "why":
            return queries.reasons_below(task_id)
        case "log_bytes":
            return queries.printed_bytes(task_id)
        case "seen":
            return [
                [one.board, one.parent, [[at_s, encode(fact)] for at_s, fact in one.facts], one.placed_s]
                for one in queries.seen(task_id)
            ]
    raise InvalidInput(f"{question[:40]!r} is no question to a child")
