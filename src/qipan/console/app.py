"""The pages and what they post."""

import hashlib
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator, Hashable
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, urlencode

import jinja2
from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response, StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.staticfiles import StaticFiles

from qipan.client import AsyncClient
from qipan.console.form import EXAMPLE, FIELDS, fields_of, with_field
from qipan.console.guard import BODY_BYTES_MAX, VISITOR, Guard
from qipan.console.reads import Reads
from qipan.console.sayings import say
from qipan.console.visitors import Visitor, Visitors, cookie_of
from qipan.console.words import LANGUAGES, spoken, word
from qipan.errors import InvalidInput, NotAllowed, NotFound, OverLimit, QipanError
from qipan.quantities import format_bytes, format_duration, format_money
from qipan.shared import Watch

HERE = Path(__file__).parent
log = logging.getLogger("qipan.console")
PAGES = ("board", "submit", "tasks", "supply", "prices", "money", "decisions", "people")
LIVE_S = 1.0
POLICIES = (
    "jct",
    "fair",
    "deadline",
    "revenue",
    "rigid",
    "no-prices",
    "fifo",
    "gavel",
    "sia",
    "kueue",
)  # what the twin tries instead
STATUS = {InvalidInput: 400, OverLimit: 402, NotAllowed: 403, NotFound: 404}


class Pages:
    """Templates with the console's words and units."""

    def __init__(self) -> None:
        self._jinja = jinja2.Environment(
            loader=jinja2.FileSystemLoader(HERE / "templates"), autoescape=True, undefined=jinja2.StrictUndefined,
            trim_blocks=True, lstrip_blocks=True,
        )  # fmt: skip
        self._jinja.filters |= {
            "money": format_money, "duration": format_duration, "bytes": format_bytes, "moment": moment, "flops": flops, "product": product,
            "verdict": lambda verdict, language: word(f"v.{verdict}", language).removeprefix("v."), "say": say,
        }  # fmt: skip

    def html(self, template: str, language: str, **values: Any) -> str:
        """Of a part of a page."""
        return self._jinja.get_template(template).render(
            t=partial(word, language=language), language=language, pages=PAGES, **values
        )

    def whole(self, template: str, request: Request, status: int = 200, **values: Any) -> HTMLResponse:
        """A page, with the name of who logged in over it."""
        visitor: Visitor | None = request.scope.get(VISITOR)
        person = visitor.person if visitor is not None else ""
        return HTMLResponse(self.html(template, language_of(request), person=person, **values), status)


def make_console(api: AsyncClient, key: str, authority: str) -> FastAPI:
    console = FastAPI(title="Qipan console", docs_url=None, redoc_url=None, openapi_url=None)
    pages = Pages()

    def visitor(client: AsyncClient) -> Visitor:
        reads = Reads(client)
        return Visitor(client, reads, Live(pages, reads))

    visitors = Visitors(api, key, authority, visitor)
    console.add_middleware(Guard, visitors=visitors, authority=authority)
    console.mount("/static", StaticFiles(directory=HERE / "static"))
    add_errors(console, pages)
    add_door(console, pages, visitors)
    add_pages(console, pages)
    add_posts(console, pages)
    return console


def visitor_of(request: Request) -> Visitor:
    """The guard let nobody without one to this page."""
    found: Visitor = request.scope[VISITOR]
    return found


def add_errors(console: FastAPI, pages: Pages) -> None:
    @console.exception_handler(QipanError)
    async def ours(request: Request, error: QipanError) -> Response:
        visitor: Visitor | None = request.scope.get(VISITOR)
        if visitor is not None and visitor.over:
            return RedirectResponse("/login", 303)
        return wrong(request, str(error), STATUS.get(type(error), 502))

    @console.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        return wrong(request, str(error.detail), error.status_code)

    def wrong(request: Request, text: str, status: int) -> Response:
        return pages.whole("wrong.html", request, status, page="", text=text)


def add_door(console: FastAPI, pages: Pages, visitors: Visitors) -> None:
    @console.get("/enter")
    def door(request: Request) -> Response:
        return pages.whole("enter.html", request, page="", here="/enter", wrong=False)

    @console.post("/enter")
    async def enter(request: Request) -> Response:
        if not visitors.fits((await posted(request)).get("key", "")):
            return pages.whole("enter.html", request, 403, page="", here="/enter", wrong=True)
        return await entered(request, visitors.key_cookie, visitors.key, visitors.login_cookie)

    @console.get("/login")
    async def login_page(request: Request) -> Response:
        return await login(request)

    async def login(request: Request, refused: QipanError | None = None, user: str = "") -> Response:
        status = 200 if refused is None else 429 if isinstance(refused, OverLimit) else STATUS.get(type(refused), 502)  # fmt: skip
        issuer = (await visitors.provider() or {}).get("issuer", "")
        return pages.whole("login.html", request, status, page="", here="/login", user=user[:64], issuer=issuer, error=str(refused or ""))  # fmt: skip

    @console.post("/login")
    async def log_in(request: Request) -> Response:
        """The board counts the tries and says no in its own words."""
        fields = await posted(request)
        user = fields.get("user", "")
        try:
            secret = await visitors.log_in(user, fields.get("password", ""))
        except QipanError as refused:
            return await login(request, refused, user)
        return await entered(request, visitors.login_cookie, secret, visitors.key_cookie)

    @console.post("/login/code")
    async def begin_code(request: Request) -> Response:
        try:
            secret = await visitors.begin_flow()
        except QipanError as refused:
            return await login(request, refused)
        answer = RedirectResponse("/login/code", 303)
        answer.set_cookie(visitors.flow_cookie, secret, httponly=True, samesite="strict")
        return answer

    @console.get("/login/code")
    async def code(request: Request) -> Response:
        """Shows the code, and itself again until the person has approved it at the provider."""
        try:
            found = await visitors.look_at_flow(request.headers)
        except QipanError as refused:
            return await login(request, refused)
        if isinstance(found, str):
            answer = await entered(request, visitors.login_cookie, found, visitors.key_cookie)
            answer.delete_cookie(visitors.flow_cookie, httponly=True, samesite="strict")
            return answer
        return pages.whole("code.html", request, page="", here="/login/code", flow=found)

    @console.post("/logout")
    async def log_out(request: Request) -> Response:
        await end_session(request)
        answer = RedirectResponse("/login", 303)
        for cookie in (visitors.login_cookie, visitors.key_cookie):
            answer.delete_cookie(cookie, httponly=True, samesite="strict")
        return answer

    async def entered(request: Request, cookie: str, secret: str, other: str) -> Response:
        """As somebody else than before, if anybody: that session ends, and the other way in is forgotten.  Else who logged in where the
        owner was would be the owner once their session is over."""
        await end_session(request)
        answer = RedirectResponse("/", 303)
        answer.set_cookie(cookie, secret, httponly=True, samesite="strict")
        answer.delete_cookie(other, httponly=True, samesite="strict")
        return answer

    async def end_session(request: Request) -> None:
        try:
            await visitors.log_out(request.headers)
        except QipanError as error:
            log.info("a session ended here and not at the board: %s", error)

    @console.get("/language/{language}")
    def speak(language: str, to: str = "/") -> Response:
        if language not in LANGUAGES:
            raise NotFound(f"no language {language[:20]!r}; there are {', '.join(LANGUAGES)}")
        inside = to.startswith("/") and not to.startswith("//") and "\\" not in to
        answer = RedirectResponse(to if inside else "/", 303)
        answer.set_cookie("language", language, max_age=365 * 86400, httponly=True, samesite="lax")
        return answer


def add_pages(console: FastAPI, pages: Pages) -> None:
    async def shown(request: Request, page: str, query: dict[str, Any], **more: Any) -> Response:
        read = await visitor_of(request).reads.of(page, query)
        values = {"key": None, "what_if": None, "policies": POLICIES, **read, **more}
        return pages.whole(f"{page}.html", request, page=page, query=urlencode(query), here=str(request.url.path), **values)  # fmt: skip

    @console.get("/")
    async def board(request: Request) -> Response:
        return await shown(request, "board", {})

    @console.get("/submit")
    async def submit(request: Request) -> Response:
        return pages.whole(
            "submit.html", request, page="submit", form=FIELDS, values=fields_of(EXAMPLE), text=EXAMPLE, error="", plan=None, draft=secrets.token_hex(12)
        )  # fmt: skip

    @console.get("/tasks/{task_id}")
    async def task(request: Request, task_id: str) -> Response:
        return await shown(request, "task", {"task_id": one_part(task_id)})

    @console.get("/decisions/what-if")
    async def what_if(request: Request, policy: str = POLICIES[0]) -> Response:
        told = await visitor_of(request).api.call("GET", "/whatif", None, policy=policy[:40])
        return await shown(request, "decisions", {}, what_if=told)

    @console.get("/live/{page}")
    async def live(request: Request, page: str) -> Response:
        if page not in (*PAGES, "task") or page == "submit":
            raise NotFound(f"no live page {page[:20]!r}")
        query = dict(request.query_params)
        if page == "task":
            query["task_id"] = one_part(query.get("task_id", ""))
        changes = visitor_of(request).live.follow(page, query, language_of(request))
        return StreamingResponse(changes, media_type="text/event-stream", headers={"x-accel-buffering": "no"})

    @console.get("/{page}")
    async def list_(request: Request, page: str) -> Response:
        if page not in PAGES or page == "board":
            raise NotFound(f"no page {page[:40]!r}")
        return await shown(request, page, dict(request.query_params))


class Live:
    """The live part of a page whenever it changed; `offline` while the boards do not answer.  Tabs that show the same share
    what is drawn, and are woken only when it is another."""

    def __init__(self, pages: Pages, reads: Reads) -> None:
        self._pages, self._reads = pages, reads
        self._watches: dict[Hashable, Watch] = {}

    async def follow(self, page: str, query: dict[str, Any], language: str) -> AsyncIterator[str]:
        key = (page, language, *sorted(query.items()))
        watch = self._watches.setdefault(key, Watch(lambda: self._drawn(page, query, language), LIVE_S))
        version = 0
        try:
            async with watch:
                while True:
                    if await watch.after(version):
                        version = watch.version
                        yield str(watch.seen)
                    else:
                        yield ": still here\n\n"
        finally:
            if watch.followers == 0 and self._watches.get(key) is watch:
                del self._watches[key]

    async def _drawn(self, page: str, query: dict[str, Any], language: str) -> str:
        try:
            values = await self._reads.of(page, query)
            now, event = self._pages.html(f"{page}.live.html", language, page=page, **values), "live"
        except QipanError as error:
            now, event = str(error), "offline"
        return f"event: {event}\ndata: {json.dumps(now, ensure_ascii=False)}\n\n"


def add_posts(console: FastAPI, pages: Pages) -> None:
    @console.post("/draft")
    async def draft(request: Request) -> Response:
        """A changed form field or text -> the text, the fields, the plan as HTML."""
        fields = await posted(request)
        text, error, plan, values = fields.get("text", ""), "", None, None
        try:
            if "changed" in fields:
                text = await run_in_threadpool(with_field, text, fields["changed"], fields.get("value", ""))
            values = await run_in_threadpool(fields_of, text)  # a long one takes seconds
            plan = await visitor_of(request).api.call("POST", "/plan", {"text": text})
        except QipanError as refused:
            error = str(refused)
        html = pages.html("plan.html", language_of(request), plan=plan, error=error)
        return Response(
            json.dumps({"text": text, "fields": values, "plan": html}), media_type="application/json"
        )

    @console.post("/submit")
    async def submit(request: Request) -> Response:
        fields = await posted(request)
        text = fields.get("text", "")
        key = draft_key(fields.get("page", ""), text)
        try:
            answer = await visitor_of(request).api.call("POST", "/tasks", {"text": text, "key": key})
        except QipanError as refused:
            try:
                values = await run_in_threadpool(fields_of, text)
            except InvalidInput:
                values = dict.fromkeys(FIELDS, "")
            return pages.whole("submit.html", request, 422, page="submit", form=FIELDS, values=values, text=text, error=str(refused), plan=None, draft=secrets.token_hex(12))  # fmt: skip
        return RedirectResponse(f"/tasks/{answer['task_id']}", 303)

    @console.post("/tasks/{task_id}/cancel")
    async def cancel(request: Request, task_id: str) -> Response:
        await visitor_of(request).api.call("POST", f"/tasks/{one_part(task_id)}/cancel")
        return RedirectResponse(f"/tasks/{task_id}", 303)

    @console.post("/people/{tenant}/key")
    async def make_key(request: Request, tenant: str) -> Response:
        api = visitor_of(request).api
        made = await api.call("POST", f"/people/{quote(tenant, safe='')}/key")
        values = {**await api.call("GET", "/people"), **await api.call("GET", "/webhooks")}
        return pages.whole("people.html", request, page="people", query="", key=made, **values)

    @console.post("/tasks/{task_id}/budget")
    async def budget(request: Request, task_id: str) -> Response:
        most = (await posted(request)).get("max_cost", "")
        await visitor_of(request).api.call(
            "POST", f"/tasks/{one_part(task_id)}/budget", None, max_cost=most[:40]
        )
        return RedirectResponse(f"/tasks/{task_id}", 303)

    @console.get("/tasks/{task_id}/receipt.json")
    async def receipt(request: Request, task_id: str) -> Response:
        bill = await visitor_of(request).api.call("GET", f"/tasks/{one_part(task_id)}/bill")
        named = {"content-disposition": f'attachment; filename="{bill["receipt"]["task_id"]}.receipt.json"'}
        return Response(json.dumps(bill["receipt"], indent=1), headers=named, media_type="application/json")


async def posted(request: Request) -> dict[str, str]:
    """The fields of a posted form, each once.  Raises InvalidInput."""
    body = b""
    async for piece in request.stream():
        body += piece
        if len(body) > BODY_BYTES_MAX:
            raise InvalidInput(f"the form is larger than {BODY_BYTES_MAX} bytes")
    try:
        found = parse_qs(body.decode(), keep_blank_values=True, max_num_fields=40, errors="strict")
    except ValueError as error:
        raise InvalidInput(f"unreadable form: {error}") from None
    if any(len(values) > 1 for values in found.values()):
        raise InvalidInput("a field stands twice in the form")
    return {name: values[0] for name, values in found.items()}


def draft_key(page: str, text: str) -> str:
    """The same text from the same page is submitted once, however often the button is pressed."""
    return (
        f"console-{hashlib.blake2b(f'{page}|{text}'.encode(), digest_size=16).hexdigest()}"
        if page
        else secrets.token_hex(16)
    )


def one_part(task_id: str) -> str:
    """A task's id as one part of the API's path.  Raises NotFound for what can be none."""
    if not task_id.replace("-", "").replace(".", "").replace("_", "").isalnum() or not task_id.isascii():
        raise NotFound(f"no task {task_id[:60]!r}")
    if not task_id[0].isalnum() or len(task_id) > 100:
        raise NotFound(f"no task {task_id[:60]!r}")
    return task_id


def language_of(request: Request) -> str:
    return spoken(cookie_of(request.headers, "language"))


def moment(at_s: float) -> str:
    return time.strftime("%m-%d %H:%M:%S", time.localtime(at_s))


def product(product_id: str) -> str:
    """`sim/a@cn-east/firm/480000` with its hour as people read it."""
    what, _, hour = product_id.rpartition("/")
    return f"{what} {time.strftime('%m-%d %H:00', time.localtime(int(hour) * 3600))}"


def flops(rate: float | None) -> str:
    if rate is None:
        return ""
    for unit, size in (("PFLOP/s", 1e15), ("TFLOP/s", 1e12)):
        if rate >= size:
            return f"{rate / size:.1f} {unit}"
    return f"{rate / 1e9:.1f} GFLOP/s"
