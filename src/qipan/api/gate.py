"""The door of the API: who calls, and how much they may send."""

import hashlib
import hmac
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qipan.api.problem import problem
from qipan.errors import InvalidInput, NotAllowed, OverLimit
from qipan.login.roles import allows
from qipan.login.tokens import Bearer

BODY_BYTES_MAX = 2 << 20
QUERY_BYTES_MAX = 4096
CALLER = "qipan.caller"
#: requests a second on the long run, and how many at once; one budget for each tenant, for each
#: address without a token, and one for the operator
TENANT_RATE, OPERATOR_RATE = (100.0, 400.0), (2000.0, 8000.0)
TENANTS_MAX = 10_000


class Rate:
    """A bucket for each caller that fills steadily and holds so many requests (token bucket)."""

    def __init__(
        self, tenant: tuple[float, float] = TENANT_RATE, operator: tuple[float, float] = OPERATOR_RATE
    ) -> None:
        self._tenant, self._operator = tenant, operator
        self._left: dict[str, tuple[float, float]] = {}  # caller -> (left, when)

    def wait_s(self, tenant: str, now_s: float) -> float:
        """0.0 when the caller may go on, else how long it should wait."""
        per_s, most = self._tenant if tenant else self._operator
        if len(self._left) > TENANTS_MAX:
            self._forget(now_s)
        left = self._share(tenant, now_s) * most
        if left < 1.0:
            self._left[tenant] = (left, now_s)
            return (1.0 - left) / per_s
        self._left[tenant] = (left - 1.0, now_s)
        return 0.0

    def _share(self, tenant: str, now_s: float) -> float:
        """How full its bucket is."""
        per_s, most = self._tenant if tenant else self._operator
        left, at_s = self._left.get(tenant, (most, now_s))
        return min(1.0, (left + (now_s - at_s) * per_s) / most)

    def _forget(self, now_s: float) -> None:
        """The fuller half: who has asked for much stays known, however many others come."""
        emptiest = sorted(self._left, key=lambda tenant: self._share(tenant, now_s))[: TENANTS_MAX // 2]
        self._left = {tenant: self._left[tenant] for tenant in emptiest}


class TooMany(OverLimit):
    """`wait_s`: when it may be tried again."""

    status = 429

    def __init__(self, message: str, wait_s: float) -> None:
        super().__init__(message)
        self.wait_s = wait_s


@dataclass(frozen=True, slots=True)
class Caller:
    """`tenant` "": of none, who sees every tenant's tasks.  `user` "": nobody logged in, the store's own token was shown.
    `issuer` "": a user of this host, else the OpenID provider that vouched.  `session`: in which, of who logged in."""

    tenant: str = ""
    role: str = "operator"
    user: str = ""
    issuer: str = ""
    session: str = ""

    def sees(self, tenant: str) -> bool:
        return self.tenant in ("", tenant)

    @property
    def name(self) -> str:
        """As logs and reasons say it."""
        return self.user or self.tenant or "the user"


def caller_of(request: Request) -> Caller:
    found: Caller = request.scope[CALLER]
    return found


Who = Annotated[Caller, Depends(caller_of)]
#: who has no token yet comes here for one
OPEN = {("GET", "/v1/login"), ("HEAD", "/v1/login"), ("POST", "/v1/login"), ("POST", "/v1/login/oidc"),
        ("POST", "/v1/login/refresh"), ("POST", "/v1/logout")}  # fmt: skip
NOBODY = Caller("?", "nobody")


def tenant_token(token: str, tenant: str) -> str:
    """A token with which only this tenant's tasks and money are seen, made from the operator's."""
    return f"{tenant}:{hmac.new(token.encode(), f'tenant/{tenant}'.encode(), hashlib.sha256).hexdigest()}"


class Gate:
    """Lets through whoever carries a token and has a role that may do it, counts what they send, and writes the `Caller` into
    the scope.  `bearer` tells whom an access token stands for.  Raises InvalidInput when `token` is empty: nothing would open it."""

    def __init__(self, app: ASGIApp, token: str, rate: Rate, bearer: Callable[[str], Bearer]) -> None:
        if not token:
            raise InvalidInput("the operator's token is empty; `qipan up` makes one")
        self.app, self.token, self.rate, self.bearer = app, token, rate, bearer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        headers: list[tuple[bytes, bytes]] = scope["headers"]
        given = [value for name, value in headers if name == b"authorization"]
        lengths = [value for name, value in headers if name == b"content-length"]
        try:
            caller = self._caller(scope, given)
        except NotAllowed as error:
            await problem(error, 401)(scope, receive, send)
            return
        address = (scope.get("client") or ("this machine",))[0]
        bucket = caller.tenant if caller is not NOBODY else f"? {address}"
        if caller is not NOBODY and not allows(caller.role, scope["method"], scope["path"]):
            refused = problem(NotAllowed(f"{caller.name} has the role {caller.role}, which may not {scope['method']} {scope['path'][:200]}"))  # fmt: skip
        elif (wait_s := self.rate.wait_s(bucket, time.monotonic())) > 0:
            refused = problem(
                OverLimit(f"too many requests; wait {wait_s:.3f} s, or ask for more at a time"), 429
            )
            refused.headers["retry-after"] = str(math.ceil(wait_s))
        elif len(lengths) > 1 or not all(value.isdigit() for value in lengths):
            refused = problem(InvalidInput("content-length must stand once and be a number of bytes"))
        elif lengths and (len(lengths[0]) > 12 or int(lengths[0]) > BODY_BYTES_MAX):
            refused = problem(InvalidInput(f"the body is larger than {BODY_BYTES_MAX} bytes; send less"), 413)
        elif len(scope.get("query_string", b"")) > QUERY_BYTES_MAX:
            refused = problem(InvalidInput(f"the query is longer than {QUERY_BYTES_MAX} bytes"), 414)
        else:
            scope[CALLER] = caller
            await self._let_in(scope, receive, send)
            return
        await refused(scope, receive, send)

    async def _let_in(self, scope: Scope, receive: Receive, send: Send) -> None:
        got = 0

        async def counted() -> Message:
            nonlocal got
            message = await receive()
            got += len(message.get("body", b""))
            if got > BODY_BYTES_MAX:
                raise HTTPException(413, f"the body is larger than {BODY_BYTES_MAX} bytes")
            return message

        await self.app(scope, counted, send)

    def _caller(self, scope: Scope, given: list[bytes]) -> Caller:
        """Raises NotAllowed."""
        if (scope["method"], scope["path"]) in OPEN:
            return NOBODY
        kind, _, token = given[0].partition(b" ") if len(given) == 1 else (b"", b"", b"")
        if kind.lower() == b"bearer":
            if hmac.compare_digest(token, self.token.encode()):
                return Caller()
            tenant = token.rpartition(b":")[0].decode(errors="replace")
            if tenant and hmac.compare_digest(token, tenant_token(self.token, tenant).encode()):
                return Caller(tenant, "user")
            if token.count(b".") == 2 and token.isascii():
                who = self.bearer(token.decode())
                return Caller(who.tenant, who.role, who.user, who.issuer, who.session)
        raise NotAllowed("no or wrong token; log in with `qipan login`, or send the content of the store's `token` file")  # fmt: skip
