"""The door of the API: who calls, and how much they may send."""

import hashlib
import hmac
from dataclasses import dataclass

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qipan.api.problem import problem
from qipan.errors import InvalidInput, NotAllowed

BODY_BYTES_MAX = 2 << 20
QUERY_BYTES_MAX = 4096
CALLER = "qipan.caller"


@dataclass(frozen=True, slots=True)
class Caller:
    """`tenant` "": the operator, who sees every tenant's tasks."""

    tenant: str = ""

    def sees(self, tenant: str) -> bool:
        return self.tenant in ("", tenant)


def tenant_token(token: str, tenant: str) -> str:
    """A token with which only this tenant's tasks and money are seen, made from the operator's."""
    return f"{tenant}:{hmac.new(token.encode(), f'tenant/{tenant}'.encode(), hashlib.sha256).hexdigest()}"


class Gate:
    """Lets through whoever carries a token, counts what they send, and writes the `Caller` into the scope."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self.app, self.token = app, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        headers: list[tuple[bytes, bytes]] = scope["headers"]
        given = [value for name, value in headers if name == b"authorization"]
        caller = self._caller(given[0]) if len(given) == 1 else None
        lengths = [value for name, value in headers if name == b"content-length"]
        if caller is None:
            refused = problem(
                NotAllowed("no or wrong token; send the content of the store's `token` file"), 401
            )
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

    def _caller(self, header: bytes) -> Caller | None:
        kind, _, given = header.partition(b" ")
        if kind.lower() != b"bearer":
            return None
        if hmac.compare_digest(given, self.token.encode()):
            return Caller()
        tenant = given.rpartition(b":")[0].decode(errors="replace")
        if tenant and hmac.compare_digest(given, tenant_token(self.token, tenant).encode()):
            return Caller(tenant)
        return None
