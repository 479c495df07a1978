"""The routes.  Each answers what its shape says; every refusal is a problem (`problem.py`)."""

from functools import cache
from typing import Annotated, Any, Literal

from fastapi import APIRouter, FastAPI, Header, Query
from fastapi import Path as InPath
from fastapi.responses import Response
from starlette.concurrency import run_in_threadpool

from qipan import __version__, money, views
from qipan.api import shapes
from qipan.api.gate import Gate, Rate, Who, tenant_token
from qipan.api.login import REFRESHES, TRIES, about_login, about_users
from qipan.api.problem import KINDS, Problem, describe_problems, handle_errors, name_of
from qipan.api.shapes import LIMIT, Answer, Cursor, Limit, page, read_cursor, write_cursor
from qipan.api.tasks import BODY, Body, about_tasks, own_task, task_page, visible
from qipan.catalogue import site_catalogue
from qipan.errors import NotAllowed, NotFound
from qipan.host import Host
from qipan.journal.exchange import Placed
from qipan.ledger.auditor import Audit
from qipan.login import People, Signer
from qipan.market import Bid
from qipan.metrics import Metrics
from qipan.outbound import URL_CHARACTERS_MAX
from qipan.outcomes import WhatIf
from qipan.planner import Plan
from qipan.quantities import parse_money_micro_cny
from qipan.statements import Statement
from qipan.webhooks import Webhooks

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": Problem} for status in (400, 401, 402, 403, 404, 413, 422, 429, 500)
}
Product = Annotated[str, Query(max_length=200)]


def make_app(
    host: Host,
    token: str,
    rate: Rate | None = None,
    people: People | None = None,
    metrics: Metrics | None = None,
) -> FastAPI:
    people = people or People(host, Signer(host.folder / "login.key", host.audience))
    api = FastAPI(
        title="Qipan", version=__version__, docs_url=None, redoc_url=None, openapi_url="/v1/openapi.json",
        redirect_slashes=False,  # a redirect's answer is no problem document
        description="Tasks, boards, prices and money. Errors are problem details whose `code` is the command line's exit code.",
    )  # fmt: skip
    handle_errors(api)
    tries = Rate(*TRIES)
    api.include_router(about_tasks(host, people), prefix="/v1/tasks", tags=["tasks"], responses=ERRORS)
    api.include_router(about_supply(host), prefix="/v1", tags=["supply"], responses=ERRORS)
    api.include_router(about_money(host, token), prefix="/v1", tags=["money"], responses=ERRORS)
    api.include_router(about_webhooks(host), prefix="/v1/webhooks", tags=["webhooks"], responses=ERRORS)
    api.include_router(about_market(host), prefix="/v1/market", tags=["market"], responses=ERRORS)
    api.include_router(
        about_login(people, tries, Rate(*REFRESHES)), prefix="/v1", tags=["login"], responses=ERRORS
    )
    api.include_router(about_users(people, tries), prefix="/v1", tags=["login"], responses=ERRORS)
    api.include_router(about_metrics(metrics or Metrics(host)), tags=["metrics"], responses=ERRORS)
    api.add_middleware(Gate, token=token, rate=rate or Rate(), bearer=people.bearer)
    plain = api.openapi

    def openapi() -> dict[str, Any]:
        if api.openapi_schema is None:
            describe_problems(plain())
        assert api.openapi_schema is not None
        return api.openapi_schema

    api.openapi = openapi  # type: ignore[method-assign]
    return api


def about_metrics(metrics: Metrics) -> APIRouter:
    routes = APIRouter()

    @routes.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    def scrape(
        who: Who, accept: Annotated[str, Header(max_length=500)] = "", by_tenant: bool = False
    ) -> Response:
        """For Prometheus.  Of all boards here, so for callers of all tenants; `by_tenant` adds their balances."""
        if who.tenant:
            raise NotAllowed(f"the token is {who.tenant}'s; metrics are of everyone: use an operator's or a viewer's of all")  # fmt: skip
        body, media = metrics.scrape(accept, by_tenant)
        return Response(body, headers={"content-type": media, "cache-control": "no-store"})

    return routes


def about_supply(host: Host) -> APIRouter:
    routes, useful, asked = APIRouter(), views.Useful(host), views.AskedTwin(host)

    @routes.get("/health", response_model=shapes.Health)
    async def health() -> Answer:
        return Answer({"status": "ok", "board": host.site.root.board})

    @routes.post("/plan", response_model=Plan, openapi_extra=BODY)
    async def plan(who: Who, body: Body) -> Answer:
        task, _ = await run_in_threadpool(own_task, host, who, body)
        return Answer(await run_in_threadpool(host.intake.plan, task))

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
    def whatif(
        who: Who, policy: Annotated[str, Query(max_length=40, pattern="^[a-z][a-z0-9_-]*$")] = "rigid"
    ) -> Answer:
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
        found, after = task_page(host, who, host.queries.task_ids()[::-1], limit, cursor)
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
