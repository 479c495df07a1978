"""The routes of tasks: handing them in, looking at them, stopping them, commands beside them; and whose a task is."""

import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Annotated

import msgspec
from fastapi import APIRouter, Depends, Header, Query, Request
from fastapi import Path as InPath
from fastapi.responses import StreamingResponse
from starlette.concurrency import run_in_threadpool

from qipan import money, stored, views
from qipan.api import shapes
from qipan.api.follow import Followed, until
from qipan.api.gate import Caller, Who
from qipan.api.shapes import (
    LIMIT,
    Answer,
    Cursor,
    Limit,
    Submission,
    place_after,
    read_body,
    read_cursor,
    read_submission,
    write_cursor,
)
from qipan.engines.beside import Piece, check_command
from qipan.errors import InvalidInput, NotAllowed, NotFound
from qipan.events import PersonNoted
from qipan.host import Host
from qipan.login import People
from qipan.planner import Plan
from qipan.quantities import parse_money_micro_cny
from qipan.queries import TaskView
from qipan.tracing import context_from
from qipan.workload import Task
from qipan.workload.files import read_text
from qipan.workload.imports import Directive

BODY = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": {
            "type": "object", "required": ["text"], "additionalProperties": False,
            "properties": {
                "text": {"type": "string", "description": "the task file, Qipan's or another tool's"},
                "file": {"type": "string", "default": "task.yaml", "description": "its name, for messages"},
                "workdir": {"type": "string", "default": "", "description": "where its relative paths begin"},
                "key": {"type": ["string", "null"], "default": None, "description": "the same key submits once"},
            },
        }}},
    }
}  # fmt: skip

COMMAND = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": {
            "type": "object", "required": ["command"], "additionalProperties": False,
            "properties": {
                "command": {"type": "array", "items": {"type": "string"}, "description": "its words; no shell is put between"},
                "limit_s": {"type": "number", "default": 600.0, "description": "it is ended after so long"},
            },
        }}},
    }
}  # fmt: skip

ExecName = Annotated[str, InPath(max_length=40)]
TaskName = Annotated[str, InPath(max_length=100)]
After = Annotated[int, Query(ge=0, le=2**53)]
PastFact = Annotated[int, msgspec.Meta(ge=0, le=2**53)]


async def submission_of(request: Request) -> Submission:
    return read_submission(await request.body())


Body = Annotated[Submission, Depends(submission_of)]


def about_tasks(host: Host, people: People) -> APIRouter:
    routes, followed = APIRouter(), Followed(host.queries)

    @routes.get("", response_model=shapes.Tasks)
    def tasks(
        who: Who,
        limit: Limit = LIMIT,
        cursor: Cursor = None,
        state: Annotated[str, Query(max_length=40)] = "",
        newest_first: bool = False,
    ) -> Answer:
        ids = host.queries.task_ids()
        found, after = task_page(host, who, ids[::-1] if newest_first else ids, limit, cursor, state)
        return Answer({"tasks": found, "next": after})

    @routes.post("", status_code=201, response_model=shapes.Submitted, openapi_extra=BODY)
    async def submit(
        who: Who,
        body: Body,
        idempotency_key: Annotated[str | None, Header(max_length=200)] = None,
        traceparent: Annotated[str, Header(max_length=512)] = "",
        tracestate: Annotated[str, Header(max_length=512)] = "",
    ) -> Answer:
        """`traceparent` as W3C Trace Context says: the task's spans belong to that trace."""
        trace = context_from(traceparent, tracestate, time.time(), secrets.token_hex(16))
        task, directives = await run_in_threadpool(own_task, host, who, body)
        key = one_key(who, body.key, idempotency_key)
        task_id, chosen = await run_in_threadpool(host.intake.submit, task, key, trace)
        return Answer({"task_id": task_id, "plan": chosen, "directives": directives}, 201)

    @routes.get("/{task_id}", response_model=TaskView)
    def task(who: Who, task_id: TaskName) -> Answer:
        return Answer(seen(host, who, task_id))

    @routes.get("/{task_id}/plan", response_model=Plan)
    def submitted_plan(who: Who, task_id: TaskName) -> Answer:
        return Answer(stored.submitted_plan(host.store, seen(host, who, task_id).task_id))

    @routes.get("/{task_id}/why", response_model=shapes.Why)
    def why(who: Who, task_id: TaskName) -> Answer:
        return Answer(host.queries.why(seen(host, who, task_id).task_id))

    @routes.get("/{task_id}/logs", response_model=shapes.Logs)
    def logs(who: Who, task_id: TaskName, after: After = 0) -> Answer:
        """A page of what it printed, from byte `after` on."""
        return Answer(host.queries.logs(seen(host, who, task_id).task_id, after))

    @routes.get("/{task_id}/events", response_model=shapes.Events)
    def events(
        who: Who, task_id: TaskName, after: After = 0, limit: Limit = LIMIT, cursor: Cursor = None
    ) -> Answer:
        """Oldest first, after fact `after`, or after the cursor."""
        first = read_cursor(cursor, PastFact) if cursor is not None else after
        found = host.queries.events(seen(host, who, task_id).task_id, first, limit + 1)
        more = write_cursor(found[limit - 1]["fact_id"]) if len(found) > limit else None
        return Answer({"events": found[:limit], "next": more})

    @routes.get("/{task_id}/trace", response_model=shapes.Trace)
    def trace(who: Who, task_id: TaskName) -> Answer:
        """The spans of one trace from the submission to the first step, through every board."""
        return Answer(shapes.Trace(tuple(host.queries.trace(seen(host, who, task_id).task_id))))

    @routes.get("/{task_id}/stream", response_class=StreamingResponse,
                responses={200: {"content": {"text/event-stream": {}}}})  # fmt: skip
    async def stream(
        who: Who, task_id: TaskName, after: After = 0, last_event_id: Annotated[str, Header(max_length=20)] = ""
    ) -> StreamingResponse:  # fmt: skip
        """Server-sent events until the task is over, or the session of who follows it was ended: `fact` (its id can be resumed
        from), `logs`, `task`."""
        name = (await run_in_threadpool(seen, host, who, task_id)).task_id
        first = int(last_event_id) if last_event_id.isascii() and last_event_id.isdigit() else after
        return StreamingResponse(
            until(lambda: people.ended(who.session), followed.follow(name, min(first, 2**53))),
            media_type="text/event-stream", headers={"cache-control": "no-store"},
        )  # fmt: skip

    @routes.post("/{task_id}/cancel", response_model=shapes.Cancelled)
    def cancel(who: Who, task_id: TaskName) -> Answer:
        host.intake.cancel(seen(host, who, task_id).task_id, who.name)
        return Answer({"task_id": task_id})

    @routes.post("/{task_id}/wake", response_model=shapes.Woken)
    def wake(who: Who, task_id: TaskName) -> Answer:
        """A task whose lease is lent because its devices stood idle goes on."""
        state = host.intake.wake(seen(host, who, task_id).task_id, who.name)
        return Answer({"task_id": task_id, "state": state})

    @routes.post("/{task_id}/budget", response_model=shapes.Budget)
    def budget(who: Who, task_id: TaskName, max_cost: Annotated[str, Query(max_length=40)]) -> Answer:
        """A task that was parked because its budget was spent goes on."""
        micro = parse_money_micro_cny(max_cost)
        host.intake.raise_budget(seen(host, who, task_id).task_id, micro, who.name)
        return Answer({"task_id": task_id, "budget_micro_cny": micro})

    @routes.post("/{task_id}/exec", status_code=201, response_model=shapes.Executing, openapi_extra=COMMAND)
    async def execute(request: Request, who: Who, task_id: TaskName) -> Answer:
        """Runs a command beside the task where that runs now: in its environment, folder, sandbox and share of the cores."""
        asked: shapes.Command = read_body(await request.body(), shapes.Command)
        name = await run_in_threadpool(begin_beside, host, who, task_id, asked)
        return Answer(shapes.Executing(name), 201)

    @routes.get("/{task_id}/exec/{exec_id}", response_model=Piece)
    def executed(who: Who, task_id: TaskName, exec_id: ExecName, after: After = 0) -> Answer:
        """What it printed from byte `after` on, and how it ended."""
        return Answer(host.beside(seen(host, who, task_id).task_id, "read", exec_id, [after]))

    @routes.delete("/{task_id}/exec/{exec_id}", response_model=shapes.Executing)
    def end_execution(who: Who, task_id: TaskName, exec_id: ExecName) -> Answer:
        host.beside(seen(host, who, task_id).task_id, "end", exec_id, [])
        return Answer(shapes.Executing(exec_id))

    @routes.get("/{task_id}/bill", response_model=shapes.Bill)
    def bill(who: Who, task_id: TaskName) -> Answer:
        name = seen(host, who, task_id).task_id
        return Answer({"receipt": host.queries.bill(name), "charged_micro_cny": host.queries.charged(name)})

    @routes.get("/{task_id}/bill/explained", response_model=money.Explained)
    def explained(who: Who, task_id: TaskName) -> Answer:
        """The bill against the plan that was shown: parts that sum to the difference."""
        return Answer(money.explained(host, seen(host, who, task_id).task_id))

    @routes.get("/{task_id}/cost", response_model=views.Cost)
    def cost(who: Who, task_id: TaskName) -> Answer:
        return Answer(views.cost(host, seen(host, who, task_id).task_id))

    return routes


def begin_beside(host: Host, who: Caller, task_id: str, asked: shapes.Command) -> str:
    """Who ran what beside which task is noted first."""
    check_command(asked.command, asked.limit_s)
    name = seen(host, who, task_id).task_id
    host.note(PersonNoted("command", who.user, who.tenant, who.role, "", "", name, " ".join(asked.command)[:300]))  # fmt: skip
    return str(host.beside(name, "begin", "", [asked.command, asked.limit_s]))


def seen(host: Host, who: Caller, task_id: str) -> TaskView:
    """The task, when the caller may know of it.  A foreign tenant's is as absent as one that never was."""
    try:
        view = host.queries.task(task_id)
    except NotFound:
        view = None
    if view is None or not who.sees(view.tenant):
        latest, _ = task_page(host, who, host.queries.task_ids()[::-1], 5, None)
        known = ", ".join(other.task_id for other in reversed(latest)) or "none"
        raise NotFound(f"no task {task_id!r}; the latest are: {known}")
    return view


def task_page(
    host: Host, who: Caller, ids: Sequence[str], limit: int, cursor: str | None, state: str = ""
) -> tuple[list[TaskView], str | None]:
    """The first `limit` tasks after the cursor that the caller may see; no more tasks are read than it takes."""
    found: list[TaskView] = []
    for task_id in ids[place_after(ids, cursor) :]:
        view = host.queries.task(task_id)
        if who.sees(view.tenant) and state in ("", view.state):
            if len(found) == limit:
                return found, write_cursor(found[-1].task_id)
            found.append(view)
    return found, None


def own_task(host: Host, who: Caller, body: Submission) -> tuple[Task, list[Directive]]:
    """The submitted task, its tenant taken from the token.  Raises NotAllowed when the file names another's."""
    task, directives = read_text(body.text, body.file, body.workdir)
    if not who.tenant:
        return task, directives
    if task.tenant not in ("", who.tenant):
        raise NotAllowed(
            f"the token is {who.tenant}'s, the task says tenant {task.tenant}; leave `tenant` out"
        )
    return replace(task, tenant=who.tenant), directives


def one_key(who: Caller, in_body: str | None, in_header: str | None) -> str | None:
    """The idempotency key; a tenant's keys are its own.  Raises InvalidInput."""
    given = {key for key in (in_body, in_header) if key is not None}
    if len(given) > 1:
        raise InvalidInput("the body's key and the header Idempotency-Key differ; give one")
    if not given:
        return None
    key = given.pop()
    shapes.check_key(key)
    return f"{who.tenant}/{key}" if who.tenant else key


def visible(host: Host, who: Caller) -> Callable[[str], bool]:
    if not who.tenant:
        return lambda _task_id: True
    own = {view.task_id for view in host.queries.tasks() if who.sees(view.tenant)}
    return own.__contains__
