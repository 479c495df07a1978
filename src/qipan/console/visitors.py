"""Who sits at the console: its owner, by the key, and people who logged in, each with a client that shows their own token."""

import asyncio
import hashlib
import secrets
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import httpx
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.requests import cookie_parser

from qipan.client import AsyncClient
from qipan.console.reads import Reads
from qipan.errors import NotAllowed, NotFound, OverLimit, QipanError
from qipan.sessions import EARLY_S, DeviceFlow

if TYPE_CHECKING:
    from qipan.console.app import Live

VISITORS_MAX = 500
FLOWS_A_MINUTE = 30  # nobody needs to be anybody to begin one, and the provider is asked for each
IDLE_S = 12 * 3600.0  # who asked for nothing in so long logs in again


class Session(httpx.Auth):
    """Carries the access token of somebody who logged in, and renews it by `nobody` when it is over.  It lies in this process's memory
    alone, and carries nothing more once it is `over`: also for a page that still stands open."""

    def __init__(self, grant: dict[str, Any], nobody: AsyncClient) -> None:
        self.grant, self.used_s = grant, time.monotonic()
        self._nobody, self._ended = nobody, False
        self._renewing: asyncio.Task[None] | None = None

    @property
    def over(self) -> bool:
        return self._ended or time.monotonic() > self.used_s + IDLE_S

    def end(self) -> None:
        self._ended = True

    async def async_auth_flow(self, request: httpx.Request) -> AsyncGenerator[httpx.Request, httpx.Response]:
        if self.over:
            raise NotAllowed("your session at this console is over; log in again")
        if time.time() > float(self.grant["until_s"]) - EARLY_S:
            await self._renewed()
        request.headers["authorization"] = f"Bearer {self.grant['access_token']}"
        answer = yield request
        if answer.status_code == 401:  # the board knows the token no more: somebody ended the session
            self.end()

    async def _renewed(self) -> None:
        """Once for all who wait, and to its end though they wait no more: a refresh token is good once, so its answer must not be
        lost with a page that is closed meanwhile."""
        if self._renewing is None or self._renewing.done():
            self._renewing = asyncio.create_task(self._renew())
        await asyncio.shield(self._renewing)

    async def _renew(self) -> None:
        try:
            told = await self._nobody.call("POST", "/login/refresh", {"refresh_token": self.grant["refresh_token"]})  # fmt: skip
        except NotAllowed:
            self.end()
            raise
        self.grant = {**self.grant, **told}


@dataclass(slots=True)
class Visitor:
    """What one of them is shown is read with their own token and shared with nobody.  `session` None: the owner."""

    api: AsyncClient
    reads: Reads
    live: "Live"
    session: Session | None = None

    @property
    def over(self) -> bool:
        return self.session is not None and self.session.over

    @property
    def person(self) -> str:
        return str(self.session.grant["user"]) if self.session is not None else ""


@dataclass(slots=True)
class _Flow:
    """A login by the provider.  `look_s`: not looked at before; `id_token`: the person said yes, and the board does not know yet."""

    device: DeviceFlow
    look_s: float
    id_token: str | None = None


class Visitors:
    """`make` sets up a visitor for a client.  Cookies do not tell ports apart, so their names do."""

    def __init__(
        self, api: AsyncClient, key: str, authority: str, make: Callable[[AsyncClient], Visitor]
    ) -> None:
        self.key, self._api, self._make = key, api, make
        self._nobody = api.under(httpx.Auth())
        port = authority.rpartition(":")[2]
        self.key_cookie, self.login_cookie = f"qipan_{port}", f"qipan_login_{port}"
        self.flow_cookie = f"qipan_code_{port}"
        self._owner = make(api)
        #: by the hash of what the cookie holds; the oldest first
        self._flows: dict[bytes, _Flow] = {}
        self._flows_begun_s: list[float] = []  # within the last minute
        #: by such a hash, too; the longest unused first
        self._people: OrderedDict[bytes, tuple[Visitor, Session]] = OrderedDict()

    def of(self, headers: Headers) -> Visitor | None:
        """Of who shows these cookies: a login goes before the key."""
        self._forget()
        mark = _mark(cookie_of(headers, self.login_cookie))
        if (found := self._people.get(mark)) is not None:
            visitor, session = found
            session.used_s = time.monotonic()
            self._people.move_to_end(mark)
            return visitor
        return self._owner if self.fits(cookie_of(headers, self.key_cookie)) else None

    def fits(self, key: str) -> bool:
        return secrets.compare_digest(key.encode(), self.key.encode())

    async def provider(self) -> dict[str, str] | None:
        """The OpenID provider that the board names; None for none, or no answer."""
        try:
            named: dict[str, str] | None = (await self._nobody.call("GET", "/login"))["oidc"]
        except QipanError:
            return None
        return named

    async def begin_flow(self) -> str:
        """A login by the provider, as `keep_flow`.  Raises NotAllowed, NotFound, OverLimit, Unreachable."""
        now_s = time.monotonic()
        self._flows_begun_s = [at_s for at_s in self._flows_begun_s if now_s < at_s + 60]
        if len(self._flows_begun_s) >= FLOWS_A_MINUTE:
            raise OverLimit(
                f"{FLOWS_A_MINUTE} logins with the provider began within a minute; wait one, or log in with a password"
            )
        self._flows_begun_s.append(now_s)
        provider = await self.provider()
        if provider is None:
            raise NotFound("this board names no OpenID provider; log in with a password")
        return self.keep_flow(await run_in_threadpool(DeviceFlow, provider))

    def keep_flow(self, flow: DeviceFlow) -> str:
        """What the cookie of this try is to hold."""
        now_s, secret = time.monotonic(), secrets.token_urlsafe(32)
        self._flows = {mark: one for mark, one in self._flows.items() if now_s < one.device.end_s}
        self._flows[_mark(secret)] = _Flow(flow, now_s + flow.wait_s)
        while len(self._flows) > VISITORS_MAX:
            del self._flows[next(iter(self._flows))]
        return secret

    async def look_at_flow(self, headers: Headers) -> DeviceFlow | str:
        """Of who shows the cookie of a try: what the cookie of the login is to hold, once the provider has the person's yes; until then the
        flow.  Raises NotAllowed when it is over; OverLimit, Unreachable when a later look may do better."""
        mark = _mark(cookie_of(headers, self.flow_cookie))
        flow = self._flows.get(mark)
        if flow is None:
            raise NotAllowed("no login with the provider is under way; begin again")
        try:
            if flow.id_token is None:
                if time.monotonic() < flow.look_s:
                    return flow.device
                flow.look_s = time.monotonic() + flow.device.wait_s  # for who looks meanwhile
                flow.id_token = await run_in_threadpool(flow.device.look)
                flow.look_s = time.monotonic() + flow.device.wait_s  # longer, where it was told to slow down
                if flow.id_token is None:
                    return flow.device
            grant = await self._nobody.call("POST", "/login/oidc", {"id_token": flow.id_token})
        except NotAllowed:
            self._flows.pop(mark, None)
            raise
        self._flows.pop(mark, None)
        return self._begun(grant)

    async def log_in(self, user: str, password: str) -> str:
        """What the cookie is to hold.  Raises NotAllowed, OverLimit with the board's words, Unreachable."""
        return self._begun(await self._nobody.call("POST", "/login", {"user": user, "password": password}))

    def _begun(self, grant: dict[str, Any]) -> str:
        session, secret = Session(grant, self._nobody), secrets.token_urlsafe(32)
        visitor = self._make(self._api.under(session))
        visitor.session = session
        self._people[_mark(secret)] = visitor, session
        self._forget()
        return secret

    async def log_out(self, headers: Headers) -> None:
        """Here, and at the board where that answers."""
        _, session = self._people.pop(_mark(cookie_of(headers, self.login_cookie)), (None, None))
        if session is not None and not session.over:
            session.end()
            await self._nobody.call("POST", "/logout", {"refresh_token": session.grant["refresh_token"]})

    def _forget(self) -> None:
        """Whose session is over, and the longest unused of too many."""
        for mark in [mark for mark, (_, session) in self._people.items() if session.over]:
            del self._people[mark]
        while len(self._people) > VISITORS_MAX:
            _, (_, session) = self._people.popitem(last=False)
            session.end()


def cookie_of(headers: Headers, name: str) -> str:
    """As browsers read it: what other programs of this host put beside it, which may be anything, spoils nothing."""
    return cookie_parser(headers.get("cookie", "")).get(name, "")


def _mark(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()
