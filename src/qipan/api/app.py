"""The routes.  Each answers what its shape says; every refusal is a problem (`problem.py`)."""

import socket
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import uvicorn
from fastapi import APIRouter, Depends, FastAPI, Header, Query, Request
from fastapi import Path as InPath
from fastapi.responses import StreamingResponse
from starlette.concurrency import run_in_threadpool

from qipan import __version__, money, views
from qipan.api import shapes
from qipan.api.follow import Followed
from qipan.api.gate import CALLER, Caller, Gate, Rate, tenant_token
from qipan.api.problem import KINDS, Problem, describe_problems, handle_errors, name_of
from qipan.api.shapes import Answer, Submission, page, read_cursor, read_submission, write_cursor
from qipan.catalogue import site_catalogue
from qipan.errors import InvalidInput, NotAllowed, NotFound
from qipan.host import Host, TaskView
from qipan.journal.exchange import Placed
from qipan.ledger.auditor import Audit
from qipan.market import Bid
from qipan.outbound import URL_CHARACTERS_MAX
from qipan.outcomes import WhatIf
from qipan.planner import Plan
from qipan.quantities import parse_money_micro_cny
from qipan.statements import Statement
from qipan.webhooks import Webhooks
from qipan.workload import Task
from qipan.workload.files import read_text
from qipan.workload.imports import Directive

LIMIT, LIMIT_MAX = 200, 1000
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": Problem} for status in (400, 401, 402, 403, 404, 413, 422, 429, 500)
}
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

TaskName = Annotated[str, InPath(max_length=100)]
Limit = Annotated[int, Query(ge=1, le=LIMIT_MAX)]
Cursor = Annotated[str | None, Query(max_length=300)]
Product = Annotated[str, Query(max_length=200)]
After = Annotated[int, Query(ge=0, le=2**53)]


def caller_of(request: Request) -> Caller:
    found: Caller = request.scope[CALLER]
    return found


async def submission_of(request: Request) -> Submission:
    return read_submission(await request.body())


Who = Annotated[Caller, Depends(caller_of)]
Body = Annotated[Submission, Depends(submission_of)]


def make_app(host: Host, token: str, rate: Rate | None = None) -> FastAPI:
    api = FastAPI(
        title="Qipan", version=__version__, docs_url=None, redoc_url=None, openapi_url="/v1/openapi.json",
        description="Tasks, boards, prices and money. Errors are problem details whose `code` is the command line's exit code.",
    )  # fmt: skip
    handle_errors(api)
    api.include_router(about_tasks(host), prefix="/v1/tasks", tags=["tasks"], responses=ERRORS)
    api.include_router(about_supply(host), prefix="/v1", tags=["supply"], responses=ERRORS)
    api.include_router(about_money(host, token), prefix="/v1", tags=["money"], responses=ERRORS)
    api.include_router(about_webhooks(host), prefix="/v1/webhooks", tags=["webhooks"], responses=ERRORS)
    api.include_router(about_market(host), prefix="/v1/market", tags=["market"], responses=ERRORS)
    api.add_middleware(Gate, token=token, rate=rate or Rate())
    plain = api.openapi

    def openapi() -> dict[str, Any]:
        if api.openapi_schema is None:
            describe_problems(plain())
        assert api.openapi_schema is not None
        return api.openapi_schema

    api.openapi = openapi  # type: ignore[method-assign]
    return api


def about_tasks(host: Host) -> APIRouter:
    routes, followed = APIRouter(), Followed(host)

    @routes.get("", response_model=shapes.Tasks)
    def tasks(
        who: Who,
        limit: Limit = LIMIT,
        cursor: Cursor = None,
        state: Annotated[str, Query(max_length=40)] = "",
        newest_first: bool = False,
    ) -> Answer:
        ids = host.task_ids()
        found, after = task_page(host, who, ids[::-1] if newest_first else ids, limit, cursor, state)
        return Answer({"tasks": found, "next": after})

    @routes.post("", status_code=201, response_model=shapes.Submitted, openapi_extra=BODY)
    async def submit(
        who: Who, body: Body, idempotency_key: Annotated[str | None, Header(max_length=200)] = None
    ) -> Answer:
        task, directives = await run_in_threadpool(own_task, host, who, body)
        key = one_key(who, body.key, idempotency_key)
        task_id, chosen = await run_in_threadpool(host.submit, task, key)
        return Answer({"task_id": task_id, "plan": chosen, "directives": directives}, 201)

    @routes.get("/{task_id}", response_model=TaskView)
    def task(who: Who, task_id: TaskName) -> Answer:
        return Answer(seen(host, who, task_id))

    @routes.get("/{task_id}/plan", response_model=Plan)
    def submitted_plan(who: Who, task_id: TaskName) -> Answer:
        return Answer(host.submitted_plan(seen(host, who, task_id).task_id))

    @routes.get("/{task_id}/why", response_model=shapes.Why)
    def why(who: Who, task_id: TaskName) -> Answer:
        return Answer(host.why(seen(host, who, task_id).task_id))

    @routes.get("/{task_id}/logs", response_model=shapes.Logs)
    def logs(who: Who, task_id: TaskName, after: After = 0) -> Answer:
        return Answer(host.logs(seen(host, who, task_id).task_id, after))

    @routes.get("/{task_id}/events", response_model=shapes.Events)
    def events(who: Who, task_id: TaskName, after: After = 0) -> Answer:
        return Answer({"events": host.events(seen(host, who, task_id).task_id, after)})

    @routes.get("/{task_id}/stream", response_class=StreamingResponse,
                responses={200: {"content": {"text/event-stream": {}}}})  # fmt: skip
    async def stream(
        who: Who, task_id: TaskName, after: After = 0, last_event_id: Annotated[str, Header(max_length=20)] = ""
    ) -> StreamingResponse:  # fmt: skip
        """Server-sent events until the task is over: `fact` (its id can be resumed from), `logs`, `task`."""
        name = (await run_in_threadpool(seen, host, who, task_id)).task_id
        first = int(last_event_id) if last_event_id.isascii() and last_event_id.isdigit() else after
        return StreamingResponse(
            followed.follow(name, min(first, 2**53)), media_type="text/event-stream", headers={"cache-control": "no-store"}
        )  # fmt: skip

    @routes.post("/{task_id}/cancel", response_model=shapes.Cancelled)
    def cancel(who: Who, task_id: TaskName) -> Answer:
        host.cancel(seen(host, who, task_id).task_id, who.tenant or "the user")
        return Answer({"task_id": task_id})

    @routes.post("/{task_id}/budget", response_model=shapes.Budget)
    def budget(who: Who, task_id: TaskName, max_cost: Annotated[str, Query(max_length=40)]) -> Answer:
        """A task that was parked because its budget was spent goes on."""
        micro = parse_money_micro_cny(max_cost)
        host.raise_budget(seen(host, who, task_id).task_id, micro, who.tenant or "the user")
        return Answer({"task_id": task_id, "budget_micro_cny": micro})

    @routes.get("/{task_id}/bill", response_model=shapes.Bill)
    def bill(who: Who, task_id: TaskName) -> Answer:
        name = seen(host, who, task_id).task_id
        return Answer({"receipt": host.bill(name), "charged_micro_cny": host.charged(name)})

    @routes.get("/{task_id}/bill/explained", response_model=money.Explained)
    def explained(who: Who, task_id: TaskName) -> Answer:
        """The bill against the plan that was shown: parts that sum to the difference."""
        return Answer(money.explained(host, seen(host, who, task_id).task_id))

    @routes.get("/{task_id}/cost", response_model=views.Cost)
    def cost(who: Who, task_id: TaskName) -> Answer:
        return Answer(views.cost(host, seen(host, who, task_id).task_id))

    return routes


def about_supply(host: Host) -> APIRouter:
    routes, useful, asked = APIRouter(), views.Useful(host), views.AskedTwin(host)

    @routes.get("/health", response_model=shapes.Health)
    async def health() -> Answer:
        return Answer({"status": "ok", "board": host.site.root.board})

    @routes.post("/plan", response_model=Plan, openapi_extra=BODY)
    async def plan(who: Who, body: Body) -> Answer:
        task, _ = await run_in_threadpool(own_task, host, who, body)
        return Answer(await run_in_threadpool(host.plan, task))

    @routes.get("/boards", response_model=shapes.Boards)
    def boards(who: Who) -> Answer:
        return Answer({"boards": views.boards(host, who.sees, useful), "links": views.links(host)})

    @routes.get("/prices", response_model=shapes.Prices)
    def prices() -> Answer:
        return Answer({"prices": views.prices(host), "tariff_version": host.site.tariff_version})

    @routes.get("/chips", response_model=shapes.Chips)
    def chips(limit: Limit = LIMIT, cursor: Cursor = None) -> Answer:
        found, after = page(chip_views(), "chip_class", limit, cursor)
        return Answer({"chips": found, "next": after})

    @routes.get("/decisions", response_model=shapes.Decisions)
    def decisions(who: Who, limit: Limit = LIMIT, cursor: Cursor = None) -> Answer:
        """Newest first.  A page may hold fewer than `limit`: other tenants' decisions are left out."""
        before = read_cursor(cursor, views.After) if cursor is not None else None
        found, after = views.decisions(host, limit, before, visible(host, who))
        return Answer({"decisions": found, "next": write_cursor(after) if after else None})

    @routes.get("/whatif", response_model=WhatIf)
    def whatif(who: Who, policy: Annotated[str, Query(max_length=40)] = "rigid") -> Answer:
        """What was submitted, tried again on the twin under another policy, beside the same under the one as it was.
        For the operator: it is about everyone's tasks."""
        if who.tenant:
            raise NotAllowed(f"the token is {who.tenant}'s; a what-if is about everyone's tasks")
        return Answer(asked.ask(policy))

    @routes.get("/problems/{name}", response_model=shapes.ProblemKind)
    def problem_kind(name: Annotated[str, InPath(max_length=40)]) -> Answer:
        for kind, (status, meaning) in KINDS.items():
            if name_of(kind) == name:
                return Answer(shapes.ProblemKind(name, kind.exit_code, status, meaning))
        raise NotFound(f"no kind of problem {name!r}; there are: {', '.join(map(name_of, KINDS))}")

    return routes


def about_money(host: Host, token: str) -> APIRouter:
    routes = APIRouter()

    @routes.get("/ledger", response_model=shapes.Ledger)
    def ledger(who: Who) -> Answer:
        """A tenant sees its own account; the sum is always of all accounts."""
        shown = {
            account: balance
            for account, balance in host.balances().items()
            if not who.tenant or account == f"tenant/{who.tenant}"
        }
        return Answer({"balances_micro_cny": shown, "sum_micro_cny": host.ledger_sum()})

    @routes.get("/ledger/accounts", response_model=shapes.Accounts)
    def accounts(who: Who) -> Answer:
        """A tenant sees its own."""
        found = money.accounts(host, f"tenant/{who.tenant}" if who.tenant else "")
        return Answer(
            {"accounts": [one for one in found if not who.tenant or one.account == f"tenant/{who.tenant}"]}
        )

    @routes.get("/ledger/statement", response_model=Statement)
    def statement(
        who: Who, account: Annotated[str, Query(max_length=200)],
        from_s: Annotated[float, Query(ge=0, le=1e11)] = 0.0,
        until_s: Annotated[float, Query(ge=0, le=1e11)] = 1e11,
        currency: Annotated[str, Query(max_length=3)] = "CNY",
    ) -> Answer:  # fmt: skip
        """Of an account, or of `region/NAME`: all providers there.  A tenant sees its own."""
        if who.tenant and account != f"tenant/{who.tenant}":
            raise NotFound(f"no account {account[:80]!r}; `qipan ledger accounts` shows them")
        return Answer(money.statement(host, account, currency, from_s, until_s))

    @routes.get("/ledger/check", response_model=Audit)
    def check(who: Who) -> Answer:
        """Everything recomputed from the entries; for the operator, since problems name accounts."""
        if who.tenant:
            raise NotAllowed(f"the token is {who.tenant}'s; the whole ledger is checked by the operator")
        return Answer(money.check(host))

    @routes.get("/bills", response_model=shapes.Bills)
    def bills(who: Who, limit: Limit = LIMIT, cursor: Cursor = None) -> Answer:
        """Newest first."""
        found, after = task_page(host, who, host.task_ids()[::-1], limit, cursor)
        return Answer({"bills": [views.bill(host, view.task_id) for view in found], "next": after})

    @routes.get("/people", response_model=shapes.People)
    def people(who: Who) -> Answer:
        """The tenants that the caller may know of, with their money and tasks."""
        found = [shapes.Person(*row) for row in views.people(host) if who.sees(str(row[0]))]
        return Answer(shapes.People(tuple(found), who.tenant))

    @routes.post("/people/{tenant}/key", response_model=shapes.Key)
    def key(who: Who, tenant: Annotated[str, InPath(max_length=100)]) -> Answer:
        """The token of a tenant: for the operator only."""
        if who.tenant:
            raise NotAllowed(f"the token is {who.tenant}'s; keys are given out by the operator")
        if tenant not in {known.name for known in host.site.tenants}:
            raise NotFound(f"no tenant {tenant[:60]!r}; the site file names them")
        return Answer(shapes.Key(tenant, tenant_token(token, tenant)))

    return routes


def about_market(host: Host) -> APIRouter:
    routes = APIRouter()

    @routes.get("/auctions", response_model=shapes.Auctions)
    def auctions(limit: Limit = LIMIT) -> Answer:
        """The latest slots first."""
        with host.lock:
            return Answer({"auctions": host.exchange.auctions(limit)})

    @routes.get("/book", response_model=dict[str, Any])
    def book(product: Product) -> Answer:
        """A published book with its seed and clearing, as `qipan market verify` reads it; sealed before it is cleared."""
        with host.lock:
            return Answer(host.exchange.book(product))

    @routes.get("/orders", response_model=shapes.Orders)
    def orders(who: Who, limit: Limit = LIMIT) -> Answer:
        """The caller's own; the operator's are everyone's."""
        with host.lock:
            return Answer({"orders": host.exchange.orders(who.tenant, limit)})

    @routes.post("/orders", status_code=201, response_model=Placed)
    def place(
        who: Who, product: Product, side: Literal["buy", "sell"],
        order_id: Annotated[str, Query(max_length=100)],
        devices: Annotated[int, Query(ge=1, le=10**9)],
        limit: Annotated[str, Query(max_length=40, description="at most, or at least, a device-hour: `1.5 CNY`")],
        trader: Annotated[str, Query(max_length=100, description="for the operator: a tenant that buys, a board that sells")] = "",
    ) -> Answer:  # fmt: skip
        """A tenant buys for itself; the operator also sells for a board.  The same order again changes nothing."""
        if who.tenant and (side == "sell" or trader not in ("", who.tenant)):
            raise NotAllowed(f"the token is {who.tenant}'s; it buys for itself only")
        name = who.tenant or trader
        if side == "buy" and name not in {tenant.name for tenant in host.site.tenants}:
            raise NotFound(f"no tenant {name[:60]!r}; the site file names them")
        return Answer(host.place_order(product, Bid(order_id, side, devices, parse_money_micro_cny(limit)), name), 201)  # fmt: skip

    return routes


def about_webhooks(host: Host) -> APIRouter:
    routes, hooks = APIRouter(), Webhooks(host)

    @routes.get("", response_model=shapes.Hooks)
    def listed(who: Who) -> Answer:
        """The caller's own, without their secrets; the operator's are everyone's."""
        return Answer({"webhooks": hooks.listed(who.tenant)})

    @routes.post("", status_code=201, response_model=shapes.NewHook)
    def add(
        who: Who,
        url: Annotated[str, Query(max_length=URL_CHARACTERS_MAX)],
        kinds: Annotated[str, Query(max_length=200, description="kinds of facts, by comma")] = "",
        allow_private: bool = False,
    ) -> Answer:
        """Facts from now on, of the caller's tasks.  Addresses inside the network are for the operator to allow."""
        if who.tenant and allow_private:
            raise NotAllowed(
                f"the token is {who.tenant}'s; addresses inside the network are allowed by the operator"
            )
        asked = tuple(kind.strip() for kind in kinds.split(",") if kind.strip())
        hook, secret = hooks.add(who.tenant, url, asked, allow_private)
        return Answer({"webhook": hook, "secret": secret}, 201)

    @routes.delete("/{hook_id}", response_model=shapes.Removed)
    def remove(who: Who, hook_id: Annotated[str, InPath(max_length=40)]) -> Answer:
        hooks.remove(who.tenant, hook_id)
        return Answer({"hook_id": hook_id})

    return routes


def seen(host: Host, who: Caller, task_id: str) -> TaskView:
    """The task, when the caller may know of it.  A foreign tenant's is as absent as one that never was."""
    try:
        view = host.task(task_id)
    except NotFound:
        view = None
    if view is None or not who.sees(view.tenant):
        latest, _ = task_page(host, who, host.task_ids()[::-1], 5, None)
        known = ", ".join(other.task_id for other in reversed(latest)) or "none"
        raise NotFound(f"no task {task_id!r}; the latest are: {known}")
    return view


def task_page(
    host: Host, who: Caller, ids: Sequence[str], limit: int, cursor: str | None, state: str = ""
) -> tuple[list[TaskView], str | None]:
    """The first `limit` tasks after the cursor that the caller may see; no more tasks are read than it takes."""
    start = 0
    if cursor is not None:
        last = read_cursor(cursor, str)
        if last not in ids:
            raise InvalidInput(f"cursor {cursor[:80]!r} names nothing in this list; begin without one")
        start = ids.index(last) + 1
    found: list[TaskView] = []
    for task_id in ids[start:]:
        view = host.task(task_id)
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
    own = {view.task_id for view in host.tasks() if who.sees(view.tenant)}
    return own.__contains__


@cache
def chip_views() -> list[shapes.ChipView]:
    return [
        shapes.ChipView(
            chip.chip_class, chip.vendor, chip.model, chip.kind, chip.stack, chip.memory_bytes.value,
            chip.memory_bytes_per_s.value, {name: peak.value for name, peak in chip.peak_flops_per_s.items()},
            chip.devices_per_node, chip.memory_bytes.confidence,
        )
        for _, chip in sorted(site_catalogue().chips.items())
    ]  # fmt: skip


class Server:
    """Serves a host on `path` in a thread of its own."""

    def __init__(self, host: Host, path: Path, token: str) -> None:
        path.unlink(missing_ok=True)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.bind(str(path))
        path.chmod(0o600)
        self._socket.listen(2048)  # from now on a caller waits instead of being refused
        config = uvicorn.Config(
            make_app(host, token), log_level="warning", lifespan="off", timeout_graceful_shutdown=2
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, args=([self._socket],), daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(5)
        self._socket.close()
